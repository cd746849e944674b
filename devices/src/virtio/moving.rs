//! Devices that are parked, saved, and brought back in another machine under a driver that does not
//! notice.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use seccomp::Confinement;
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress};

use crate::BusDevice;
use crate::testkit::{Buffer, Guest, Running, eventually};
use crate::virtio::balloon::{Balloon, BalloonConfig};
use crate::virtio::blk::{Blk, BlkConfig, EngineKind};
use crate::virtio::rate_limiter::RateLimits;
use crate::virtio::rng::Rng;
use crate::virtio::state::{RestoreError, SaveError};
use crate::virtio::vsock::{Vsock, VsockConfig};
use crate::virtio::{DeviceState, VirtioDevice, WriteLog};

const DATA: u64 = 0x10_0000;
const EVENTS: usize = 2;

fn rng() -> Box<dyn VirtioDevice> {
    Box::new(Rng::new(RateLimits::default()).unwrap())
}

fn blk(sectors: u64) -> Box<dyn VirtioDevice> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(sectors * 512).unwrap();
    let config = BlkConfig::new("disk", file);
    Box::new(Blk::new(config, Confinement::On).unwrap())
}

fn vsock(guest_cid: u64) -> Box<dyn VirtioDevice> {
    Box::new(Vsock::new(VsockConfig { guest_cid, uds_path: None }).unwrap().0)
}

fn ask(running: &mut Running) -> Vec<(u16, u32)> {
    running.rings[0].offer(&[Buffer::writable(DATA, 32)]);
    running.guest.kick(0);
    running.wait_used(0, 1)
}

#[test]
fn a_device_goes_on_where_its_driver_is() {
    let mut running = Guest::new(rng()).start(0);
    for round in 0..5 {
        for _ in 0..70 {
            assert_eq!(ask(&mut running).len(), 1, "{round}");
        }
        running = running.move_to(rng());
    }
    assert_eq!(running.rings[0].used_idx(), 350);
}

#[test]
fn what_was_offered_while_the_device_was_parked_is_served_after() {
    let mut running = Guest::new(rng()).start(0);
    ask(&mut running);
    running.guest.transport.park();
    for _ in 0..3 {
        running.rings[0].offer(&[Buffer::writable(DATA, 32)]);
    }
    running.guest.event_loop.settle();
    assert_eq!(running.rings[0].used_idx(), 1);
    running.guest.transport.unpark();
    assert_eq!(running.wait_used(0, 3).len(), 3);
    // Parking twice, and letting go twice, is parking once.
    for _ in 0..2 {
        running.guest.transport.park();
        running.guest.transport.park();
        running.guest.transport.unpark();
        running.guest.transport.unpark();
        assert_eq!(ask(&mut running).len(), 1);
    }
}

/// What a driver asked for before it was saved is answered in each clone anew.
#[test]
fn clones_get_entropy_of_their_own() {
    let mut running = Guest::new(rng()).start(0);
    running.guest.transport.park();
    running.rings[0].offer(&[Buffer::writable(DATA, 32)]);
    let state = running.guest.transport.save().unwrap();
    let mut seen = std::collections::HashSet::new();
    for _ in 0..8 {
        let memory = crate::testkit::memory();
        let rings = (4 << 20, 8 << 20);
        for region in [0, rings.1] {
            memory.write_slice(&running.guest.peek(region, rings.0), GuestAddress(region)).unwrap();
        }
        let clone = Guest::with_memory(rng(), memory);
        clone.transport.restore(&state).unwrap();
        clone.transport.unpark();
        clone.wait_interrupt(VIRTIO_MMIO_INT_VRING);
        assert!(seen.insert(clone.peek(DATA, 32)), "Two clones have the same bytes");
    }
}

/// Whatever is in flight when a device is parked: nothing changes memory from then on until it goes on.
#[test]
fn nothing_touches_memory_of_a_device_that_is_parked() {
    const SECTORS: u64 = 8192;
    for engine in [EngineKind::Inline, EngineKind::Threads, EngineKind::IoUring] {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![0x5a; SECTORS as usize * 512]).unwrap();
        let device = || {
            let config = BlkConfig { engine, ..BlkConfig::new("disk", file.try_clone().unwrap()) };
            Box::new(Blk::new(config, Confinement::On).unwrap())
        };
        let mut running = Guest::new(device()).start(1 << 29);
        running.rings[0].set_used_event(u16::MAX);
        running.guest.poke(DATA, &[0; 16]);
        for turn in 0..6 {
            // Reads of 256 KiB each to places of their own.
            let requests = 10;
            for index in 0..requests {
                let data = DATA + 0x1000 + (index << 18);
                running.guest.poke(data, &[turn; 16]);
                running.rings[0].offer(&[
                    Buffer::readable(DATA, 16),
                    Buffer::writable(data, 1 << 18),
                    Buffer::writable(DATA + 16 + index, 1),
                ]);
            }
            running.guest.kick(0);
            if turn % 2 == 0 {
                running.guest.event_loop.settle();
            }
            running.guest.transport.park();
            let state = running.guest.transport.save().unwrap();
            let memory = || running.guest.peek(0, 4 << 20);
            let before = memory();
            std::thread::sleep(std::time::Duration::from_millis(10));
            assert!(memory() == before, "{engine:?} {turn}");
            assert_eq!(running.guest.transport.save().unwrap(), state);
            // Here or in another machine: each is answered once.
            running = if turn % 3 == 0 {
                running.guest.transport.unpark();
                running
            } else {
                running.move_to(device())
            };
            let used = running.wait_used(0, requests as usize);
            assert_eq!(used.len(), requests as usize);
            assert!(used.iter().all(|(_, len)| *len == (1 << 18) + 1));
            for index in 0..requests {
                assert_eq!(running.guest.peek(DATA + 0x1000 + (index << 18), 16), [0x5a; 16]);
            }
            running.guest.event_loop.settle();
            assert!(running.rings[0].take_used().is_empty(), "Nothing is answered twice");
        }
    }
}

/// EVENT_IDX: both sides keep their wishes, and the indices go on.
#[test]
fn suppression_of_notifications_moves_with_the_device() {
    let mut running = Guest::new(rng()).start(1 << 29);
    for round in 0..140 {
        running.rings[0].set_used_event(running.rings[0].used_idx());
        ask(&mut running);
        running.guest.wait_interrupt(VIRTIO_MMIO_INT_VRING);
        // The driver wants no interrupt for the next three, and gets none.
        running.rings[0].set_used_event(running.rings[0].used_idx().wrapping_add(3));
        running = running.move_to(rng());
        for _ in 0..3 {
            running.rings[0].offer(&[Buffer::writable(DATA, 32)]);
            assert!(running.rings[0].wants_kick(true), "{round}");
            running.guest.kick(0);
            running.wait_used(0, 1);
            running.guest.event_loop.settle();
        }
        assert_eq!(running.guest.take_interrupt(), 0, "{round}");
        ask(&mut running);
        running.guest.wait_interrupt(VIRTIO_MMIO_INT_VRING);
    }
}

#[test]
fn what_a_device_may_write_is_noted() {
    let memory = crate::testkit::memory();
    let log = WriteLog::new(&memory);
    log.keep();
    let mut running = Guest::logging(rng(), memory, log.clone()).start(0);
    let used = running.rings[0].used;
    let noted = |address: u64| {
        let (region, offset) = if address < 8 << 20 { (0, address) } else { (1, address - (8 << 20)) };
        let page = (offset >> 12) as usize;
        log.pages(region)[page / 64] >> (page % 64) & 1 == 1
    };
    assert!(noted(used), "The used ring from the start");
    assert!(!noted(DATA));
    running.rings[0].offer(&[Buffer::writable(DATA + 0xff0, 32), Buffer::writable(DATA + 0x5000, 8)]);
    running.guest.kick(0);
    running.wait_used(0, 1);
    for (address, written) in [(0, true), (0x1000, true), (0x2000, false), (0x5000, true), (0x6000, false)] {
        assert_eq!(noted(DATA + address), written, "{address:#x}");
    }
    // After a snapshot the used ring is noted anew, the rest when it is written again.
    running.guest.transport.park();
    log.clear();
    running.guest.transport.unpark();
    assert!(noted(used) && !noted(DATA));
}

#[test]
fn an_interrupt_that_is_pending_comes_again_in_the_other_machine() {
    let mut running = Guest::new(rng()).start(0);
    ask(&mut running);
    let mut running = running.move_to(rng());
    running.guest.wait_interrupt(VIRTIO_MMIO_INT_VRING);
    running = running.move_to(rng());
    assert_eq!(running.guest.take_interrupt(), 0);
}

#[test]
fn a_device_is_saved_in_all_its_states_and_not_while_it_works() {
    let guest = Guest::new(rng());
    let fresh = guest.transport.save().unwrap();
    assert_eq!((fresh.status, fresh.needs_reset), (0, false));
    assert!(guest.negotiate(0));
    let negotiated = guest.transport.save().unwrap();
    assert_eq!(negotiated.status, 0xb);
    let other = Guest::new(rng());
    other.transport.restore(&negotiated).unwrap();
    other.transport.unpark();
    assert_eq!(other.transport.save().unwrap(), negotiated);
    let running = guest.start(0);
    assert!(matches!(running.guest.transport.save(), Err(SaveError::Active { device_type: 4 })));
}

/// Whatever its driver does: it resets the device and brings it up again here.
#[test]
fn a_device_that_is_held_does_nothing_until_it_is_released() {
    let running = Guest::new(rng()).start(0);
    running.guest.transport.park();
    running.guest.transport.hold();
    running.guest.transport.unpark();
    let saved = || running.guest.transport.save();
    assert!(saved().is_ok(), "not active");
    running.guest.transport.reset();
    assert!(running.guest.negotiate(0));
    running.guest.set_up_queue(0, &running.rings[0]);
    running.guest.set_status(0xf);
    assert_eq!(saved().unwrap().status, 0xf);
    running.guest.transport.release();
    assert!(matches!(saved(), Err(SaveError::Active { device_type: 4 })));
    // A second time there is nothing to release.
    running.guest.transport.release();
    assert!(matches!(saved(), Err(SaveError::Active { device_type: 4 })));
}

#[test]
fn a_device_that_gave_up_stays_so_until_its_driver_resets_it() {
    let running = Guest::new(rng()).start(0);
    running.rings[0].set_avail_idx(60000);
    running.guest.kick(0);
    running.guest.wait_needs_reset();
    let running = running.move_to(rng());
    assert_eq!(running.guest.status(), 0x4f);
    running.guest.transport.reset();
    let mut running = running.guest.start(0);
    assert_eq!(ask(&mut running).len(), 1);
}

#[test]
fn a_state_that_does_not_fit_is_refused_by_name() {
    let running = Guest::new(rng()).start(0);
    running.guest.transport.park();
    let good = running.guest.transport.save().unwrap();
    let restore = |change: &dyn Fn(&mut crate::virtio::TransportState)| {
        let mut state = good.clone();
        change(&mut state);
        let other = Guest::with_memory(rng(), running.guest.memory.clone());
        other.transport.restore(&state).map_err(|error| error.to_string())
    };
    restore(&|_| {}).unwrap();
    let refused = |change: &dyn Fn(&mut crate::virtio::TransportState), words: &str| {
        let said = restore(change).unwrap_err();
        assert!(said.contains(words), "{said}");
    };
    refused(&|state| state.device_type = 2, "type 2");
    refused(&|state| state.status = 0xd, "0xd");
    refused(&|state| state.driver_features |= 1 << 50, "0x4000000000000");
    refused(&|state| state.queues.clear(), "1 queues");
    refused(&|state| state.queues[0].size = 65, "Queue 0");
    refused(&|state| state.queues[0].used = u64::MAX - 3, "Queue 0");
    refused(&|state| state.device = DeviceState::encode(4, &7_u64).unwrap(), "malformed");
    // And what is no error of the form is the driver's: the device gives up, nothing more.
    for (next_avail, next_used) in [(60_000, 0), (0, 60_000), (u16::MAX, u16::MAX)] {
        let mut state = good.clone();
        (state.queues[0].next_avail, state.queues[0].next_used) = (next_avail, next_used);
        let other = Guest::with_memory(rng(), running.guest.memory.clone());
        other.transport.restore(&state).unwrap();
        other.transport.unpark();
        other.event_loop.settle();
    }
}

#[test]
fn a_device_in_use_takes_no_state() {
    let running = Guest::new(rng()).start(0);
    running.guest.transport.park();
    let state = running.guest.transport.save().unwrap();
    let refused = running.guest.transport.restore(&state);
    assert!(matches!(refused, Err(RestoreError::InUse { device_type: 4 })), "{refused:?}");
}

#[test]
fn a_disk_answers_in_the_other_machine() {
    let mut running = Guest::new(blk(8)).start(0);
    for _ in 0..3 {
        // A read of sector 0: type, reserved, sector.
        running.guest.poke(DATA, &[0; 16]);
        let buffers =
            [Buffer::readable(DATA, 16), Buffer::writable(DATA + 0x1000, 512), Buffer::writable(DATA + 0x2000, 1)];
        running.rings[0].offer(&buffers);
        running.guest.kick(0);
        assert_eq!(running.wait_used(0, 1)[0].1, 513);
        running = running.move_to(blk(8));
    }
}

#[test]
fn a_balloon_keeps_its_size_and_the_report_that_it_holds() {
    let config = BalloonConfig::default();
    let balloon = || Balloon::new(&config, 8 << 20).unwrap();
    let mut running = Guest::new(Box::new(balloon().0)).start(1 << 1);
    running.guest.transport.write((VIRTIO_MMIO_CONFIG + 4).into(), &3_u32.to_le_bytes());
    // A report: free memory, 5 bytes.
    running.guest.poke(DATA, &[4, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    running.rings[2].offer(&[Buffer::readable(DATA, 10)]);
    running.guest.kick(2);
    running.guest.event_loop.settle();
    running.guest.event_loop.settle();
    let (other, handle) = balloon();
    let running = running.move_to(Box::new(other));
    assert_eq!(running.guest.read_config::<4>(4), [3, 0, 0, 0]);
    assert_eq!(handle.actual(), 3 << 12);
    eventually("The report", || handle.stats().is_some());
    running.guest.transport.park();
    let state = running.guest.transport.save().unwrap();
    assert_eq!((state.queues[2].next_avail, state.queues[2].next_used), (0, 0));
}

#[test]
fn a_restored_vsock_tells_its_driver_once_that_connections_are_gone() {
    let running = Guest::new(vsock(3)).start(0);
    let mut running = running.move_to(vsock(4));
    running.guest.poke(DATA, &[0xff; 8]);
    running.rings[EVENTS].offer(&[Buffer::writable(DATA, 8)]);
    running.guest.kick(2);
    assert_eq!(running.wait_used(EVENTS, 1)[0].1, 4);
    assert_eq!(running.guest.peek(DATA, 8), [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(running.guest.read_config::<8>(0), 4_u64.to_le_bytes());
    running.rings[EVENTS].offer(&[Buffer::writable(DATA, 8)]);
    running.guest.kick(2);
    running.guest.event_loop.settle();
    running.guest.event_loop.settle();
    assert!(running.rings[EVENTS].take_used().is_empty());
}

#[test]
fn a_reset_that_is_owed_survives_a_second_save() {
    let running = Guest::new(vsock(3)).start(0);
    let mut running = running.move_to(vsock(3)).move_to(vsock(3));
    running.rings[EVENTS].offer(&[Buffer::writable(DATA, 8)]);
    running.guest.kick(2);
    assert_eq!(running.wait_used(EVENTS, 1)[0].1, 4);
}

#[test]
fn a_socket_stays_connected_in_the_machine_that_was_only_parked() {
    // The driver's own tests establish connections; here, one that the host has asked for waits.
    let (vsock, connector) = Vsock::new(VsockConfig { guest_cid: 3, uds_path: None }).unwrap();
    let mut running = Guest::new(Box::new(vsock)).start(0);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let (told, outcome) = std::sync::mpsc::channel();
    let done = Box::new(move |result: Result<u32, _>| told.send(result.is_ok()).unwrap());
    connector.connect(1024, crate::virtio::vsock::HostEnd::Duplex(theirs.into()), done);
    let packet = |running: &mut Running| {
        running.rings[0].offer(&[Buffer::writable(DATA, 44), Buffer::writable(DATA + 0x1000, 64)]);
        running.guest.kick(0);
        let len = running.wait_used(0, 1)[0].1;
        (running.guest.peek(DATA, 44), len)
    };
    let park = |running: &Running| {
        running.guest.transport.park();
        running.guest.transport.save().unwrap();
        running.guest.transport.unpark();
    };
    let (request, _) = packet(&mut running);
    park(&running);
    // The answer: the same header with ends swapped, operation RESPONSE and some credit.
    let mut answer = request.clone();
    for (to, from, len) in [(0, 8, 8), (8, 0, 8), (16, 20, 4), (20, 16, 4)] {
        answer[to..to + len].copy_from_slice(&request[from..from + len]);
    }
    answer[30..32].copy_from_slice(&2_u16.to_le_bytes());
    answer[36..40].copy_from_slice(&4096_u32.to_le_bytes());
    running.guest.poke(DATA + 0x2000, &answer);
    running.rings[1].offer(&[Buffer::readable(DATA + 0x2000, 44)]);
    running.guest.kick(1);
    assert!(outcome.recv().unwrap());
    park(&running);
    ours.write_all(b"through").unwrap();
    let (header, len) = packet(&mut running);
    assert_eq!((u16::from_le_bytes([header[30], header[31]]), len), (5, 44 + 7));
    assert_eq!(running.guest.peek(DATA + 0x1000, 7), b"through");
    park(&running);
    running.guest.transport.reset();
    assert_eq!(ours.read(&mut [0]).unwrap(), 0, "The host end is closed with the connection");
}
