//! Real backends from Debian's packages: qemu-storage-daemon's disk and virtiofsd in C, with a driver in guest memory.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command};

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_VRING;
use vm_memory::ByteValued;

use super::*;
use crate::testkit::eventually;

const STORAGE_DAEMON: &str = "/usr/bin/qemu-storage-daemon";
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// Request types of a disk.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH_OUT: u32 = 4;

/// Bytes of a request's data, and of the place in guest memory for the whole of it.
const DATA: u64 = 4096;
const PLACE: u64 = 2 * DATA;

/// A backend's process, which ends with the test.
struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn new(child: impl FnOnce(&Path) -> Command) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mut command = child(dir.path());
        let program = Path::new(command.get_program()).to_owned();
        if !program.exists() {
            eprintln!("skipped: {} is not installed", program.display());
            return None;
        }
        let child = command.spawn().unwrap();
        let daemon = Self { child, dir };
        daemon.wait_listening();
        Some(daemon)
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn wait_listening(&self) {
        // Not by a connection: that would be its first, and virtiofsd's last.
        let path = self.socket();
        eventually("A backend's socket", || {
            fs::read_to_string("/proc/net/unix").unwrap().lines().any(|line| {
                // The flag of a socket that listens.
                line.ends_with(path.to_str().unwrap()) && line.contains(" 00010000 ")
            })
        });
    }

    fn signal(&self, signal: i32) {
        // SAFETY: no memory is involved; the child was not waited for, so the number is its own.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// `kill -9`.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let _ = fs::remove_file(self.socket());
    }

    fn start_again(&mut self, child: impl FnOnce(&Path) -> Command) {
        self.child = child(self.dir.path()).spawn().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn storage_daemon(dir: &Path) -> Command {
    let image = dir.join("image");
    if !image.exists() {
        File::create(&image).unwrap().set_len(1 << 20).unwrap();
    }
    let mut command = Command::new(STORAGE_DAEMON);
    command.arg("--blockdev").arg(format!("driver=file,node-name=disk,filename={}", image.display()));
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues=2",
        dir.join("socket").display()
    ));
    command
}

fn virtiofsd(dir: &Path) -> Command {
    let share = dir.join("share");
    fs::create_dir_all(&share).unwrap();
    let mut command = Command::new(VIRTIOFSD);
    command.arg(format!("--socket-path={}", dir.join("socket").display()));
    command.arg("-o").arg(format!("source={}", share.display()));
    command.args(["-o", "sandbox=chroot", "-o", "log_level=err", "--rlimit-nofile=1024"]);
    command
}

fn start_disk(daemon: &Daemon) -> Running {
    start_with(VhostUserConfig { num_queues: 2, ..blk(&daemon.socket()) })
}

/// Makes a request for the block of [`DATA`] bytes number `block` available, in a place of its own.
fn offer(running: &mut Running, queue: usize, kind: u32, block: u64) {
    let place = place(block);
    let mut header = [0; 17];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..16].copy_from_slice(&(block * DATA / 512).to_le_bytes());
    header[16] = 0xff;
    running.guest.poke(place, &header);
    let data = Buffer { addr: place + DATA, len: DATA as u32, writable: kind == IN };
    let status = Buffer::writable(place + 16, 1);
    let mut chain = vec![Buffer::readable(place, 16), data, status];
    if kind == FLUSH_OUT {
        chain.remove(1);
    }
    running.rings[queue].offer(&chain);
}

fn place(block: u64) -> u64 {
    0x1_0000 + block * PLACE
}

fn pattern(block: u64, round: u8) -> Vec<u8> {
    (0..DATA).map(|index| (index as u8).wrapping_mul(31) ^ (block as u8) ^ round).collect()
}

/// Does requests one after the other.
fn transfer(running: &mut Running, queue: usize, kind: u32, blocks: std::ops::Range<u64>) {
    for block in blocks {
        offer(running, queue, kind, block);
        running.guest.kick(queue as u32);
        running.wait_used(queue, 1);
        assert_eq!(running.guest.peek(place(block) + 16, 1), [0], "Request {kind} of block {block}");
    }
}

fn write(running: &mut Running, queue: usize, blocks: std::ops::Range<u64>, round: u8) {
    for block in blocks.clone() {
        running.guest.poke(place(block) + DATA, &pattern(block, round));
    }
    transfer(running, queue, OUT, blocks);
}

fn assert_blocks(running: &mut Running, queue: usize, blocks: std::ops::Range<u64>, round: u8) {
    for block in blocks.clone() {
        running.guest.poke(place(block) + DATA, &[0; DATA as usize]);
    }
    transfer(running, queue, IN, blocks.clone());
    for block in blocks {
        assert_eq!(running.guest.peek(place(block) + DATA, DATA as usize), pattern(block, round), "Block {block}");
    }
}

#[test]
fn a_disk_keeps_what_is_written_through_death_and_reset() {
    let Some(mut daemon) = Daemon::new(storage_daemon) else { return };
    let mut running = start_disk(&daemon);
    // Its capacity, in sectors.
    assert_eq!(running.guest.read_config::<8>(0), 2048_u64.to_le_bytes());
    write(&mut running, 0, 0..20, 1);
    write(&mut running, 1, 20..40, 1);
    transfer(&mut running, 0, FLUSH_OUT, 0..1);
    running.guest.wait_interrupt(VIRTIO_MMIO_INT_VRING);
    let image = File::open(daemon.dir.path().join("image")).unwrap();
    let mut on_disk = vec![0; DATA as usize];
    for block in 0..40 {
        image.read_exact_at(&mut on_disk, block * DATA).unwrap();
        assert_eq!(on_disk, pattern(block, 1), "Block {block} in the image");
    }

    daemon.kill();
    daemon.start_again(storage_daemon);
    assert_blocks(&mut running, 1, 0..40, 1);
    write(&mut running, 0, 0..10, 2);

    // A reset goes on with the same backend; the driver begins with rings of its own.
    running.guest.set_status(0);
    let mut running = running.guest.start(FLUSH);
    assert_blocks(&mut running, 0, 0..10, 2);
    assert_blocks(&mut running, 1, 10..40, 1);
    assert_eq!(running.guest.status() & NEEDS_RESET, 0);
}

#[test]
fn requests_that_a_dead_disk_left_are_done_by_the_next() {
    let Some(mut daemon) = Daemon::new(storage_daemon) else { return };
    let mut running = start_disk(&daemon);
    write(&mut running, 0, 0..4, 1);
    // Stopped, it takes none of these; then it is gone.
    daemon.signal(libc::SIGSTOP);
    for block in 4..8 {
        running.guest.poke(place(block) + DATA, &pattern(block, 3));
        offer(&mut running, 0, OUT, block);
        running.guest.kick(0);
    }
    daemon.kill();
    daemon.start_again(storage_daemon);
    assert_eq!(running.wait_used(0, 4).len(), 4);
    assert_blocks(&mut running, 0, 4..8, 3);
    assert_blocks(&mut running, 1, 0..4, 1);
}

#[test]
fn a_parked_disk_goes_on_with_what_came_meanwhile() {
    let Some(daemon) = Daemon::new(storage_daemon) else { return };
    let mut running = start_disk(&daemon);
    for round in 1..=5 {
        write(&mut running, 0, 0..4, round);
        running.guest.transport.park();
        running.guest.poke(place(4) + DATA, &pattern(4, round));
        offer(&mut running, 0, OUT, 4);
        running.guest.kick(0);
        running.guest.transport.unpark();
        assert_eq!(running.wait_used(0, 1).len(), 1);
        assert_blocks(&mut running, 1, 0..5, round);
    }
}

#[test]
fn many_requests_at_once_are_all_done() {
    let Some(daemon) = Daemon::new(storage_daemon) else { return };
    let mut running = start_disk(&daemon);
    for round in 1..=20 {
        for block in 0..10 {
            running.guest.poke(place(block) + DATA, &pattern(block, round));
            offer(&mut running, (block % 2) as usize, OUT, block);
        }
        running.guest.kick(0);
        running.guest.kick(1);
        running.wait_used(0, 5);
        running.wait_used(1, 5);
        assert_blocks(&mut running, 0, 0..10, round);
    }
}

/// Sends a FUSE request and returns its answer's error and body.
fn fuse(running: &mut Running, opcode: Opcode, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
    const REQUEST: u64 = 0x1_0000;
    const ANSWER: u64 = 0x2_0000;
    let len = 40 + body.len() as u32;
    let header = InHeader { len, opcode: opcode as u32, unique: 5, nodeid: node, ..InHeader::default() };
    running.guest.poke(REQUEST, header.as_slice());
    running.guest.poke(REQUEST + 40, body);
    running.rings[1].offer(&[Buffer::readable(REQUEST, len), Buffer::writable(ANSWER, 0x2000)]);
    running.guest.kick(1);
    let used = running.wait_used(1, 1)[0].1 as usize;
    let bytes = running.guest.peek(ANSWER, used);
    (i32::from_le_bytes(bytes[4..8].try_into().unwrap()), bytes[16..].to_vec())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn init(running: &mut Running) {
    // FUSE 7.31, no options.
    assert_eq!(fuse(running, Opcode::Init, 0, &words(&[7, 31, 0x2_0000, 0])).0, 0);
}

/// Reads a file of the root directory.
fn read_file(running: &mut Running, name: &[u8]) -> Vec<u8> {
    let (error, entry) = fuse(running, Opcode::Lookup, 1, name);
    assert_eq!(error, 0, "{name:?}");
    let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
    let (error, opened) = fuse(running, Opcode::Open, node, &words(&[0, 0]));
    assert_eq!(error, 0);
    let (error, data) =
        fuse(running, Opcode::Read, node, &[&opened[..8], &words(&[0, 0, 4096, 0, 0, 0, 0, 0])].concat());
    assert_eq!(error, 0);
    data
}

#[test]
fn a_file_system_is_served_and_its_daemons_death_hangs_nobody() {
    let Some(mut daemon) = Daemon::new(virtiofsd) else { return };
    fs::write(daemon.dir.path().join("share/file"), "content").unwrap();
    let kind = VhostUserKind::Fs { tag: "shared".into() };
    let config = VhostUserConfig { kind, ..blk(&daemon.socket()) };
    let mut running = Guest::new(Box::new(make(config).unwrap())).start(0);
    init(&mut running);
    assert_eq!(read_file(&mut running, b"file\0"), b"content");
    // Made by the guest: CREATE, flags O_RDWR and mode 0600.
    let (error, made) = fuse(&mut running, Opcode::Create, 1, &[&words(&[2, 0o600, 0, 0])[..], b"made\0"].concat());
    assert_eq!(error, 0);
    let node = u64::from_le_bytes(made[..8].try_into().unwrap());
    let body = [&made[128..136], &words(&[0, 0, 5, 0, 0, 0, 0, 0]), b"bytes"].concat();
    assert_eq!(fuse(&mut running, Opcode::Write, node, &body).0, 0);
    assert_eq!(fs::read(daemon.dir.path().join("share/made")).unwrap(), b"bytes");

    // What the guest knew died with the daemon: the next one says so, and serves a guest that begins anew.
    daemon.kill();
    daemon.start_again(virtiofsd);
    assert!(fuse(&mut running, Opcode::Lookup, 1, b"file\0").0 < 0);
    init(&mut running);
    assert_eq!(read_file(&mut running, b"made\0"), b"bytes");
    // A reset keeps the connection, with which virtiofsd would end.
    running.guest.set_status(0);
    let mut running = running.guest.start(0);
    init(&mut running);
    assert_eq!(read_file(&mut running, b"file\0"), b"content");
}
