//! A region of which nothing is plugged moves with its driver.

use super::*;
use crate::virtio::{DeviceState, TransportState, VirtioDevice};

fn mem(config: MemConfig, addr: u64) -> (Box<dyn VirtioDevice>, MemHandle) {
    let (mem, handle) = Mem::new(config, addr, Box::new(Recorder::default())).unwrap();
    (Box::new(mem), handle)
}

fn saved(running: &Running) -> Result<TransportState, String> {
    running.guest.transport.park();
    let saved = running.guest.transport.save().map_err(|error| error.to_string());
    running.guest.transport.unpark();
    saved
}

#[test]
fn a_driver_that_moved_plugs_as_before() {
    let (running, handle, _) = start(0);
    handle.set_requested(BLOCK).unwrap();
    handle.set_requested(0).unwrap();
    running.guest.take_interrupt();
    let (device, handle) = mem(config(BLOCKS, 0), ADDR);
    let mut running = running.move_to(device);
    assert_eq!(running.guest.take_interrupt(), 0);
    assert_eq!((ask(&mut running, PLUG, 0, 1), field(&running, 5)), (NACK, 0));
    handle.set_requested(4 * BLOCK).unwrap();
    running.guest.wait_interrupt(VIRTIO_MMIO_INT_CONFIG);
    assert_eq!((ask(&mut running, PLUG, 2, 4), handle.plugged()), (ACK, 4 * BLOCK));
}

/// It was told 0 before it was saved, and looks again only when it is told to.
#[test]
fn a_driver_that_moved_is_told_of_what_is_wanted_already() {
    let (running, ..) = start(0);
    let (device, _) = mem(config(BLOCKS, 4), ADDR);
    let running = running.move_to(device);
    running.guest.wait_interrupt(VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(field(&running, 6), 4 * BLOCK);
    // Once is enough.
    running.guest.transport.park();
    running.guest.transport.unpark();
    assert_eq!(running.guest.take_interrupt(), 0);
}

#[test]
fn memory_that_is_plugged_or_wanted_is_not_saved() {
    let (mut running, handle, _) = start(2);
    let wanted = "The pluggable memory cannot be saved while the guest is asked to have some of it";
    assert_eq!(saved(&running).unwrap_err(), wanted);
    assert_eq!(ask(&mut running, PLUG, 0, 1), ACK);
    handle.set_requested(0).unwrap();
    let plugged = "The pluggable memory cannot be saved while the guest has some of it";
    assert_eq!(saved(&running).unwrap_err(), plugged);
    assert_eq!(ask(&mut running, UNPLUG, 0, 1), ACK);
    saved(&running).unwrap();
}

#[test]
fn another_region_is_refused_by_what_differs() {
    let (running, ..) = start(0);
    let state = saved(&running).unwrap();
    let restore = |config, addr, state: &TransportState| {
        let other = Guest::with_memory(mem(config, addr).0, running.guest.memory.clone());
        other.transport.restore(state).map_err(|error| error.to_string())
    };
    restore(config(BLOCKS, 0), ADDR, &state).unwrap();
    let whole = config(BLOCKS, 0);
    for (config, addr, words) in [
        (config(BLOCKS + 1, 0), ADDR, "136314880 bytes, the one in the snapshot has 134217728"),
        (whole, ADDR << 1, "8589934592 as its address, the one in the snapshot has 4294967296"),
        (MemConfig { block_size: 2 * BLOCK, ..whole }, ADDR, "4194304 as the size of its blocks"),
        (MemConfig { node: 1, ..whole }, ADDR, "has 1 as its NUMA node"),
    ] {
        let said = restore(config, addr, &state).unwrap_err();
        assert!(said.contains(words), "{said}");
    }
    // What a state file says decides nothing but this.
    for lie in [DeviceState::nothing(), DeviceState::encode(24, &(u64::MAX, u64::MAX, u64::MAX, u16::MAX)).unwrap()] {
        restore(whole, ADDR, &TransportState { device: lie, ..state.clone() }).unwrap_err();
    }
}
