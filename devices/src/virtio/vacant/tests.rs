//! Devices that come and go under a driver that stays: the driver's rings go on as if nothing had happened.

use std::fs::File;
use std::os::unix::fs::FileExt;

use seccomp::Confinement;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG;

use super::*;
use crate::testkit::{Buffer, Guest, Running};
use crate::virtio::ReplaceError;
use crate::virtio::blk::{Blk, BlkConfig};
use crate::virtio::rate_limiter::RateLimits;
use crate::virtio::rng::Rng;

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x10_1000;
const STATUS: u64 = 0x10_2000;
const SECTOR: usize = 512;

fn vacant() -> Box<dyn VirtioDevice> {
    Box::new(Vacant::blk(&[256]))
}

/// A drive of so many sectors, and its file.
fn drive(sectors: u64) -> (Box<dyn VirtioDevice>, File) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(sectors * SECTOR as u64).unwrap();
    let config = BlkConfig::new("d", file.try_clone().unwrap());
    (Box::new(Blk::new(config, Confinement::Off).unwrap()), file)
}

fn request(running: &mut Running, kind: u32, sector: u64) -> u8 {
    offer(running, kind, sector);
    running.guest.kick(0);
    assert_eq!(running.wait_used(0, 1).len(), 1);
    running.guest.peek(STATUS, 1)[0]
}

fn offer(running: &mut Running, kind: u32, sector: u64) {
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    running.guest.poke(HEADER, &header);
    running.guest.poke(STATUS, &[0xff]);
    let data = Buffer { addr: DATA, len: SECTOR as u32, writable: kind == VIRTIO_BLK_T_IN };
    running.rings[0].offer(&[Buffer::readable(HEADER, 16), data, Buffer::writable(STATUS, 1)]);
}

fn capacity(running: &Running) -> u64 {
    u64::from_le_bytes(running.guest.read_config(0))
}

#[test]
fn drives_come_and_go_ten_times_and_each_keeps_its_own_data() {
    let mut running = Guest::new(vacant()).start(1 << VIRTIO_BLK_F_FLUSH);
    let mut files = Vec::new();
    for round in 0..10_u8 {
        assert_eq!(capacity(&running), 0);
        assert_eq!(u32::from(request(&mut running, VIRTIO_BLK_T_IN, 0)), VIRTIO_BLK_S_IOERR);

        let sectors = 8 + u64::from(round);
        let (device, file) = drive(sectors);
        running.guest.transport.replace(device).unwrap();
        running.guest.wait_interrupt(VIRTIO_MMIO_INT_CONFIG);
        assert_eq!(capacity(&running), sectors);
        running.guest.poke(DATA, &[round + 1; SECTOR]);
        assert_eq!(u32::from(request(&mut running, VIRTIO_BLK_T_OUT, sectors - 1)), VIRTIO_BLK_S_OK);
        running.guest.poke(DATA, &[0; SECTOR]);
        assert_eq!(u32::from(request(&mut running, VIRTIO_BLK_T_IN, sectors - 1)), VIRTIO_BLK_S_OK);
        assert_eq!(running.guest.peek(DATA, SECTOR), [round + 1; SECTOR]);
        assert_eq!(u32::from(request(&mut running, VIRTIO_BLK_T_IN, sectors)), VIRTIO_BLK_S_IOERR);

        running.guest.transport.replace(vacant()).unwrap();
        running.guest.wait_interrupt(VIRTIO_MMIO_INT_CONFIG);
        files.push(file);
    }
    for (round, file) in (0..).zip(files) {
        let mut bytes = [0; SECTOR];
        file.read_exact_at(&mut bytes, (7 + u64::from(round)) * SECTOR as u64).unwrap();
        assert_eq!(bytes, [round + 1; SECTOR]);
    }
}

#[test]
fn requests_that_nobody_has_begun_are_for_the_device_that_comes() {
    let mut running = Guest::new(vacant()).start(0);
    let (device, file) = drive(8);
    file.write_all_at(&[7; SECTOR], 0).unwrap();
    // Offered, but the driver has not told.
    offer(&mut running, VIRTIO_BLK_T_IN, 0);
    running.guest.transport.replace(device).unwrap();
    running.wait_used(0, 1);
    assert_eq!(u32::from(running.guest.peek(STATUS, 1)[0]), VIRTIO_BLK_S_OK);
    assert_eq!(running.guest.peek(DATA, SECTOR), [7; SECTOR]);
}

#[test]
fn a_driver_that_comes_later_finds_the_device_that_is_there() {
    let guest = Guest::new(vacant());
    let (device, _file) = drive(16);
    guest.transport.replace(device).unwrap();
    assert_eq!(guest.take_interrupt(), 0, "Nobody is there to be told");
    let mut running = guest.start(0);
    assert_eq!(capacity(&running), 16);
    assert_eq!(u32::from(request(&mut running, VIRTIO_BLK_T_IN, 15)), VIRTIO_BLK_S_OK);
    running.guest.transport.replace(vacant()).unwrap();
    running.guest.transport.reset();
    assert_eq!(capacity(&running), 0);
}

#[test]
fn what_does_not_fit_leaves_the_old_device_at_work() {
    let (device, _file) = drive(8);
    let mut running = Guest::new(device).start(0);
    let refuse = |device: Box<dyn VirtioDevice>| running.guest.transport.replace(device).unwrap_err();
    assert!(matches!(
        refuse(Box::new(Rng::new(RateLimits::default()).unwrap())),
        ReplaceError::Type { old: 2, new: 4 }
    ));
    assert!(matches!(refuse(Box::new(Vacant::blk(&[256, 256]))), ReplaceError::Queues { .. }));
    let mut incapable = Vacant::blk(&[256]);
    incapable.features = 0;
    let event_idx = RING_FEATURES;
    assert_eq!(u32::from(request(&mut running, VIRTIO_BLK_T_IN, 0)), VIRTIO_BLK_S_OK);

    let running = Guest::new(vacant()).start(event_idx);
    let error = running.guest.transport.replace(Box::new(incapable)).unwrap_err();
    assert!(matches!(error, ReplaceError::RingFeatures(missing) if missing == event_idx));
}

#[test]
fn a_vacant_interface_loses_frames_and_keeps_buffers() {
    let mut running = Guest::new(Box::new(Vacant::net(&[256, 256]))).start(0);
    running.rings[0].offer(&[Buffer::writable(DATA, 1526)]);
    running.guest.kick(0);
    running.rings[1].offer(&[Buffer::readable(DATA, 64)]);
    running.guest.kick(1);
    assert_eq!(running.wait_used(1, 1).len(), 1);
    running.guest.event_loop.settle();
    assert_eq!(running.rings[0].used_idx(), 0);
}

#[test]
fn a_request_without_a_place_for_its_status_needs_a_reset() {
    let mut running = Guest::new(vacant()).start(0);
    running.rings[0].offer(&[Buffer::readable(HEADER, 16)]);
    running.guest.kick(0);
    running.guest.wait_needs_reset();
}
