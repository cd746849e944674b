//! The transport against drivers of all kinds: virtio 1.2 sections 2.1, 3.1 and 4.2.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use virtio_queue::{Queue, QueueT};

use super::*;
use crate::testkit::{Guest, HIGH_REGION, REGION_SIZE, Ring, eventually};
use crate::virtio::{DeviceState, RestoreError, SaveError};
use crate::{ActiveHalf, Subscriber};

const MAX_SIZES: [u16; 2] = [256, 64];
const FEATURES: u64 = 1 << 5 | 1 << 40;
const FEATURE: u64 = 1 << 5;

/// What happens to a [`Probe`], for a test to look at.
#[derive(Default)]
struct Seen {
    activations: AtomicUsize,
    resets: AtomicUsize,
    kicks: AtomicUsize,
    alive: AtomicUsize,
    acked: AtomicU64,
    config: AtomicU64,
    next_avail: AtomicUsize,
    refuse: AtomicBool,
}

/// A device that does nothing but count.
struct Probe(Arc<Seen>);

struct ActiveProbe {
    seen: Arc<Seen>,
    queues: Vec<ActiveQueue>,
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &MAX_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.0.config.load(Ordering::Relaxed).to_le_bytes();
        crate::virtio::config_space::read(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (0, Ok(value)) = (offset, data.try_into()) {
            self.0.config.store(u64::from_le_bytes(value), Ordering::Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        self.0.activations.fetch_add(1, Ordering::Relaxed);
        self.0.acked.store(activation.acked_features, Ordering::Relaxed);
        if self.0.refuse.load(Ordering::Relaxed) {
            return Err(ActivateError::QueueMissing(1));
        }
        self.0.alive.fetch_add(1, Ordering::Relaxed);
        let queues: Vec<_> = activation.queues.into_iter().flatten().collect();
        self.0.next_avail.store(queues.first().map_or(0, |first| first.queue.next_avail()).into(), Ordering::Relaxed);
        Ok(Box::new(ActiveProbe { seen: Arc::clone(&self.0), queues }))
    }

    fn reset(&mut self) {
        self.0.resets.fetch_add(1, Ordering::Relaxed);
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        DeviceState::encode(self.device_type(), &self.0.config.load(Ordering::Relaxed))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        self.0.config.store(state.decode(self.device_type())?, Ordering::Relaxed);
        Ok(())
    }
}

impl MutEventSubscriber for ActiveProbe {
    fn init(&mut self, ops: &mut EventOps) {
        for queue in &self.queues {
            ops.add(Events::new(&queue.kick, EventSet::IN)).unwrap();
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        for queue in &self.queues {
            if queue.kick.read().is_ok() {
                self.seen.kicks.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

impl ActiveHalf for ActiveProbe {
    fn park(self: Box<Self>) -> Vec<Option<Queue>> {
        // As if each queue had served three chains.
        let serve = |mut queue: Queue| {
            queue.set_next_avail(queue.next_avail().wrapping_add(3));
            queue.set_next_used(queue.next_used().wrapping_add(2));
            queue
        };
        let mut parked = *self;
        std::mem::take(&mut parked.queues).into_iter().map(|active| Some(serve(active.queue))).collect()
    }
}

impl Drop for ActiveProbe {
    fn drop(&mut self) {
        self.seen.alive.fetch_sub(1, Ordering::Relaxed);
    }
}

fn guest() -> (Guest, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    (Guest::new(Box::new(Probe(Arc::clone(&seen)))), seen)
}

fn count(counter: &AtomicUsize) -> usize {
    counter.load(Ordering::Relaxed)
}

/// Brings a device to DRIVER_OK with `ring` as its first queue and returns its status.
fn activate_with(ring: impl FnOnce(&Guest) -> Ring) -> u32 {
    let (guest, _seen) = guest();
    assert!(guest.negotiate(0));
    let ring = ring(&guest);
    guest.set_up_queue(0, &ring);
    guest.set_status(0xf)
}

#[test]
fn identity_registers_tell_a_modern_device() {
    let (guest, _) = guest();
    assert_eq!(guest.read(0x00), 0x7472_6976);
    assert_eq!(guest.read(0x04), 2);
    assert_eq!(guest.read(0x08), 42);
    assert_eq!(guest.offered_features(), FEATURES | 1 << 32);
    assert_eq!(guest.status(), 0);
}

#[test]
fn feature_words_beyond_the_second_read_zero_and_take_nothing() {
    let (guest, seen) = guest();
    guest.set_status(1);
    guest.set_status(3);
    guest.accept_features(1 << 32);
    for select in [2, 3, 0x8000_0000, u32::MAX] {
        guest.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
        assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    }
    assert_eq!(guest.set_status(0xb), 0xb);
    guest.set_status(0xf);
    assert_eq!(seen.acked.load(Ordering::Relaxed), 1 << 32);
}

#[test]
fn features_ok_needs_version_1_and_nothing_that_was_not_offered() {
    for (features, accepted) in [
        (0, false),
        (FEATURE, false),
        (1 << 32, true),
        (FEATURES | 1 << 32, true),
        (1 << 32 | 1 << 6, false),
        (1 << 32 | 1 << 63, false),
    ] {
        let (guest, _) = guest();
        guest.set_status(1);
        guest.set_status(3);
        guest.accept_features(features);
        let expected = if accepted { 0xb } else { 0x3 };
        assert_eq!(guest.set_status(0xb), expected, "{features:#x}");
    }
}

#[test]
fn a_refused_choice_of_features_can_be_made_again() {
    let (guest, _) = guest();
    assert!(!guest.negotiate(1 << 6));
    guest.accept_features(1 << 32);
    assert_eq!(guest.set_status(0xb), 0xb);
}

#[test]
fn feature_writes_outside_negotiation_are_ignored() {
    let (guest, seen) = guest();
    guest.accept_features(FEATURES);
    guest.set_status(1);
    guest.accept_features(FEATURES);
    assert!(guest.negotiate(FEATURE));
    guest.accept_features(0);
    guest.set_status(0xf);
    guest.accept_features(FEATURES);
    assert_eq!(seen.acked.load(Ordering::Relaxed), FEATURE | 1 << 32);
}

#[test]
fn a_reset_forgets_the_choice_of_features() {
    let (guest, _) = guest();
    assert!(guest.negotiate(FEATURE));
    guest.set_status(0);
    guest.set_status(1);
    guest.set_status(3);
    assert_eq!(guest.set_status(0xb), 3);
}

#[test]
fn status_bits_cannot_be_skipped_or_cleared() {
    let (guest, seen) = guest();
    for skipping in [2, 3, 4, 8, 0xb, 0xf] {
        assert_eq!(guest.set_status(skipping), 0);
    }
    assert!(guest.negotiate(0));
    for clearing in [1, 2, 3, 8, 9, 0xa] {
        assert_eq!(guest.set_status(clearing), 0xb);
    }
    assert_eq!(guest.set_status(0xf), 0xf);
    for clearing in [1, 3, 0xb] {
        assert_eq!(guest.set_status(clearing), 0xf);
    }
    assert_eq!(count(&seen.activations), 1);
    assert_eq!(count(&seen.resets), 0);
}

#[test]
fn a_selected_queue_that_does_not_exist_reads_zero_and_takes_nothing() {
    let (guest, _) = guest();
    assert!(guest.negotiate(0));
    let ring = guest.ring(0, 16);
    for select in [2, 3, 0xffff, 0x1_0000, u32::MAX] {
        guest.set_up_queue(select, &ring);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
    }
    for (select, max_size) in MAX_SIZES.into_iter().enumerate() {
        guest.write(VIRTIO_MMIO_QUEUE_SEL, select as u32);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX), u32::from(max_size));
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
    }
}

#[test]
fn queues_are_set_up_after_features_ok_and_frozen_at_driver_ok() {
    let (guest, _) = guest();
    let ring = guest.ring(0, 16);
    for status in [0, 1, 3] {
        guest.write(VIRTIO_MMIO_STATUS, status);
        guest.set_up_queue(0, &ring);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0, "status {status}");
    }
    guest.accept_features(1 << 32);
    guest.set_status(0xb);
    guest.set_up_queue(0, &ring);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 1);
    // A wrong size would be noticed at DRIVER_OK, had it been taken.
    guest.write(VIRTIO_MMIO_QUEUE_NUM, 3);
    assert_eq!(guest.set_status(0xf), 0xf);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 1);
}

#[test]
fn queue_sizes_at_the_limits() {
    for (size, accepted) in [
        (0, false),
        (1, true),
        (2, true),
        (3, false),
        (255, false),
        (256, true),
        (257, false),
        (512, false),
        (32768, false),
    ] {
        let status = activate_with(|guest| guest.ring(0, size));
        assert_eq!(status & 0x40 == 0, accepted, "size {size}");
    }
}

#[test]
fn a_queue_size_beyond_16_bits_is_not_cut_to_a_valid_one() {
    let (guest, _) = guest();
    assert!(guest.negotiate(0));
    let ring = guest.ring(0, 16);
    guest.write(VIRTIO_MMIO_QUEUE_SEL, 0);
    guest.set_up_queue(0, &ring);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 0);
    guest.write(VIRTIO_MMIO_QUEUE_NUM, 0x1_0010);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(guest.set_status(0xf), 0x4f);
}

#[test]
fn a_ready_queue_without_addresses_needs_a_reset() {
    let status = activate_with(|guest| Ring::with_parts(&guest.memory, 16, 0, 0, 0));
    assert_eq!(status, 0x4f);
}

#[test]
fn rings_must_be_in_one_region_of_memory() {
    // 16 entries: 256 bytes of descriptors, 38 of available ring, 134 of used ring.
    let end = REGION_SIZE;
    for (what, descriptors, avail, used, accepted) in [
        ("at the very end", end - 256, HIGH_REGION + REGION_SIZE - 40, end - 256 - 136, true),
        ("descriptors over the end", end - 240, 0x1000, 0x2000, false),
        ("available ring over the end", 0x1000, end - 36, 0x2000, false),
        ("used ring over the end", 0x1000, 0x2000, end - 132, false),
        ("in the hole", 0x1000, end + 0x1000, 0x2000, false),
        ("beyond memory", 0x1000, 0x2000, 1 << 40, false),
        ("wrapping", u64::MAX - 0xff, 0x1000, 0x2000, false),
        ("last address", u64::MAX - 0xf, u64::MAX - 1, u64::MAX - 3, false),
        ("overlapping", 0x1000, 0x1000, 0x1000, true),
        ("misaligned descriptors", 0x1008, 0x2000, 0x3000, false),
        ("misaligned available ring", 0x1000, 0x2001, 0x3000, false),
        ("misaligned used ring", 0x1000, 0x2000, 0x3002, false),
    ] {
        let status = activate_with(|guest| Ring::with_parts(&guest.memory, 16, descriptors, avail, used));
        assert_eq!(status & 0x40 == 0, accepted, "{what}");
    }
}

#[test]
fn a_queue_that_is_not_ready_is_handed_over_as_missing() {
    let (guest, seen) = guest();
    assert!(guest.negotiate(0));
    assert_eq!(guest.set_status(0xf), 0xf);
    assert_eq!(count(&seen.alive), 1);
}

#[test]
fn a_failed_activation_needs_a_reset_and_works_after_it() {
    let (guest, seen) = guest();
    seen.refuse.store(true, Ordering::Relaxed);
    assert!(guest.negotiate(0));
    assert_eq!(guest.set_status(0xf), 0x4f);
    assert_eq!(guest.take_interrupt(), VIRTIO_MMIO_INT_CONFIG);
    // Adding bits to what it read is what a driver does.
    assert_eq!(guest.set_status(0x4f), 0x4f);
    assert_eq!(count(&seen.activations), 1);

    seen.refuse.store(false, Ordering::Relaxed);
    assert_eq!(guest.set_status(0), 0);
    assert!(guest.negotiate(0));
    assert_eq!(guest.set_status(0xf), 0xf);
    assert_eq!(count(&seen.alive), 1);
}

#[test]
fn needs_reset_is_seen_in_every_state_and_cleared_only_by_a_reset() {
    let (guest, _) = guest();
    guest.transport.interrupt().needs_reset();
    assert_eq!(guest.status(), 0x40);
    assert_eq!(guest.set_status(1), 0x41);
    assert_eq!(guest.set_status(0x43), 0x43);
    assert_eq!(guest.set_status(0xc3), 0xc3);
    assert_eq!(guest.set_status(0), 0);
}

#[test]
fn the_active_half_is_gone_when_the_reset_returns() {
    let (guest, seen) = guest();
    let running = guest.start(0);
    let guest = running.guest;
    assert_eq!(count(&seen.alive), 1);
    guest.transport.interrupt().used_buffers();
    guest.set_status(0);
    assert_eq!((count(&seen.alive), count(&seen.resets)), (0, 1));
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    guest.write(VIRTIO_MMIO_QUEUE_SEL, 0);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn notifications_before_a_reset_are_not_delivered_after_it() {
    let (guest, seen) = guest();
    guest.kick(0);
    guest.kick(1);
    guest.set_status(0);
    let running = guest.start(0);
    running.guest.event_loop.settle();
    assert_eq!(count(&seen.kicks), 0);
}

#[test]
fn failed_stops_the_device_until_a_reset() {
    let (guest, seen) = guest();
    let guest = guest.start(0).guest;
    assert_eq!(guest.set_status(0x8f), 0x8f);
    assert_eq!(count(&seen.alive), 0);
    for status in [1, 3, 0xb, 0xf, 0x8f] {
        assert_eq!(guest.set_status(status), 0x8f);
    }
    guest.set_status(0);
    guest.start(0);
    assert_eq!(count(&seen.activations), 2);
}

#[test]
fn a_storm_of_resets_leaves_a_device_that_works() {
    let (mut guest, seen) = guest();
    for _ in 0..200 {
        guest = guest.start(FEATURES).guest;
        guest.kick(0);
        guest.set_status(0);
        assert_eq!(count(&seen.alive), 0);
    }
    let running = guest.start(0);
    let before = count(&seen.kicks);
    running.guest.kick(0);
    eventually("A kick", || count(&seen.kicks) > before);
}

#[test]
fn processors_that_fight_over_the_status_do_no_harm() {
    let (guest, seen) = guest();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..100 {
                    guest.negotiate(0);
                    guest.set_status(0xf);
                    guest.kick(0);
                    guest.set_status(0);
                }
            });
        }
    });
    guest.set_status(0);
    assert_eq!(count(&seen.alive), 0);
}

#[test]
fn a_notification_that_comes_as_an_exit_kicks_its_queue() {
    let (guest, seen) = guest();
    let guest = guest.start(0).guest;
    guest.kick(1);
    eventually("A kick", || count(&seen.kicks) == 1);
    for queue in [2, 0xffff, u32::MAX] {
        guest.kick(queue);
    }
    guest.event_loop.settle();
    assert_eq!(count(&seen.kicks), 1);
}

#[test]
fn a_kick_storm_on_an_idle_device_neither_blocks_nor_is_lost() {
    let (guest, seen) = guest();
    for _ in 0..10_000 {
        guest.kick(0);
    }
    let guest = guest.start(0).guest;
    eventually("A kick", || count(&seen.kicks) >= 1);
    guest.set_status(0);
}

#[test]
fn there_is_no_shared_memory_region_and_no_queue_reset() {
    let (guest, _) = guest();
    for select in [0, 1, u32::MAX] {
        guest.write(VIRTIO_MMIO_SHM_SEL, select);
        for register in [0xb0, 0xb4, 0xb8, 0xbc] {
            assert_eq!(guest.read(register), u32::MAX);
        }
    }
    guest.write(0xc0, 1);
    assert_eq!(guest.read(0xc0), 0);
}

#[test]
fn interrupts_are_pending_until_acknowledged() {
    let (guest, _) = guest();
    let interrupt = guest.transport.interrupt();
    let generation = guest.read(VIRTIO_MMIO_CONFIG_GENERATION);
    interrupt.used_buffers();
    interrupt.config_changed();
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    assert_ne!(guest.read(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    guest.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    guest.write(VIRTIO_MMIO_INTERRUPT_ACK, u32::MAX);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn the_configuration_space_takes_widths_1_2_4_8_from_a_driver_only() {
    let (guest, seen) = guest();
    let base = u64::from(VIRTIO_MMIO_CONFIG);
    let write = |value: u64| guest.transport.write(base, &value.to_le_bytes());
    write(1);
    guest.set_status(1);
    write(2);
    assert_eq!(seen.config.load(Ordering::Relaxed), 0);
    guest.set_status(3);
    write(0x0807_0605_0403_0201);
    assert_eq!(guest.read_config(0), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(guest.read_config(6), [7, 8, 0, 0]);
    assert_eq!(guest.read_config(3), [4, 5]);
    assert_eq!(guest.read_config(7), [8]);
    let mut odd = [0; 3];
    guest.transport.read(base, &mut odd);
    assert_eq!(odd, [0; 3]);
    guest.set_status(0x83);
    write(0);
    assert_ne!(seen.config.load(Ordering::Relaxed), 0);
}

/// Brings a guest into each of the states of the status register.
fn in_every_state(mut check: impl FnMut(&Guest, &Seen)) {
    let steps: [&[u32]; 7] =
        [&[], &[1], &[1, 3], &[1, 3, 0xb], &[1, 3, 0xb, 0xf], &[1, 3, 0xb, 0xf, 0x8f], &[1, 3, 0xb, 0xf]];
    for (index, steps) in steps.into_iter().enumerate() {
        let (guest, seen) = guest();
        for status in steps {
            if *status == 0xb {
                guest.accept_features(1 << 32);
            }
            if *status == 0xf {
                guest.set_up_queue(0, &guest.ring(0, 16));
            }
            assert_eq!(guest.set_status(*status), *status);
        }
        if index == 6 {
            guest.transport.interrupt().needs_reset();
        }
        check(&guest, &seen);
    }
}

#[test]
fn accesses_of_a_wrong_width_or_alignment_do_nothing_in_every_state() {
    in_every_state(|guest, _| {
        let status = guest.status();
        for offset in 0..CONFIG {
            for width in [0, 1, 2, 3, 4, 5, 8, 16] {
                if width == 4 && offset % 4 == 0 {
                    continue;
                }
                let mut data = vec![0; width];
                guest.transport.read(offset, &mut data);
                assert!(data.iter().all(|byte| *byte == 0), "{offset:#x} {width}");
                guest.transport.write(offset, &data);
            }
        }
        assert_eq!(guest.status(), status);
    });
}

#[test]
fn every_register_takes_any_value_in_every_state() {
    in_every_state(|guest, seen| {
        for offset in (0..WINDOW_SIZE).chain([u64::MAX, u64::MAX - 3, 1 << 32]) {
            for width in [1, 2, 4, 8] {
                for fill in [0xff, 0x80, 0x01] {
                    let mut data = vec![0; width];
                    guest.transport.read(offset, &mut data);
                    guest.transport.write(offset, &vec![fill; width]);
                }
            }
        }
        guest.set_status(0);
        assert_eq!((guest.status(), count(&seen.alive)), (0, 0));
    });
}
