//! Accesses to the registers of a device, in all states and of all sizes (virtio 1.2 section 4.2.2).

#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::BusDevice;
use devices::testkit::memory;
use devices::virtio::rate_limiter::RateLimits;
use devices::virtio::rng::Rng;
use devices::virtio::vsock::{Vsock, VsockConfig};
use devices::virtio::{Interrupt, MmioTransport, VirtioDevice};
use inlay_fuzz::SteppedLoop;
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Status values that lead on, and some that do not.
const STATUSES: [u32; 12] = [0, 1, 3, 7, 0xb, 0xf, 0x4f, 0x8f, 0x80, 0xc, 0x5, u32::MAX];

const STATUS: u64 = 0x70;

#[derive(Arbitrary, Debug)]
enum Access {
    Status(u8),
    /// Features that are offered, accepted.
    Features,
    /// A ring, mostly where it can be.
    Queue {
        index: u8,
        size: u32,
        parts: [u16; 3],
        high: bool,
    },
    Register {
        index: u8,
        value: u32,
    },
    Write {
        offset: u64,
        bytes: Vec<u8>,
    },
    Read {
        offset: u64,
        len: u8,
    },
    Park,
    Save,
}

fn play(transport: &MmioTransport, access: &Access) {
    let write = |register: u64, value: u32| transport.write(register, &value.to_le_bytes());
    match access {
        Access::Status(index) => write(STATUS, STATUSES[usize::from(*index) % STATUSES.len()]),
        Access::Features => {
            for select in 0..2 {
                write(0x14, select);
                write(0x24, select);
                let mut offered = [0; 4];
                transport.read(0x10, &mut offered);
                write(0x20, u32::from_le_bytes(offered));
            }
        }
        Access::Queue { index, size, parts, high } => {
            write(0x30, u32::from(*index % 4));
            write(0x38, *size);
            for (register, part) in [0x80, 0x90, 0xa0].into_iter().zip(parts) {
                write(register, u32::from(*part) * 8);
                write(register + 4, u32::from(*high));
            }
            write(0x44, 1);
        }
        Access::Register { index, value } => write(u64::from(*index) * 4, *value),
        Access::Write { offset, bytes } => transport.write(*offset, bytes),
        Access::Read { offset, len } => transport.read(*offset, &mut vec![0; (*len).into()]),
        Access::Park => {
            transport.park();
            transport.unpark();
        }
        Access::Save => drop(transport.save()),
    }
}

fuzz_target!(|input: (bool, Vec<Access>)| {
    let (many_queues, accesses) = input;
    let device: Box<dyn VirtioDevice> = if many_queues {
        Box::new(Vsock::new(VsockConfig { guest_cid: 3, uds_path: None }).expect("A device").0)
    } else {
        Box::new(Rng::new(RateLimits::default()).expect("A device"))
    };
    let event_loop = Arc::new(SteppedLoop::new());
    let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).expect("An event"));
    let transport = MmioTransport::new(device, memory(), event_loop.clone(), interrupt).expect("A transport");
    for access in accesses.iter().take(64) {
        play(&transport, access);
        event_loop.settle();
    }
    transport.write(STATUS, &[0; 4]);
    let mut status = [0xff; 4];
    transport.read(STATUS, &mut status);
    assert_eq!(status, [0; 4], "A reset always works");
});
