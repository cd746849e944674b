//! One of each device.

use std::fs::File;
use std::io;

use seccomp::Confinement;

use super::Subject;
use super::subject::Request;
use crate::testkit::REGION_SIZE;
use crate::virtio::balloon::{Balloon, BalloonConfig};
use crate::virtio::blk::{Blk, BlkConfig, EngineKind};
use crate::virtio::console::{Console, ConsoleConfig, PortConfig, PortEnd};
use crate::virtio::fs::{CachePolicy, Fs, FsConfig};
use crate::virtio::mem::{Mem, MemConfig, PluggableMemory};
use crate::virtio::net::{Net, NetConfig, Tap};
use crate::virtio::pmem::Pmem;
use crate::virtio::rate_limiter::RateLimits;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockConfig};

const SECTOR: u32 = 512;

/// A read of the second sector of a drive.
fn drive(engine: EngineKind) -> Subject {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * u64::from(SECTOR)).unwrap();
    let said = [[0; 8], 1_u64.to_le_bytes()].concat();
    let request = Request { queue: 0, said, room: SECTOR + 1, written: SECTOR + 1 };
    Subject::new(0, request, move || {
        let config = BlkConfig { engine, ..BlkConfig::new("drive", file.try_clone().unwrap()) };
        Box::new(Blk::new(config, Confinement::On).unwrap())
    })
}

pub fn blk() -> Subject {
    drive(EngineKind::Threads)
}

pub fn blk_uring() -> Subject {
    drive(EngineKind::IoUring)
}

/// A page that goes.
pub fn balloon() -> Subject {
    let said = 0x300_u32.to_le_bytes().to_vec();
    let config = BalloonConfig { deflate_on_oom: true, free_page_reporting: true, ..Default::default() };
    Subject::new(0, Request { queue: 0, said, room: 0, written: 0 }, move || {
        Box::new(Balloon::new(&config, 2 * REGION_SIZE).unwrap().0)
    })
}

/// A line of text, which nobody reads.
pub fn console() -> Subject {
    Subject::new(0, Request { queue: 1, said: b"a line\n".to_vec(), room: 0, written: 0 }, || {
        let output = File::options().write(true).open("/dev/null").unwrap();
        let host = PortEnd::Streams { input: None, output: Some(output) };
        let ports = vec![PortConfig { number: 0, console: true, name: None, host }];
        Box::new(Console::new(ConsoleConfig { ports }).unwrap())
    })
}

/// The first message of a client.
pub fn fs() -> Subject {
    let dir = tempfile::tempdir().unwrap();
    // A header: 104 bytes, INIT; then version 7.38 and what it can do.
    let words = [104_u32, 26, 1, 0, 0, 0, 0, 0, 1, 0, 7, 38, 0x2_0000, 0x73ff_fffb];
    let mut said: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    said.resize(104, 0);
    Subject::new(0, Request { queue: 1, said, room: 80, written: 80 }, move || {
        let config = FsConfig {
            tag: "share".into(),
            shared_dir: dir.path().into(),
            cache: CachePolicy::Auto,
            num_request_queues: 1,
            queue_size: 256,
            writeback: false,
            workers: 2,
            xattr: true,
            posix_locks: false,
        };
        Box::new(Fs::new(config, Confinement::On).unwrap())
    })
}

/// Memory that is always there.
struct Always;

impl PluggableMemory for Always {
    fn plug(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn unplug(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Asks for the state of the first block.
pub fn mem() -> Subject {
    const ADDR: u64 = 1 << 32;
    let block_size = 2 << 20;
    let mut said = vec![0; 24];
    said[0] = 3;
    said[8..16].copy_from_slice(&ADDR.to_le_bytes());
    said[16] = 1;
    Subject::new(1 << 1, Request { queue: 0, said, room: 10, written: 10 }, move || {
        let config = MemConfig { size: 8 * block_size, block_size, requested: 0, node: 0 };
        Box::new(Mem::new(config, ADDR, Box::new(Always)).unwrap().0)
    })
}

/// A frame, to an interface of a network that has nothing else.
pub fn net() -> Subject {
    let mut said = vec![0; 12];
    said.extend([0xff; 6]);
    said.extend([2, 0, 0, 0, 0, 1]);
    said.extend([0x88; 48]);
    Subject::new(0, Request { queue: 1, said, room: 0, written: 0 }, || {
        let open = || {
            // SAFETY: no memory is involved, and only this thread is moved to another network.
            let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(result, 0, "A network of its own needs privileges");
            Tap::open("tap0").unwrap()
        };
        let tap = std::thread::spawn(open).join().unwrap();
        Box::new(Net::new(NetConfig::new("net", vec![tap], [2, 0, 0, 0, 0, 1])).unwrap())
    })
}

/// A flush.
pub fn pmem() -> Subject {
    Subject::new(0, Request { queue: 0, said: vec![0; 4], room: 4, written: 4 }, || {
        Box::new(Pmem::new(1 << 32, 2 << 20, Some(tempfile::tempfile().unwrap())))
    })
}

pub fn rng() -> Subject {
    Subject::new(0, Request { queue: 0, said: Vec::new(), room: 64, written: 64 }, || {
        Box::new(Rng::new(RateLimits::default()).unwrap())
    })
}

/// A disk whose backend is friendly and does nothing.
pub fn vhost_user() -> Subject {
    let mut make = crate::virtio::vhost_user::tests::friendly();
    Subject::without_queues(0, move || Box::new(make()))
}

/// An RST of a connection that is not there: it has no answer.
pub fn vsock() -> Subject {
    let mut said = vec![0; 44];
    (said[0], said[8], said[28], said[30]) = (3, 2, 1, 3);
    Subject::new(0, Request { queue: 1, said, room: 0, written: 0 }, || {
        Box::new(Vsock::new(VsockConfig { guest_cid: 3, uds_path: None }).unwrap().0)
    })
}
