//! A driver that plugs and unplugs, friendly and hostile.

mod model;
mod moving;

use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG;

use super::*;
use crate::testkit::{Buffer, Guest, Running};

const REQUEST: u64 = 0x1000;
const RESPONSE: u64 = 0x2000;
const ADDR: u64 = 1 << 32;
const BLOCK: u64 = MIN_BLOCK_SIZE;
const BLOCKS: u64 = 64;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// Memory that writes down what is done to it, and fails on request.
#[derive(Clone, Default)]
struct Recorder {
    calls: Arc<Mutex<Vec<(bool, u64, u64)>>>,
    broken: Arc<Mutex<bool>>,
}

impl Recorder {
    fn record(&self, plug: bool, offset: u64, len: u64) -> io::Result<()> {
        if *self.broken.lock().unwrap() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.calls.lock().unwrap().push((plug, offset, len));
        Ok(())
    }

    fn take(&self) -> Vec<(bool, u64, u64)> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl PluggableMemory for Recorder {
    fn plug(&self, offset: u64, len: u64) -> io::Result<()> {
        self.record(true, offset, len)
    }

    fn unplug(&self, offset: u64, len: u64) -> io::Result<()> {
        self.record(false, offset, len)
    }
}

fn config(blocks: u64, requested: u64) -> MemConfig {
    MemConfig { size: blocks * BLOCK, block_size: BLOCK, requested: requested * BLOCK, node: 0 }
}

fn start_with(blocks: u64, requested: u64) -> (Running, MemHandle, Recorder) {
    let recorder = Recorder::default();
    let (mem, handle) = Mem::new(config(blocks, requested), ADDR, Box::new(recorder.clone())).unwrap();
    (Guest::new(Box::new(mem)).start(1 << 1), handle, recorder)
}

fn start(requested: u64) -> (Running, MemHandle, Recorder) {
    start_with(BLOCKS, requested)
}

fn ask_at(running: &mut Running, kind: u16, addr: u64, blocks: u16) -> (u16, u16) {
    let mut request = [0; 24];
    request[..2].copy_from_slice(&kind.to_le_bytes());
    request[8..16].copy_from_slice(&addr.to_le_bytes());
    request[16..18].copy_from_slice(&blocks.to_le_bytes());
    running.guest.poke(REQUEST, &request);
    running.guest.poke(RESPONSE, &[0xff; 10]);
    running.rings[0].offer(&[Buffer::readable(REQUEST, 24), Buffer::writable(RESPONSE, 10)]);
    running.guest.kick(0);
    assert_eq!(running.wait_used(0, 1)[0].1, 10);
    let response = running.guest.peek(RESPONSE, 10);
    assert_eq!(response[2..8], [0; 6]);
    (u16::from_le_bytes([response[0], response[1]]), u16::from_le_bytes([response[8], response[9]]))
}

fn ask(running: &mut Running, kind: u16, block: u64, blocks: u16) -> u16 {
    ask_at(running, kind, ADDR + block * BLOCK, blocks).0
}

fn state(running: &mut Running, block: u64, blocks: u16) -> u16 {
    let (answer, state) = ask_at(running, STATE, ADDR + block * BLOCK, blocks);
    assert_eq!(answer, ACK);
    state
}

fn field(running: &Running, index: u32) -> u64 {
    u64::from_le_bytes(running.guest.read_config(8 * index))
}

#[test]
fn the_driver_learns_what_there_is() {
    let (running, handle, _) = start(4);
    let fields: Vec<u64> = (0..8).map(|index| field(&running, index)).collect();
    assert_eq!(fields, [BLOCK, 0, ADDR, BLOCKS * BLOCK, BLOCKS * BLOCK, 0, 4 * BLOCK, 0]);
    handle.set_requested(8 * BLOCK).unwrap();
    running.guest.wait_interrupt(VIRTIO_MMIO_INT_CONFIG);
    assert_eq!((field(&running, 6), handle.requested()), (8 * BLOCK, 8 * BLOCK));
}

#[test]
fn blocks_are_plugged_and_unplugged() {
    let (mut running, handle, memory) = start(8);
    assert_eq!(ask(&mut running, PLUG, 2, 4), ACK);
    assert_eq!(memory.take(), [(true, 2 * BLOCK, 4 * BLOCK)]);
    assert_eq!((handle.plugged(), field(&running, 5)), (4 * BLOCK, 4 * BLOCK));
    assert_eq!(handle.changed().read().unwrap(), 1);
    assert_eq!(
        [(2, 4), (0, 2), (0, 3), (5, 2)].map(|(at, count)| state(&mut running, at, count)),
        [PLUGGED, UNPLUGGED, MIXED, MIXED]
    );
    assert_eq!(ask(&mut running, UNPLUG, 3, 2), ACK);
    assert_eq!(memory.take(), [(false, 3 * BLOCK, 2 * BLOCK)]);
    assert_eq!(handle.plugged(), 2 * BLOCK);
    assert_eq!(state(&mut running, 2, 4), MIXED);
    assert_eq!(ask(&mut running, UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(memory.take(), [(false, 0, BLOCKS * BLOCK)]);
    assert_eq!((handle.plugged(), state(&mut running, 0, BLOCKS as u16)), (0, UNPLUGGED));
}

#[test]
fn a_guest_gets_what_it_is_to_have_and_no_block_more() {
    let (mut running, handle, memory) = start(4);
    assert_eq!(ask(&mut running, PLUG, 0, 5), NACK);
    assert_eq!(ask(&mut running, PLUG, 0, 4), ACK);
    assert_eq!(ask(&mut running, PLUG, 4, 1), NACK);
    assert_eq!(ask(&mut running, PLUG, 0, u16::MAX), ERROR);
    // Less than it has: it gives back what it can, and gets nothing meanwhile.
    handle.set_requested(BLOCK).unwrap();
    assert_eq!(ask(&mut running, PLUG, 4, 1), NACK);
    assert_eq!(ask(&mut running, UNPLUG, 0, 3), ACK);
    assert_eq!(ask(&mut running, PLUG, 0, 1), NACK);
    assert_eq!(handle.plugged(), BLOCK);
    assert_eq!(memory.take().len(), 2);
}

#[test]
fn requests_that_are_not_aligned_are_errors() {
    let (mut running, _, memory) = start(8);
    for kind in [PLUG, UNPLUG, STATE] {
        for offset in [1, 4096, BLOCK / 2, BLOCK - 1, BLOCK + 1] {
            assert_eq!(ask_at(&mut running, kind, ADDR + offset, 1).0, ERROR, "{kind} {offset}");
        }
    }
    assert_eq!(memory.take(), []);
}

#[test]
fn requests_outside_of_the_region_are_errors() {
    let (mut running, _, memory) = start(BLOCKS);
    let end = ADDR + BLOCKS * BLOCK;
    let top = u64::MAX - BLOCK + 1;
    let cases = [
        (0, 1),
        (ADDR - BLOCK, 1),
        (ADDR - BLOCK, 2),
        (end, 1),
        (end - BLOCK, 2),
        (ADDR, BLOCKS as u16 + 1),
        (ADDR, u16::MAX),
        (top, 1),
        (top, 2),
        (u64::MAX, 1),
        (ADDR, 0),
        (end, 0),
    ];
    for kind in [PLUG, UNPLUG, STATE] {
        for (addr, blocks) in cases {
            assert_eq!(ask_at(&mut running, kind, addr, blocks).0, ERROR, "{kind} {addr:#x} {blocks}");
        }
    }
    assert_eq!(memory.take(), []);
    // At the limit.
    assert_eq!(ask(&mut running, PLUG, BLOCKS - 1, 1), ACK);
}

#[test]
fn requests_that_overlap_what_was_done_before_are_errors() {
    let (mut running, handle, memory) = start(BLOCKS);
    assert_eq!(ask(&mut running, PLUG, 8, 8), ACK);
    for (at, count) in [(8, 8), (8, 1), (15, 1), (7, 2), (15, 2), (0, 32)] {
        assert_eq!(ask(&mut running, PLUG, at, count), ERROR, "{at} {count}");
    }
    for (at, count) in [(7, 1), (16, 1), (7, 2), (15, 2), (0, 32)] {
        assert_eq!(ask(&mut running, UNPLUG, at, count), ERROR, "{at} {count}");
    }
    assert_eq!((handle.plugged(), memory.take().len()), (8 * BLOCK, 1));
}

#[test]
fn requests_that_nobody_knows_are_errors() {
    let (mut running, _, memory) = start(BLOCKS);
    for kind in [4, 5, 0x100, u16::MAX] {
        assert_eq!(ask(&mut running, kind, 0, 1), ERROR);
    }
    assert_eq!(memory.take(), []);
}

#[test]
fn requests_that_are_too_short_or_have_no_place_for_the_answer_change_nothing() {
    for (request, response) in [(23, 10), (0, 10), (24, 9), (24, 0)] {
        let (mut running, handle, memory) = start(BLOCKS);
        running.guest.poke(REQUEST, &[0; 24]);
        running.guest.poke(REQUEST + 8, &ADDR.to_le_bytes());
        running.guest.poke(REQUEST + 16, &[1]);
        running.rings[0].offer(&[Buffer::readable(REQUEST, request), Buffer::writable(RESPONSE, response)]);
        running.guest.kick(0);
        running.guest.wait_needs_reset();
        assert_eq!((handle.plugged(), memory.take()), (0, vec![]), "{request} {response}");
    }
}

#[test]
fn a_host_without_memory_is_busy_and_the_books_stay_right() {
    let (mut running, handle, memory) = start(BLOCKS);
    assert_eq!(ask(&mut running, PLUG, 0, 2), ACK);
    *memory.broken.lock().unwrap() = true;
    assert_eq!(ask(&mut running, PLUG, 2, 1), BUSY);
    assert_eq!(ask(&mut running, UNPLUG, 0, 1), BUSY);
    assert_eq!(ask(&mut running, UNPLUG_ALL, 0, 0), BUSY);
    assert_eq!((handle.plugged(), state(&mut running, 0, 2)), (2 * BLOCK, PLUGGED));
    *memory.broken.lock().unwrap() = false;
    assert_eq!(ask(&mut running, PLUG, 2, 1), ACK);
}

#[test]
fn runs_are_counted_to_their_limit_and_not_one_past_it() {
    let runs = u64::from(MAX_RUNS);
    let (mut running, _, _) = start_with(2 * runs + 4, 2 * runs + 4);
    for run in 0..runs {
        assert_eq!(ask(&mut running, PLUG, 2 * run, 1), ACK, "{run}");
    }
    assert_eq!(ask(&mut running, PLUG, 2 * runs, 1), BUSY);
    // What joins two runs makes room for one; what tears a run apart needs it.
    assert_eq!(ask(&mut running, PLUG, 1, 1), ACK);
    assert_eq!(ask(&mut running, PLUG, 2 * runs, 1), ACK);
    assert_eq!(ask(&mut running, UNPLUG, 1, 1), BUSY);
    assert_eq!(ask(&mut running, UNPLUG, 0, 1), ACK);
}

#[test]
fn a_reset_leaves_the_blocks_as_they_are() {
    let (mut running, handle, memory) = start(8);
    assert_eq!(ask(&mut running, PLUG, 0, 2), ACK);
    memory.take();
    running.guest.set_status(0);
    handle.set_requested(4 * BLOCK).unwrap();
    let mut running = running.guest.start(1 << 1);
    assert_eq!((memory.take(), field(&running, 5), field(&running, 6)), (vec![], 2 * BLOCK, 4 * BLOCK));
    assert_eq!(state(&mut running, 0, 2), PLUGGED);
}

#[test]
fn sizes_are_checked_at_their_limits_and_one_past_them() {
    let make = |config, addr| Mem::new(config, addr, Box::new(Recorder::default())).map(drop);
    assert!(make(config(MAX_BLOCKS, MAX_BLOCKS), ADDR).is_ok());
    for blocks in [0, MAX_BLOCKS + 1] {
        assert!(matches!(make(config(blocks, 0), ADDR), Err(MemError::Size { .. })), "{blocks}");
    }
    let part = MemConfig { size: BLOCK + 4096, ..config(1, 0) };
    assert!(matches!(make(part, ADDR), Err(MemError::Size { .. })));
    for block_size in [0, 4096, BLOCK / 2, BLOCK + 4096, 3 * BLOCK] {
        let odd = MemConfig { block_size, ..config(12, 0) };
        assert!(matches!(make(odd, ADDR), Err(MemError::BlockSize(_))), "{block_size}");
    }
    for addr in [ADDR + 4096, u64::MAX - BLOCK + 1] {
        assert!(matches!(make(config(1, 0), addr), Err(MemError::Address { .. })), "{addr:#x}");
    }
    let (_, handle) = Mem::new(config(4, 4), ADDR, Box::new(Recorder::default())).unwrap();
    for requested in [4 * BLOCK + 1, 5 * BLOCK, 4096, u64::MAX] {
        assert!(matches!(handle.set_requested(requested), Err(MemError::Requested { .. })), "{requested}");
    }
    assert_eq!(handle.requested(), 4 * BLOCK);
}
