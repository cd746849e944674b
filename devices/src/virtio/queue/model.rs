//! Chains, buffers and indices against models of what the specification says, on any numbers.

use proptest::prelude::*;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

use super::*;
use crate::testkit::{Buffer, HIGH_REGION, REGION_SIZE, Ring, memory};

const SIZE: u16 = 8;
const RING: u64 = 0x1_0000;
const TABLE: u64 = 0x2_0000;
const DATA: u64 = 0x10_0000;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

#[derive(Clone, Copy, Debug)]
struct Entry {
    addr: u64,
    len: u32,
    flags: u32,
    next: u16,
}

const ZEROS: [Entry; 1] = [Entry { addr: 0, len: 0, flags: 0, next: 0 }];

impl Entry {
    fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

fn entry() -> impl Strategy<Value = Entry> {
    let addr = prop_oneof![
        8 => (0..4_u64).prop_map(|page| DATA + 0x1000 * page),
        2 => Just(TABLE),
        1 => prop::sample::select(vec![REGION_SIZE - 8, REGION_SIZE, HIGH_REGION - 1, u64::MAX - 15, u64::MAX]),
    ];
    let len = prop_oneof![4 => 0..64_u32, 4 => (0..12_u32).prop_map(|count| 16 * count), 1 => any::<u32>()];
    (addr, len, 0..8_u32, 0..SIZE + 1).prop_map(|(addr, len, flags, next)| Entry { addr, len, flags, next })
}

/// Entries that mostly lead to the next one.
fn table() -> impl Strategy<Value = Vec<Entry>> {
    prop::collection::vec((entry(), 0..4), usize::from(SIZE)).prop_map(|entries| {
        let straight = |(index, (entry, odd)): (u16, (Entry, i32))| match odd {
            0 => entry,
            _ => Entry { next: index + 1, flags: entry.flags & !VRING_DESC_F_INDIRECT, ..entry },
        };
        (0..).zip(entries).map(straight).collect()
    })
}

/// What a chain is: the buffers to read, and those to write. `None` is a mistake of the driver.
type Expected = Option<(Vec<(u64, u32)>, Vec<(u64, u32)>)>;

fn is_memory(addr: u64, len: u32) -> bool {
    let end = addr.checked_add(len.into());
    let within = |start: u64| addr >= start && end.is_some_and(|end| end <= start + REGION_SIZE);
    len == 0 || within(0) || within(HIGH_REGION)
}

/// Section 2.7.5 word for word: follow the chain, count what was seen.
fn follow(direct: &[Entry], referred: &[Entry], head: u16, indirect: bool) -> Expected {
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    let (mut entries, mut index, mut inside, mut seen) = (direct, usize::from(head), false, 0);
    loop {
        let entry = entries.get(index)?;
        if entry.has(VRING_DESC_F_INDIRECT) {
            let count = entry.len as usize / 16;
            let is_table = entry.len % 16 == 0 && (1..=usize::from(SIZE)).contains(&count);
            if !indirect || inside || entry.has(VRING_DESC_F_NEXT) || !is_table {
                return None;
            }
            if !is_memory(entry.addr, 16) {
                return None;
            }
            // There is nothing but zeros anywhere else.
            entries = if entry.addr == TABLE { &referred[..count] } else { &ZEROS };
            (index, inside) = (0, true);
            continue;
        }
        seen += 1;
        if seen > usize::from(SIZE) || !is_memory(entry.addr, entry.len) {
            return None;
        }
        match entry.has(VRING_DESC_F_WRITE) {
            true => writable.push((entry.addr, entry.len)),
            false if writable.is_empty() => readable.push((entry.addr, entry.len)),
            false => return None,
        }
        if !entry.has(VRING_DESC_F_NEXT) {
            return Some((readable, writable));
        }
        index = entry.next.into();
    }
}

fn ranges(segments: Segments<'_>) -> Vec<(u64, u32)> {
    segments.ranges().map(|(addr, len)| (addr.0, len)).collect()
}

fn not_empty(buffers: Vec<(u64, u32)>) -> Vec<(u64, u32)> {
    buffers.into_iter().filter(|(_, len)| *len > 0).collect()
}

/// A chain of buffers of these lengths, each behind the other with a gap of a byte.
fn chain_of(lens: &[u32]) -> (VirtQueue, Chain) {
    let memory = memory();
    let mut ring = Ring::new(&memory, RING, 64);
    let mut addr = DATA;
    let mut buffers = Vec::new();
    for len in lens {
        buffers.push(Buffer::writable(addr, *len));
        addr += u64::from(*len) + 1;
    }
    ring.offer(&buffers);
    let mut queue = VirtQueue::new(ring.activate().0, &memory, 0);
    let chain = queue.pop().unwrap().unwrap();
    (queue, chain)
}

fn lens() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(0..40_u32, 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_chain_is_what_its_descriptors_say(
        direct in table(),
        referred in table(),
        head in 0..SIZE + 1,
        indirect in any::<bool>(),
    ) {
        let memory = memory();
        let mut ring = Ring::new(&memory, RING, SIZE);
        let second = Ring::with_parts(&memory, SIZE, TABLE, 0, 0);
        for (table, entries) in [(&ring, &direct), (&second, &referred)] {
            for (index, entry) in (0..).zip(entries) {
                table.write_descriptor(index, entry.addr, entry.len, entry.flags, entry.next);
            }
        }
        ring.publish(head);
        let features = if indirect { INDIRECT } else { 0 };
        let mut queue = VirtQueue::new(ring.activate().0, &memory, features);
        let found = queue.pop().ok().flatten().map(|chain| (ranges(chain.readable()), ranges(chain.writable())));
        let expected = follow(&direct, &referred, head, indirect);
        let expected = expected.map(|(readable, writable)| (not_empty(readable), not_empty(writable)));
        prop_assert_eq!(found, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn parts_of_a_run_are_the_run(lens in lens(), cuts in prop::collection::vec(0..900_u32, 0..6)) {
        let (queue, chain) = chain_of(&lens);
        let memory = queue.memory();
        let total: u32 = lens.iter().sum();
        let bytes: Vec<u8> = (0..total).map(|index| index as u8).collect();
        prop_assert_eq!(chain.writable().len(), total);
        prop_assert_eq!(chain.writable().write(memory, &bytes).unwrap(), bytes.len());
        let (mut rest, mut read) = (chain.writable(), Vec::new());
        for cut in cuts {
            prop_assert_eq!(rest.split_at(cut).is_some(), cut <= rest.len());
            let Some((part, behind)) = rest.split_at(cut) else { continue };
            prop_assert_eq!(part.len() + behind.len(), rest.len());
            prop_assert_eq!(part.buffers(memory).unwrap().len(), part.len() as usize);
            let mut copy = vec![0; part.len() as usize];
            prop_assert_eq!(part.read(memory, &mut copy).unwrap(), copy.len());
            read.extend(copy);
            rest = behind;
        }
        let mut copy = vec![0; rest.len() as usize + 1];
        prop_assert_eq!(rest.read(memory, &mut copy).unwrap(), rest.len() as usize);
        read.extend(&copy[..rest.len() as usize]);
        prop_assert_eq!(read, bytes);
        // The bytes between the buffers are nobody's.
        let mut addr = DATA;
        for len in lens {
            addr += u64::from(len);
            prop_assert_eq!(memory.read_obj::<u8>(GuestAddress(addr)).unwrap(), 0);
            addr += 1;
        }
    }

    #[test]
    fn held_buffers_that_were_moved_on_by_any_steps_are_what_is_left(
        lens in lens(),
        steps in prop::collection::vec(0..200_usize, 0..8),
    ) {
        let (queue, chain) = chain_of(&lens);
        let total: u32 = lens.iter().sum();
        let bytes: Vec<u8> = (0..total).map(|index| index as u8).collect();
        let mut held = chain.writable().held_buffers(queue.memory()).unwrap();
        held.copy_from(&bytes);
        let mut done = 0;
        for step in steps {
            held.advance(step);
            done = bytes.len().min(done + step);
            let mut copy = vec![0; bytes.len() + 1];
            let count = held.copy_to(&mut copy);
            prop_assert_eq!(&copy[..count], &bytes[done..]);
            let (_, vectors) = held.next_call();
            prop_assert_eq!(vectors == 0, count == 0);
        }
    }

    #[test]
    fn used_entries_are_where_the_driver_looks(
        start in any::<u16>(),
        batches in prop::collection::vec((any::<bool>(), 1..4_u16), 1..12),
    ) {
        let memory = memory();
        let mut ring = Ring::new(&memory, RING, SIZE);
        let (mut active, _) = ring.activate();
        ring.start_at(&mut active, start);
        let mut queue = VirtQueue::new(active, &memory, 0);
        let mut len = 0;
        for (together, count) in batches {
            let mut expected = Vec::new();
            let mut chains = Vec::new();
            for _ in 0..count {
                len += 1;
                let head = ring.offer(&[Buffer::writable(DATA, len)]);
                expected.push((head, len));
                chains.push((queue.pop().unwrap().unwrap(), len));
            }
            if together {
                queue.add_used_together(chains).unwrap();
            } else {
                chains.into_iter().try_for_each(|(chain, len)| queue.add_used(chain, len)).unwrap();
            }
            prop_assert_eq!(ring.take_used(), expected);
            prop_assert!(queue.pop().unwrap().is_none());
        }
    }

    /// `vring_need_event` of section 2.7.7.2, by counting instead of by subtracting.
    #[test]
    fn an_interrupt_is_due_when_the_event_is_among_what_was_added(
        start in any::<u16>(),
        added in 0..=SIZE,
        ahead in 0..20_u16,
    ) {
        let memory = memory();
        let mut ring = Ring::new(&memory, RING, SIZE);
        let (mut active, _) = ring.activate();
        ring.start_at(&mut active, start);
        let mut queue = VirtQueue::new(active, &memory, EVENT_IDX);
        let event = start.wrapping_sub(4).wrapping_add(ahead);
        ring.set_used_event(event);
        for _ in 0..added {
            ring.offer(&[Buffer::writable(DATA, 1)]);
            let chain = queue.pop().unwrap().unwrap();
            queue.add_used(chain, 0).unwrap();
        }
        let due = (0..added).any(|index| start.wrapping_add(index) == event);
        prop_assert_eq!(queue.needs_notification().unwrap(), due);
        prop_assert!(!queue.needs_notification().unwrap());
    }
}
