//! Requests that take long, and those that do not wait for them.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use fuse_backend_rs::transport::Reader;

use super::super::engine::{Engine, Serve, SharedChain};
use super::super::pool::Pool;
use super::*;
use crate::virtio::{ActivateError, Activation};

/// Bytes of an answer that make a READ a transfer.
const LONG: u32 = 64 << 10;

/// A device whose FSYNCs last until a test lets them go. All others are answered at once with a byte.
struct Held {
    serve: Serve,
    pool: Arc<Pool>,
}

/// The test's hand on a [`Held`] device.
struct Hand {
    /// Lets one FSYNC go.
    go: Sender<()>,
    begun: Arc<AtomicU32>,
    ended: Arc<AtomicU32>,
}

fn held(workers: u16) -> (Box<Held>, Hand) {
    let (go, gate) = channel();
    let gate: Mutex<Receiver<()>> = Mutex::new(gate);
    let (begun, ended) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let hand = Hand { go, begun: Arc::clone(&begun), ended: Arc::clone(&ended) };
    let serve: Serve = Arc::new(move |chain: &SharedChain| {
        let mut request = Reader::from_descriptor_chain(chain.memory(), chain.clone()).unwrap();
        if request.read_obj::<InHeader>().unwrap().opcode == Opcode::Fsync as u32 {
            begun.fetch_add(1, Ordering::SeqCst);
            gate.lock().unwrap().recv().unwrap();
            ended.fetch_add(1, Ordering::SeqCst);
        }
        1
    });
    let pool = Arc::new(Pool::new(workers, &serve, Confinement::On).unwrap());
    (Box::new(Held { serve, pool }), hand)
}

impl VirtioDevice for Held {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[16, 16, 16]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        Ok(Box::new(Engine::new(activation, Arc::clone(&self.serve), Arc::clone(&self.pool))))
    }
}

/// Makes a request available that has room for an answer of `room` bytes, and returns its head.
fn offer(running: &mut Running, queue: usize, opcode: Opcode, room: u32) -> u16 {
    let at = REQUEST + 0x100 * opcode as u64;
    let header = InHeader { len: 40, opcode: opcode as u32, unique: 1, nodeid: 1, ..InHeader::default() };
    running.guest.poke(at, header.as_slice());
    let head = running.rings[queue].offer(&[Buffer::readable(at, 40), Buffer::writable(ANSWER, room)]);
    running.guest.kick(queue as u32);
    head
}

fn wait_begun(hand: &Hand, count: u32) {
    crate::testkit::eventually("An FSYNC in a thread", || hand.begun.load(Ordering::SeqCst) == count);
}

#[test]
fn a_slow_fsync_holds_up_nobody() {
    let (device, hand) = held(2);
    let mut running = Guest::new(device).start(0);
    let slow = offer(&mut running, 1, Opcode::Fsync, 16);
    wait_begun(&hand, 1);
    for (queue, opcode, room) in [
        (1, Opcode::Getattr, 16),
        (1, Opcode::Read, 16),
        (1, Opcode::Read, LONG),
        (2, Opcode::Write, 16),
        (0, Opcode::Forget, 16),
    ] {
        let head = offer(&mut running, queue, opcode, room);
        assert_eq!(running.wait_used(queue, 1), [(head, 1)], "{opcode:?}");
    }
    assert_eq!(hand.ended.load(Ordering::SeqCst), 0);
    hand.go.send(()).unwrap();
    assert_eq!(running.wait_used(1, 1), [(slow, 1)]);
}

#[test]
fn syncs_never_have_the_last_thread() {
    let (device, hand) = held(3);
    let mut running = Guest::new(device).start(0);
    for _ in 0..3 {
        offer(&mut running, 1, Opcode::Fsync, 16);
    }
    wait_begun(&hand, 2);
    let head = offer(&mut running, 2, Opcode::Read, LONG);
    assert_eq!(running.wait_used(2, 1), [(head, 1)]);
    assert_eq!(hand.begun.load(Ordering::SeqCst), 2);
    for _ in 0..3 {
        hand.go.send(()).unwrap();
    }
    assert_eq!(running.wait_used(1, 3).len(), 3);
}

#[test]
fn one_thread_is_for_syncs_alone() {
    let (device, hand) = held(1);
    let mut running = Guest::new(device).start(0);
    offer(&mut running, 1, Opcode::Fsync, 16);
    wait_begun(&hand, 1);
    let head = offer(&mut running, 1, Opcode::Read, LONG);
    assert_eq!(running.wait_used(1, 1), [(head, 1)]);
    hand.go.send(()).unwrap();
    running.wait_used(1, 1);
}

#[test]
fn a_reset_returns_when_nothing_is_in_flight() {
    let (device, hand) = held(2);
    let mut running = Guest::new(device).start(0);
    for _ in 0..2 {
        offer(&mut running, 1, Opcode::Fsync, 16);
    }
    wait_begun(&hand, 1);
    let ended = Arc::clone(&hand.ended);
    std::thread::scope(|scope| {
        let reset = scope.spawn(|| {
            running.guest.set_status(0);
            ended.load(Ordering::SeqCst)
        });
        hand.go.send(()).unwrap();
        hand.go.send(()).unwrap();
        assert_eq!(reset.join().unwrap(), 2);
    });
    // The device is as new.
    let mut running = running.guest.start(0);
    let head = offer(&mut running, 1, Opcode::Getattr, 16);
    assert_eq!(running.wait_used(1, 1), [(head, 1)]);
}

#[test]
fn a_broken_queue_does_not_take_the_answers_of_others() {
    let (device, hand) = held(2);
    let mut running = Guest::new(device).start(0);
    let slow = offer(&mut running, 1, Opcode::Fsync, 16);
    wait_begun(&hand, 1);
    running.rings[2].set_avail_idx(1000);
    running.guest.kick(2);
    running.guest.wait_needs_reset();
    hand.go.send(()).unwrap();
    assert_eq!(running.wait_used(1, 1), [(slow, 1)]);
}

#[test]
fn real_files_are_written_and_synced_in_threads_of_their_own() {
    let mut world = World::new();
    let (entry, handle) = world.client.create(c"file", libc::O_RDWR, 0o600).unwrap();
    let client = &mut world.client;
    let data: Vec<u8> = (0..LONG * 4).map(|index| (index % 251) as u8).collect();
    assert_eq!(client.write(entry.nodeid, handle, 5, &data), Ok(LONG * 4));
    let mut body = longs([handle]);
    body.extend(words([0, 0]));
    client.call(Opcode::Fsync, entry.nodeid, &body).unwrap();
    assert_eq!(client.read(entry.nodeid, handle, 5, LONG * 4).unwrap(), data);
}

#[test]
fn threads_end_with_the_device() {
    let done = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&done);
    struct OnDrop(Arc<AtomicBool>);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let guard = OnDrop(flag);
    let serve: Serve = Arc::new(move |_: &SharedChain| u32::from(guard.0.load(Ordering::SeqCst)));
    let pool = Pool::new(MAX_WORKERS, &serve, Confinement::On).unwrap();
    drop(serve);
    assert!(!done.load(Ordering::SeqCst));
    drop(pool);
    assert!(done.load(Ordering::SeqCst));
}
