//! What a snapshot says about a device and its transport: bytes, and states that look right.

#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::testkit::{HIGH_REGION, REGION_SIZE, memory};
use devices::virtio::balloon::{Balloon, BalloonConfig};
use devices::virtio::blk::{Blk, BlkConfig, EngineKind};
use devices::virtio::console::{Console, ConsoleConfig, PortConfig, PortEnd};
use devices::virtio::fs::{CachePolicy, Fs, FsConfig};
use devices::virtio::mem::{Mem, MemConfig, PluggableMemory};
use devices::virtio::state::QueueState;
use devices::virtio::vsock::{Vsock, VsockConfig};
use devices::virtio::{Interrupt, MmioTransport, TransportState, VirtioDevice};
use inlay_fuzz::SteppedLoop;
use libfuzzer_sys::fuzz_target;
use seccomp::Confinement;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Arbitrary, Debug)]
struct Input {
    kind: Kind,
    state: State,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Balloon,
    Blk,
    Console,
    Fs,
    Mem,
    Vsock,
}

#[derive(Arbitrary, Debug)]
enum State {
    Bytes(Vec<u8>),
    Fields { status: u8, features: u64, selects: [u32; 3], needs_reset: bool, queues: Vec<Queue>, device: Vec<u8> },
}

#[derive(Arbitrary, Debug)]
struct Queue {
    size: Option<u32>,
    ready: bool,
    parts: Option<[u64; 3]>,
    next_avail: u8,
    next_used: u16,
}

struct Nowhere;

impl PluggableMemory for Nowhere {
    fn plug(&self, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }

    fn unplug(&self, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }
}

fn device(kind: Kind) -> Box<dyn VirtioDevice> {
    match kind {
        Kind::Balloon => Box::new(Balloon::new(&BalloonConfig::default(), 2 * REGION_SIZE).expect("A balloon").0),
        Kind::Blk => {
            let file = tempfile::tempfile_in("/dev/shm").expect("An image");
            file.set_len(4096).expect("An image of some sectors");
            // The same input does the same each time.
            let config = BlkConfig { engine: EngineKind::Inline, ..BlkConfig::new("disk", file) };
            Box::new(Blk::new(config, Confinement::On).expect("A disk"))
        }
        Kind::Console => {
            let host = PortEnd::Streams { input: None, output: None };
            let port = PortConfig { number: 0, console: true, name: None, host };
            Box::new(Console::new(ConsoleConfig { ports: vec![port] }).expect("A console"))
        }
        Kind::Fs => {
            let config = FsConfig {
                tag: "shared".into(),
                shared_dir: "/proc/self/task".into(),
                cache: CachePolicy::Never,
                num_request_queues: 1,
                queue_size: 64,
                writeback: false,
                workers: 0,
                xattr: false,
                posix_locks: false,
            };
            Box::new(Fs::new(config, Confinement::On).expect("A shared directory"))
        }
        Kind::Mem => {
            let config = MemConfig { size: 32 << 20, block_size: 2 << 20, requested: 0, node: 0 };
            Box::new(Mem::new(config, 4 << 30, Box::new(Nowhere)).expect("A region").0)
        }
        Kind::Vsock => Box::new(Vsock::new(VsockConfig { guest_cid: 3, uds_path: None }).expect("A socket device").0),
    }
}

fn state(device: &dyn VirtioDevice, said: &State) -> Option<TransportState> {
    let fields = match said {
        State::Bytes(bytes) => return postcard::from_bytes(bytes).ok(),
        fields => fields,
    };
    let State::Fields { status, features, selects, needs_reset, queues, device: own } = fields else { return None };
    let queues = device.queue_max_sizes().iter().zip(0_u64..).zip(queues).map(|((max_size, index), said)| {
        let base = HIGH_REGION + index * 0x8000;
        let [descriptors, avail, used] = said.parts.unwrap_or([base, base + 0x4000, base + 0x5000]);
        let size = said.size.unwrap_or((*max_size).into());
        let next_avail = said.next_avail.into();
        QueueState { size, ready: said.ready, descriptors, avail, used, next_avail, next_used: said.next_used }
    });
    let own = postcard::to_stdvec(own).expect("Bytes as bytes");
    Some(TransportState {
        device_type: device.device_type(),
        status: [0xf, 0, 1, 3, 0xb, 0x8f][usize::from(*status % 6)],
        needs_reset: *needs_reset,
        device_features_sel: selects[0],
        driver_features_sel: selects[1],
        driver_features: features & device.features() | 1 << 32,
        queue_sel: selects[2],
        interrupt_status: 1,
        config_generation: selects[0],
        queues: queues.collect(),
        device: postcard::from_bytes(&own).expect("Any bytes are a device's state until it looks at them"),
    })
}

fuzz_target!(|input: Input| {
    let device = device(input.kind);
    let Some(state) = state(device.as_ref(), &input.state) else { return };
    let event_loop = Arc::new(SteppedLoop::new());
    let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).expect("An event"));
    let transport = MmioTransport::new(device, memory(), event_loop.clone(), interrupt).expect("A transport");
    if let Err(refusal) = transport.restore(&state) {
        assert!(!refusal.to_string().is_empty());
        return;
    }
    let again = transport.save().map(|again| again.queues);
    assert!(!again.is_ok_and(|queues| queues != state.queues), "What was restored is what is saved");
    transport.unpark();
    event_loop.settle();
    transport.reset();
});
