//! A driver that reads, writes and lies to a block device: virtio 1.2 section 5.2.

mod engines;
mod hostile;
mod limits;
mod protocol;
mod qcow2;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use seccomp::Confinement;

use super::*;
use crate::testkit::{Buffer, Guest, Running};

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const READ_ONLY: u64 = 1 << 5;
const FLUSH_FEATURE: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;
const DISCARD_FEATURE: u64 = 1 << 13;
const WRITE_ZEROES_FEATURE: u64 = 1 << 14;
/// What a driver accepts of a drive that it can write.
const ALL: u64 = FLUSH_FEATURE | DISCARD_FEATURE | WRITE_ZEROES_FEATURE;

/// Where the driver keeps its header, data and status.
const HEADER: u64 = 0x1000;
const DATA: u64 = 0x1_0000;
const STATUS: u64 = 0x2000;
/// A status byte that no device writes.
const UNTOUCHED: u8 = 0xaa;

const SECTORS: u64 = 64;

const ENGINES: [EngineKind; 3] = [EngineKind::Inline, EngineKind::Threads, EngineKind::IoUring];

/// An image whose sectors are full of their numbers.
fn file() -> File {
    let mut file = tempfile::tempfile().unwrap();
    for sector in 0..SECTORS {
        file.write_all(&[sector as u8; 512]).unwrap();
    }
    file
}

fn config(file: &File) -> BlkConfig {
    BlkConfig { serial: "disk-7".into(), ..BlkConfig::new("root", file.try_clone().unwrap()) }
}

fn device(file: &File, read_only: bool) -> Box<Blk> {
    Box::new(Blk::new(BlkConfig { read_only, ..config(file) }, Confinement::On).unwrap())
}

fn start(file: &File, read_only: bool) -> Running {
    Guest::new(device(file, read_only)).start(if read_only { FLUSH_FEATURE | READ_ONLY } else { ALL })
}

fn start_config(config: BlkConfig) -> Running {
    Guest::new(Box::new(Blk::new(config, Confinement::On).unwrap())).start(ALL)
}

fn write_header(guest: &Guest, kind: u32, sector: u64) {
    guest.poke(HEADER, &kind.to_le_bytes());
    guest.poke(HEADER + 4, &[0; 4]);
    guest.poke(HEADER + 8, &sector.to_le_bytes());
    guest.poke(STATUS, &[UNTOUCHED]);
}

/// Sends a request with `data` between header and status; returns status and used length.
fn request(running: &mut Running, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
    write_header(&running.guest, kind, sector);
    let mut buffers = vec![Buffer::readable(HEADER, 16)];
    buffers.extend(data);
    buffers.push(Buffer::writable(STATUS, 1));
    exchange(running, &buffers)
}

fn exchange(running: &mut Running, buffers: &[Buffer]) -> (u8, u32) {
    let head = running.rings[0].offer(buffers);
    running.guest.kick(0);
    let used = running.wait_used(0, 1);
    assert_eq!((used.len(), used[0].0), (1, head));
    running.guest.wait_interrupt(1);
    (running.guest.peek(STATUS, 1)[0], used[0].1)
}

/// Sends a discard or a write of zeroes with these ranges: sector, sectors, flags.
fn erase(running: &mut Running, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
    let mut bytes = Vec::new();
    for (sector, sectors, flags) in ranges {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    running.guest.poke(DATA, &bytes);
    request(running, kind, 0, &[Buffer::readable(DATA, bytes.len() as u32)]).0
}

/// The contents of a sector of the image.
fn sector(file: &File, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    file.read_exact_at(&mut bytes, sector * 512).unwrap();
    bytes
}
