//! Backends that come, go and come again.

use std::os::unix::fs::MetadataExt;

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testkit::{HIGH_REGION, REGION_SIZE, Ring, eventually};

/// What a backend does when it has served a chain.
fn complete(ring: &Ring, memory: &crate::GuestMemory, head: u16) {
    let used = ring.used_idx();
    let slot = u64::from(used % ring.size);
    memory.write_obj(u64::from(head) | 1 << 32, GuestAddress(ring.used + 4 + 8 * slot)).unwrap();
    memory.write_obj(used.wrapping_add(1), GuestAddress(ring.used + 2)).unwrap();
}

fn offer(running: &mut Running) -> u16 {
    running.rings[0].offer(&[Buffer::writable(0x1000, 1)])
}

#[test]
fn a_disk_is_what_its_backend_says() {
    let backend = Backend::new(Script { features: u64::MAX, ..Script::default() });
    let device = make(VhostUserConfig { num_queues: 3, ..blk(&backend.socket()) }).unwrap();
    assert_eq!((device.device_type(), device.queue_max_sizes()), (2, &[16, 16, 16][..]));
    // Of all that it says it can do, what is known.
    let offered = device.features();
    assert_ne!(offered & FLUSH, 0);
    for unknown in [0, 11, 24, 27, 30, 33, 34, 35, 40, 63] {
        assert_eq!(offered & 1 << unknown, 0, "{unknown}");
    }
    // Limits of zero are none: segments of any size, but as many as it says.
    assert_eq!(offered & 6, 4);
    let mut config = [0; 64];
    device.read_config(0, &mut config);
    assert_eq!((config[0], &config[34..36]), (100, &[3, 0][..]));
    for offset in [59, 60, u64::MAX] {
        device.read_config(offset, &mut [0; 8]);
    }
    // Asked once, whatever the guest reads.
    assert_eq!(backend.count(0, GET_CONFIG), 1);
}

#[test]
fn file_systems_and_interfaces_know_themselves() {
    let backend = Backend::new(Script { protocol: REPLY_ACK, ..Script::default() });
    let fs = VhostUserKind::Fs { tag: "shared".into() };
    let device = make(VhostUserConfig { kind: fs, ..blk(&backend.socket()) }).unwrap();
    let mut config = [0; 44];
    device.read_config(0, &mut config);
    assert_eq!((&config[..7], &config[36..]), (&b"shared\0"[..], &[1, 0, 0, 0, 0, 0, 0, 0][..]));
    assert_eq!((device.device_type(), device.queue_max_sizes().len()), (26, 2));
    drop(device);

    let backend = Backend::new(Script { protocol: REPLY_ACK, ..Script::default() });
    let net = VhostUserKind::Net { mac: Some([2, 3, 4, 5, 6, 7]) };
    let running = start_net(VhostUserConfig { kind: net, ..blk(&backend.socket()) });
    assert_eq!(running.guest.read_config::<8>(0), [2, 3, 4, 5, 6, 7, 0, 0]);
    backend.wait_enabled(0);
    // The address is the frontend's business.
    assert_eq!(backend.states(0, SET_FEATURES), [(PROTOCOL as u32, 1)]);
}

fn start_net(config: VhostUserConfig) -> Running {
    const MAC: u64 = 1 << 5;
    Guest::new(Box::new(make(config).unwrap())).start(MAC)
}

#[test]
fn rings_memory_and_events_reach_the_backend() {
    let backend = Backend::new(Script::default());
    let mut running = start(&backend);
    backend.wait_enabled(0);
    {
        let log = backend.log.lock().unwrap();
        let table = log.iter().find(|message| message.request == SET_MEM_TABLE).unwrap();
        assert_eq!((table.word(0), table.files.len()), (2, 2));
        let region = |index: usize| u64::from_le_bytes(table.body[8 + 32 * index..][..8].try_into().unwrap());
        assert_eq!((region(0), region(1)), (0, HIGH_REGION));
        assert_eq!(table.files[0].metadata().unwrap().len(), REGION_SIZE);
    }
    assert_eq!(backend.states(0, SET_VRING_NUM), [(0, 16)]);
    assert_eq!(backend.states(0, SET_VRING_BASE), [(0, 0)]);
    assert_eq!(backend.states(0, SET_FEATURES), [((PROTOCOL | FLUSH) as u32, 1)]);

    // The guest's notification is the backend's to read, the backend's interrupt comes without this process.
    let (kick, call) = (backend.event(SET_VRING_KICK), backend.event(SET_VRING_CALL));
    running.guest.wait_interrupt(VIRTIO_MMIO_INT_VRING);
    let _ = kick.read();
    let head = offer(&mut running);
    running.guest.kick(0);
    assert_eq!(kick.read().unwrap(), 1);
    complete(&running.rings[0], &running.guest.memory, head);
    call.write(1).unwrap();
    running.guest.wait_interrupt(VIRTIO_MMIO_INT_VRING);
    assert_eq!(running.wait_used(0, 1), [(head, 1)]);
}

#[test]
fn a_backend_that_died_is_replaced_and_the_ring_resumed_where_it_was() {
    let backend = Backend::new(Script::default());
    let mut running = start(&backend);
    backend.wait_enabled(0);
    for _ in 0..3 {
        let head = offer(&mut running);
        complete(&running.rings[0], &running.guest.memory, head);
    }
    offer(&mut running);
    backend.hang_up();
    backend.wait_enabled(1);
    assert_eq!(backend.states(1, SET_VRING_BASE), [(0, 3)]);
    // It is told to look, and the driver too.
    eventually("A notification", || backend.event(SET_VRING_KICK).read().is_ok());
    running.guest.wait_interrupt(VIRTIO_MMIO_INT_VRING);
    assert_eq!(running.guest.status(), 0xf);
}

#[test]
fn what_was_not_done_in_order_is_not_guessed() {
    let backend = Backend::new(Script::default());
    let mut running = start(&backend);
    backend.wait_enabled(0);
    offer(&mut running);
    let second = offer(&mut running);
    complete(&running.rings[0], &running.guest.memory, second);
    backend.hang_up();
    running.guest.wait_needs_reset();
    // A reset begins anew.
    running.guest.set_status(0);
    let mut running = running.guest.start(FLUSH);
    eventually("Rings are enabled again", || backend.states(2, SET_VRING_BASE) == [(0, 0)]);
    offer(&mut running);
}

#[test]
fn a_backend_that_notes_what_it_begins_passes_its_notes_on() {
    let protocol = REPLY_ACK | CONFIG | MQ | INFLIGHT;
    let backend = Backend::new(Script { protocol, ..Script::default() });
    let mut running = start(&backend);
    backend.wait_enabled(0);
    offer(&mut running);
    let second = offer(&mut running);
    complete(&running.rings[0], &running.guest.memory, second);
    backend.hang_up();
    backend.wait_enabled(1);
    assert_eq!((backend.count(0, GET_INFLIGHT_FD), backend.count(1, GET_INFLIGHT_FD)), (1, 0));
    let log = backend.log.lock().unwrap();
    let notes: Vec<_> = log.iter().filter(|message| message.request == SET_INFLIGHT_FD).collect();
    assert_eq!(notes.len(), 2);
    assert_eq!(notes[0].files[0].metadata().unwrap().ino(), notes[1].files[0].metadata().unwrap().ino());
    assert_eq!(notes[0].body, notes[1].body);
}

#[test]
fn another_capacity_is_told_to_the_driver() {
    let script = Script::reacting(|message| {
        if message.connection == 0 || message.request != GET_CONFIG {
            return Reaction::Friendly;
        }
        let mut config = vec![0; 60];
        config[0] = 200;
        Reaction::Answer([&message.body[..12], &config].concat())
    });
    let backend = Backend::new(script);
    let running = start(&backend);
    backend.wait_enabled(0);
    assert_eq!(running.guest.read_config::<1>(0), [100]);
    backend.hang_up();
    running.guest.wait_interrupt(VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(running.guest.read_config::<1>(0), [200]);
}

#[test]
fn a_reset_stops_the_rings_and_keeps_the_connection() {
    let backend = Backend::new(Script::default());
    let mut running = start(&backend);
    for round in 1..=3 {
        eventually("Rings are enabled", || backend.count(0, SET_VRING_ENABLE) == round);
        running.guest.set_status(0);
        assert_eq!(backend.count(0, GET_VRING_BASE), round);
        running = running.guest.start(FLUSH);
    }
    assert!(backend.log.lock().unwrap().iter().all(|message| message.connection == 0));
    // The line is no longer lent: without a cause there is none.
    running.guest.set_status(0);
    assert_eq!(running.guest.read(virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn a_parked_device_goes_on_where_the_backend_stopped() {
    let backend = Backend::new(Script::reacting(|message| match message.request {
        GET_VRING_BASE => Reaction::Answer([0_u32.to_le_bytes(), 3_u32.to_le_bytes()].concat()),
        _ => Reaction::Friendly,
    }));
    let mut running = start(&backend);
    backend.wait_enabled(0);
    for _ in 0..3 {
        let head = offer(&mut running);
        complete(&running.rings[0], &running.guest.memory, head);
    }
    running.guest.transport.park();
    assert_eq!(backend.count(0, GET_VRING_BASE), 1);
    let refusal = running.guest.transport.save().unwrap_err();
    assert_eq!(refusal.to_string(), "The vhost-user device disk cannot be saved while another process serves it");
    running.guest.transport.unpark();
    eventually("Rings are enabled again", || backend.count(0, SET_VRING_ENABLE) == 2);
    assert_eq!(backend.states(0, SET_VRING_BASE), [(0, 0), (0, 3)]);
}

#[test]
fn a_backend_that_dies_while_its_device_is_parked_is_replaced() {
    let backend = Backend::new(Script::default());
    let mut running = start(&backend);
    backend.wait_enabled(0);
    let head = offer(&mut running);
    complete(&running.rings[0], &running.guest.memory, head);
    running.guest.transport.park();
    backend.hang_up();
    running.guest.transport.unpark();
    backend.wait_enabled(1);
    assert_eq!(backend.states(1, SET_VRING_BASE), [(0, 1)]);
    assert_eq!(running.guest.status() & NEEDS_RESET, 0);
}

#[test]
fn a_backend_that_stays_away_leaves_a_device_that_a_reset_makes_new() {
    let backend = Backend::new(Script::default());
    let socket = backend.socket();
    let patience = Patience { absence: Duration::from_millis(50), ..PATIENCE };
    let mut running = start_with(VhostUserConfig { patience, ..blk(&socket) });
    backend.wait_enabled(0);
    let dir = socket.parent().unwrap().to_owned();
    let away = dir.join("away");
    std::fs::rename(&socket, &away).unwrap();
    backend.hang_up();
    running.guest.wait_needs_reset();
    std::fs::rename(&away, &socket).unwrap();
    running.guest.set_status(0);
    running = running.guest.start(FLUSH);
    backend.wait_enabled(1);
    assert_eq!(running.guest.status() & NEEDS_RESET, 0);
}
