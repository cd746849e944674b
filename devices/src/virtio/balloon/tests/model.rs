//! Any page numbers, against what should be left.

use proptest::prelude::*;
use std::collections::BTreeSet;
use vm_memory::{Bytes, GuestAddress};

use super::super::inflate::{Inflate, runs};
use super::super::layout::Layout;
use super::super::reclaim::discard;
use super::*;
use crate::GuestMemory;
use crate::testkit::{Ring, memory};
use crate::virtio::queue::VirtQueue;

const REGION_PAGES: u32 = (REGION_SIZE / PAGE_SIZE) as u32;
const HIGH: u32 = (HIGH_REGION / PAGE_SIZE) as u32;

/// Mostly pages around the edges of memory.
fn page() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 300..340_u32,
        2 => REGION_PAGES - 4..REGION_PAGES + 4,
        2 => HIGH - 4..HIGH + 4,
        2 => HIGH + REGION_PAGES - 4..HIGH + REGION_PAGES + 4,
        1 => any::<u32>(),
    ]
}

/// The pages that the tests look at, which are those above but what is no memory.
fn watched() -> impl Iterator<Item = u32> {
    let low = 300..340;
    low.chain(REGION_PAGES - 4..REGION_PAGES).chain(HIGH..HIGH + 4).chain(HIGH + REGION_PAGES - 4..HIGH + REGION_PAGES)
}

fn at(page: u32) -> GuestAddress {
    GuestAddress(u64::from(page) * PAGE_SIZE)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn exactly_the_named_pages_that_are_memory_go(pages in prop::collection::vec(page(), 0..300)) {
        let memory = memory();
        for page in watched() {
            memory.write_obj(1_u8, at(page)).unwrap();
        }
        let mut ring = Ring::new(&memory, HIGH_REGION + 0x10_0000, 8);
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
        ring.offer(&[Buffer::readable(REQUEST, bytes.len() as u32)]);
        let mut queue = VirtQueue::new(ring.activate().0, &memory, 0);
        let mut discarded = 0;
        queue.serve(|memory, chain| {
            discarded = Inflate::default().serve(memory, chain)?;
            Ok(0)
        }).unwrap();
        let named: BTreeSet<u32> = pages.into_iter().collect();
        for page in watched() {
            let left = memory.read_obj::<u8>(at(page)).unwrap();
            prop_assert_eq!(left == 0, named.contains(&page), "page {}", page);
        }
        let in_memory = |page: &&u32| **page < REGION_PAGES || (HIGH..HIGH + REGION_PAGES).contains(*page);
        prop_assert_eq!(discarded, named.iter().filter(in_memory).count() as u64 * PAGE_SIZE);
    }

    #[test]
    fn runs_cover_the_pages_and_never_touch(mut pages in prop::collection::vec(page(), 0..100)) {
        pages.sort_unstable();
        let covered: BTreeSet<u64> = runs(&pages).flatten().collect();
        prop_assert_eq!(covered, pages.iter().map(|page| u64::from(*page)).collect());
        let runs: Vec<_> = runs(&pages).collect();
        prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
    }

    #[test]
    fn a_layout_names_each_queue_once(features in any::<u64>(), enabled in any::<[bool; 5]>()) {
        let Layout { stats, reports } = Layout::new(features, &enabled);
        let named: Vec<usize> = [stats, reports].into_iter().flatten().collect();
        let negotiated = [1, 5].into_iter().filter(|bit| features & (1 << bit) != 0).count();
        prop_assert_eq!(named.len(), negotiated);
        prop_assert!(named.windows(2).all(|pair| pair[0] < pair[1]));
        prop_assert!(named.iter().all(|index| (2..5).contains(index)));
    }

    #[test]
    fn any_report_is_read(report in prop::collection::vec(any::<u8>(), 0..700)) {
        GuestStats::parse(&report);
    }
}

#[test]
fn shared_memory_goes_back_to_the_host_too() {
    use std::os::unix::fs::MetadataExt;
    use vm_memory::FileOffset;
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(REGION_SIZE).unwrap();
    let backing = FileOffset::new(file.try_clone().unwrap(), 0);
    let memory = GuestMemory::from_ranges_with_files([(GuestAddress(0), REGION_SIZE as usize, Some(backing))]).unwrap();
    memory.write_slice(&[1; 0x10_000], GuestAddress(0)).unwrap();
    let blocks = || file.metadata().unwrap().blocks() * 512;
    let before = blocks();
    assert!(before >= 0x10_000);
    assert_eq!(discard(&memory, 0x4000..0xc000), 0x8000);
    assert_eq!(before - blocks(), 0x8000);
    let mut left = [0; 0x10_000];
    memory.read_slice(&mut left, GuestAddress(0)).unwrap();
    assert!(left[..0x4000].iter().chain(&left[0xc000..]).all(|byte| *byte == 1));
    assert!(left[0x4000..0xc000].iter().all(|byte| *byte == 0));
}

#[test]
fn a_range_at_the_end_of_the_address_space_is_no_memory() {
    let memory = memory();
    for range in [u64::MAX..u64::MAX, 0..0, 1..PAGE_SIZE, u64::MAX - 1..u64::MAX] {
        assert_eq!(discard(&memory, range), 0);
    }
    assert_eq!(discard(&memory, 0..u64::MAX), 2 * REGION_SIZE);
}
