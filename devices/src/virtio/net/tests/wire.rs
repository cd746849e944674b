//! The engine between two rings and a socket pair: virtio 1.2 section 5.1.6.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::testkit::{Buffer, HIGH_REGION, Ring, ThreadLoop, eventually, memory};
use crate::virtio::Interrupt;
use crate::virtio::net::control::Control;
use crate::virtio::net::engine::{ControlQueue, Engine, Limiters, Pair};
use crate::virtio::net::rx::Receiver;
use crate::virtio::net::shared::{NetControl, Shared};
use crate::virtio::net::tap::Tap;
use crate::virtio::net::tx::Transmitter;
use crate::virtio::net::{ETHERNET_SIZE, HEADER_SIZE, MAX_OFFLOADED_FRAME, NetCounters};
use crate::virtio::queue::VirtQueue;
use crate::virtio::rate_limiter::{Budget, RateLimiter, RateLimits};
use crate::{EventLoop, GuestMemory};

pub const DATA: u64 = 0x10_0000;
const SIZE: u16 = 16;
pub const HEADER: usize = 12;
pub const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];

/// One pair of queues as the driver and the host see it.
pub struct PairEnds {
    pub rx: Ring,
    pub tx: Ring,
    rx_kick: EventFd,
    tx_kick: EventFd,
    pub host: UnixDatagram,
}

/// An active engine, the driver's rings and the host's end of the wire.
pub struct Wire {
    pub memory: GuestMemory,
    pub pairs: Vec<PairEnds>,
    pub control: Ring,
    control_kick: EventFd,
    pub owner: NetControl,
    pub interrupt: Interrupt,
    event_loop: ThreadLoop,
}

#[derive(Clone, Copy)]
pub struct Mode {
    pub merge: bool,
    pub offloads: bool,
    pub anti_spoof: bool,
    pub rx_limits: RateLimits,
    pub tx_limits: RateLimits,
    pub pairs: u16,
    pub acked_features: u64,
}

pub const UNLIMITED: RateLimits = RateLimits { ops: None, bytes: None };
pub const PLAIN: Mode = Mode {
    merge: false,
    offloads: false,
    anti_spoof: false,
    rx_limits: UNLIMITED,
    tx_limits: UNLIMITED,
    pairs: 1,
    acked_features: 0,
};
pub const MERGE: Mode = Mode { merge: true, ..PLAIN };

impl Wire {
    pub fn start(mode: Mode) -> Self {
        Self::start_with(mode, |_, _| {})
    }

    /// `prepare` may fill the rings of each pair before the engine looks at them.
    pub fn start_with(mode: Mode, prepare: impl Fn(&mut Ring, &mut Ring)) -> Self {
        let memory = memory();
        let mut place = HIGH_REGION;
        let mut ring = || {
            place += Ring::FOOTPRINT;
            Ring::new(&memory, place - Ring::FOOTPRINT, SIZE)
        };
        let shared = Arc::new(Shared::new(MAC).unwrap());
        let queue = |active| VirtQueue::new(active, &memory, 0);
        let max_frame = if mode.offloads { MAX_OFFLOADED_FRAME } else { HEADER_SIZE + ETHERNET_SIZE + 1500 };
        let (mut taps, mut pairs, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..mode.pairs {
            let (mut rx, mut tx) = (ring(), ring());
            let ((rx_active, rx_kick), (tx_active, tx_kick)) = (rx.activate(), tx.activate());
            prepare(&mut rx, &mut tx);
            let (host, guest) = UnixDatagram::pair().unwrap();
            guest.set_nonblocking(true).unwrap();
            host.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let tap = Arc::new(Tap::from_socket(OwnedFd::from(guest)));
            let share = || (Arc::clone(&tap), Arc::clone(&shared));
            let ((rx_tap, rx_shared), (tx_tap, tx_shared)) = (share(), share());
            pairs.push(Pair::new(
                Receiver::new(queue(rx_active), rx_tap, rx_shared, mode.merge, max_frame),
                Transmitter::new(queue(tx_active), tx_tap, tx_shared, mode.anti_spoof.then_some(MAC)),
                Arc::clone(&tap),
            ));
            taps.push(tap);
            ends.push(PairEnds { rx, tx, rx_kick, tx_kick, host });
        }
        let control = ring();
        let (control_active, control_kick) = control.activate();
        let commands = Control::new(mode.acked_features, mode.pairs);
        let control_queue = ControlQueue { queue: queue(control_active), commands };
        let limiter = |limits: RateLimits| {
            let budget = Budget::new(limits, Instant::now());
            (!limits.is_unlimited()).then(|| RateLimiter::new(Arc::new(Mutex::new(budget))).unwrap())
        };
        let limiters = Limiters { rx: limiter(mode.rx_limits), tx: limiter(mode.tx_limits) };
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let owner = NetControl::new(Arc::clone(&shared));
        shared.set_interrupt(Some(interrupt.clone()));
        let engine = Engine::new(taps, pairs, Some(control_queue), shared, limiters, interrupt.clone());
        let event_loop = ThreadLoop::start();
        event_loop.add(Box::new(engine)).unwrap();
        Self { memory, pairs: ends, control, control_kick, owner, interrupt, event_loop }
    }

    /// Gives the device `len` bytes at `addr` for a frame.
    pub fn give(&mut self, addr: u64, len: u32) -> u16 {
        self.give_to(0, addr, len)
    }

    pub fn give_to(&mut self, pair: usize, addr: u64, len: u32) -> u16 {
        let head = self.pairs[pair].rx.offer(&[Buffer::writable(addr, len)]);
        self.pairs[pair].rx_kick.write(1).unwrap();
        head
    }

    /// Gives the device a command and returns its answer.
    pub fn command(&mut self, class: u8, command: u8, data: &[u8]) -> u8 {
        let bytes = [&[class, command], data].concat();
        self.memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        self.memory.write_slice(&[0xee], GuestAddress(DATA + 0x1000)).unwrap();
        let chain = [Buffer::readable(DATA, bytes.len() as u32), Buffer::writable(DATA + 0x1000, 1)];
        self.send_command(&chain);
        let mut used = Vec::new();
        eventually("An answer", || {
            used.extend(self.control.take_used());
            !used.is_empty()
        });
        assert_eq!(used[0].1, 1);
        self.peek(DATA + 0x1000, 1)[0]
    }

    pub fn send_command(&mut self, chain: &[Buffer]) {
        self.control.offer(chain);
        self.control_kick.write(1).unwrap();
    }

    pub fn counters(&self) -> NetCounters {
        self.event_loop.settle();
        self.owner.counters()
    }

    pub fn settle(&self) {
        self.event_loop.settle();
    }

    /// Sends `frame` from the host, behind a header of zeroes.
    pub fn host_sends(&self, frame: &[u8]) {
        self.pairs[0].host.send(&[&[0; HEADER], frame].concat()).unwrap();
    }

    pub fn wait_received(&mut self, count: usize) -> Vec<(u16, u32)> {
        let mut entries = Vec::new();
        eventually("Received frames", || {
            entries.extend(self.pairs[0].rx.take_used());
            entries.len() >= count
        });
        entries
    }

    /// Sends `bytes`, header included, from the guest in one buffer and waits for its return.
    pub fn guest_sends(&mut self, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
        self.pairs[0].tx.offer(&[Buffer::readable(DATA, bytes.len() as u32)]);
        self.wait_sent(1);
    }

    pub fn wait_sent(&mut self, count: usize) {
        self.pairs[0].tx_kick.write(1).unwrap();
        let mut sent = 0;
        eventually("Sent frames", || {
            sent += self.pairs[0].tx.take_used().len();
            sent >= count
        });
    }

    pub fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    pub fn wait_needs_reset(&self) {
        eventually("DEVICE_NEEDS_RESET", || self.interrupt.reset_needed());
    }

    /// The loop sleeps: it does not spin on something that nobody takes away.
    pub fn assert_idle(&self) {
        self.event_loop.wait_rest();
    }
}

#[test]
fn a_frame_fills_one_buffer_and_says_so() {
    for mode in [PLAIN, MERGE] {
        let mut wire = Wire::start(mode);
        let head = wire.give(DATA, 2048);
        wire.memory.write_slice(&[0xff; HEADER], GuestAddress(DATA)).unwrap();
        wire.host_sends(&[7; 60]);
        assert_eq!(wire.wait_received(1), [(head, 72)]);
        assert_eq!(wire.peek(DATA, HEADER), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(wire.peek(DATA + HEADER as u64, 61), [&[7; 60][..], &[0]].concat());
        eventually("An interrupt", || wire.interrupt.pending() == 1);
    }
}

#[test]
fn a_frame_is_spread_over_merged_buffers_that_appear_at_once() {
    let mut wire = Wire::start_with(MERGE, |rx, _| {
        for index in 0..SIZE {
            rx.offer(&[Buffer::writable(DATA + u64::from(index) * 0x100, 0x100)]);
        }
    });
    let frame: Vec<u8> = (0..1000_u32).map(|index| index as u8).collect();
    wire.host_sends(&frame);
    assert_eq!(wire.wait_received(1), [(0, 256), (1, 256), (2, 256), (3, 244)]);
    assert_eq!(wire.peek(DATA + 10, 2), [4, 0]);
    assert!(wire.peek(DATA + HEADER as u64, 1000) == frame);
    wire.host_sends(&[1; 60]);
    assert_eq!(wire.wait_received(1), [(4, 72)]);
    assert_eq!(wire.peek(DATA + 0x400 + 10, 2), [1, 0]);
}

#[test]
fn the_largest_offloaded_frame_arrives_whole() {
    for merge in [false, true] {
        let mut wire = Wire::start(Mode { merge, offloads: true, ..PLAIN });
        let len = if merge { 0x2000 } else { 0x1_1000 };
        for index in 0..9 {
            wire.give(DATA + index * u64::from(len), len);
        }
        let frame = vec![9; 65535 + 18];
        wire.host_sends(&frame);
        let used: u32 = wire.wait_received(1).iter().map(|(_, len)| len).sum();
        assert_eq!(used as usize, HEADER + frame.len());
    }
}

#[test]
fn a_full_receive_ring_that_is_refilled_goes_on_without_a_new_frame() {
    let mut wire = Wire::start(PLAIN);
    for frame in 0..4_u8 {
        wire.host_sends(&[frame; 60]);
    }
    wire.assert_idle();
    for frame in 0..4_u8 {
        wire.give(DATA, 2048);
        assert_eq!(wire.wait_received(1).len(), 1, "frame {frame}");
        assert_eq!(wire.peek(DATA + HEADER as u64, 1), [frame]);
    }
    wire.assert_idle();
}

#[test]
fn a_receive_ring_that_stays_empty_leaves_the_loop_asleep() {
    let mut wire = Wire::start(MERGE);
    for _ in 0..8 {
        wire.host_sends(&[1; 60]);
    }
    wire.assert_idle();
    // The other direction is not held up.
    wire.guest_sends(&[0; 100]);
    let mut frame = [0; 200];
    assert_eq!(wire.pairs[0].host.recv(&mut frame).unwrap(), 100);
}

#[test]
fn frames_that_do_not_fit_are_dropped_and_their_buffers_stay() {
    for mode in [PLAIN, MERGE] {
        let mut wire = Wire::start(mode);
        let head = wire.give(DATA, 100);
        wire.host_sends(&[1; 100 - HEADER]);
        wire.host_sends(&[2; 1000]);
        wire.host_sends(&[3; 99 - HEADER]);
        assert_eq!(wire.wait_received(1), [(head, 99)]);
        assert_eq!(wire.peek(DATA + HEADER as u64, 1), [3]);
    }
}

#[test]
fn receive_buffers_without_room_for_a_header_come_back_empty() {
    for mode in [PLAIN, MERGE] {
        let mut wire = Wire::start(mode);
        let small = [wire.give(DATA, 0), wire.give(DATA, 1), wire.give(DATA, 11)];
        let read_only = wire.pairs[0].rx.offer(&[Buffer::readable(DATA, 2048)]);
        let head = wire.give(DATA, 2048);
        wire.host_sends(&[5; 60]);
        let expected = [small[0], small[1], small[2], read_only].map(|head| (head, 0));
        let used = wire.wait_received(5);
        assert_eq!(used[..4], expected);
        assert_eq!(used[4], (head, 72));
    }
}

#[test]
fn a_header_may_be_spread_over_descriptors() {
    let mut wire = Wire::start(PLAIN);
    wire.memory.write_slice(&[0xff; 64], GuestAddress(DATA)).unwrap();
    let head = wire.pairs[0].rx.offer(&[
        Buffer::writable(DATA, 11),
        Buffer::writable(DATA + 32, 1),
        Buffer::writable(DATA + 0x1000, 2000),
    ]);
    wire.pairs[0].rx_kick.write(1).unwrap();
    wire.host_sends(&[5; 60]);
    assert_eq!(wire.wait_received(1), [(head, 72)]);
    assert_eq!((wire.peek(DATA + 10, 1), wire.peek(DATA + 32, 2)), (vec![1], vec![0, 0xff]));
    assert_eq!(wire.peek(DATA + 0x1000, 60), [5; 60]);
}

#[test]
fn frames_leave_the_guest_from_several_buffers() {
    let mut wire = Wire::start(PLAIN);
    wire.memory.write_slice(&[0xab; 64], GuestAddress(DATA)).unwrap();
    wire.pairs[0].tx.offer(&[
        Buffer::readable(DATA, 5),
        Buffer::readable(DATA + 5, 7),
        Buffer::readable(DATA + 12, 48),
    ]);
    wire.wait_sent(1);
    let mut frame = [0; 100];
    assert_eq!(wire.pairs[0].host.recv(&mut frame).unwrap(), 60);
    assert_eq!(frame[..60], [0xab; 60]);
}

#[test]
fn sent_frames_of_impossible_lengths_are_dropped_at_the_limits() {
    let mut wire = Wire::start(PLAIN);
    let largest = HEADER + 18 + 65535;
    for (len, arrives) in [
        (0, false),
        (1, false),
        (HEADER, false),
        (HEADER + 13, false),
        (HEADER + 14, true),
        (largest, true),
        (largest + 1, false),
    ] {
        wire.guest_sends(&vec![1; len]);
        wire.pairs[0].host.set_nonblocking(true).unwrap();
        let received = wire.pairs[0].host.recv(&mut vec![0; largest + 1]);
        assert_eq!(received.ok(), arrives.then_some(len), "length {len}");
    }
}

#[test]
fn a_host_that_does_not_read_loses_frames_but_returns_buffers() {
    let mut wire = Wire::start(PLAIN);
    for _ in 0..2000 {
        wire.guest_sends(&[1; 1500]);
    }
    wire.assert_idle();
}

#[test]
fn a_storm_of_kicks_with_nothing_to_send_does_not_hold_up_frames() {
    let mut wire = Wire::start(PLAIN);
    for _ in 0..1000 {
        wire.pairs[0].tx_kick.write(1).unwrap();
        wire.pairs[0].rx_kick.write(1).unwrap();
    }
    wire.give(DATA, 2048);
    wire.host_sends(&[1; 60]);
    wire.wait_received(1);
    wire.assert_idle();
}

#[test]
fn rings_that_were_filled_before_activation_are_served_without_a_kick() {
    let mut wire = Wire::start_with(PLAIN, |rx, tx| {
        rx.offer(&[Buffer::writable(DATA, 2048)]);
        tx.offer(&[Buffer::readable(DATA + 0x1000, 100)]);
    });
    assert_eq!(wire.pairs[0].host.recv(&mut [0; 200]).unwrap(), 100);
    wire.host_sends(&[1; 60]);
    wire.wait_received(1);
}

#[test]
fn a_broken_receive_ring_stops_both_queues() {
    let mut wire = Wire::start(MERGE);
    wire.pairs[0].rx.write_descriptor(0, DATA, 2048, 3, 0);
    wire.pairs[0].rx.publish(0);
    wire.pairs[0].rx_kick.write(1).unwrap();
    wire.wait_needs_reset();
    wire.host_sends(&[1; 60]);
    wire.pairs[0].tx.offer(&[Buffer::readable(DATA, 100)]);
    wire.pairs[0].tx_kick.write(1).unwrap();
    wire.assert_idle();
    assert_eq!((wire.pairs[0].tx.used_idx(), wire.pairs[0].rx.used_idx()), (0, 0));
}

#[test]
fn a_broken_send_ring_stops_both_queues() {
    let mut wire = Wire::start(PLAIN);
    wire.pairs[0].tx.set_avail_idx(SIZE + 1);
    wire.pairs[0].tx_kick.write(1).unwrap();
    wire.wait_needs_reset();
    wire.give(DATA, 2048);
    wire.host_sends(&[1; 60]);
    wire.assert_idle();
    assert_eq!(wire.pairs[0].rx.used_idx(), 0);
}

#[test]
fn a_receive_buffer_outside_memory_needs_a_reset() {
    let mut wire = Wire::start(PLAIN);
    wire.give(1 << 40, 2048);
    wire.wait_needs_reset();
}
