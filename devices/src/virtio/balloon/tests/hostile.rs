//! A driver that lies about its pages.

use super::*;
use crate::testkit::Meanwhile;

#[test]
fn pages_outside_of_memory_are_passed_over() {
    let (mut running, _) = start(0);
    fill(&running, REGION_SIZE - PAGE_SIZE, 1);
    fill(&running, HIGH_REGION + 0x10_0000, 1);
    let end = pfn(HIGH_REGION + REGION_SIZE);
    // Past the end, in the hole where devices are, at the last page number that there is; and one
    // that is memory.
    let hole = pfn(REGION_SIZE);
    inflate(&mut running, &[end, end + 1, hole, hole + 7, u32::MAX, u32::MAX - 1, pfn(HIGH_REGION + 0x10_0000)]);
    assert!(is_gone(&running, HIGH_REGION + 0x10_0000));
    assert!(!is_gone(&running, REGION_SIZE - PAGE_SIZE));
}

#[test]
fn a_run_over_the_hole_is_cut_at_its_edges() {
    let (mut running, _) = start(0);
    fill(&running, REGION_SIZE - 2 * PAGE_SIZE, 2);
    let last = pfn(REGION_SIZE) - 1;
    let pages: Vec<u32> = (last..last + 100).collect();
    inflate(&mut running, &pages);
    assert_eq!(gone(&running, REGION_SIZE - 2 * PAGE_SIZE, 2), [false, true]);
}

#[test]
fn a_page_that_is_named_again_and_again_goes_once() {
    let (mut running, _) = start(0);
    fill(&running, PAGES, 2);
    let page = pfn(PAGES);
    inflate(&mut running, &[page; 256]);
    inflate(&mut running, &[page; 256]);
    assert_eq!(gone(&running, PAGES, 2), [true, false]);
}

#[test]
fn a_request_that_is_no_list_of_pages_is_given_back() {
    let (mut running, _) = start(0);
    fill(&running, PAGES, 1);
    let number = pfn(PAGES).to_le_bytes();
    for len in 0..4 {
        send(&mut running, INFLATE, &number[..len]);
        assert!(!is_gone(&running, PAGES), "{len} bytes");
    }
    // Writable only: nothing to read.
    running.rings[INFLATE].offer(&[Buffer::writable(REQUEST, 64)]);
    running.guest.kick(0);
    running.wait_used(INFLATE, 1);
    // A number and a half, and a number split over two buffers.
    send(&mut running, INFLATE, &[&number[..], &number[..2]].concat());
    assert!(is_gone(&running, PAGES));
    fill(&running, PAGES, 1);
    running.guest.poke(REQUEST, &number[..1]);
    running.guest.poke(REQUEST + 0x100, &number[1..]);
    running.rings[INFLATE].offer(&[Buffer::readable(REQUEST, 1), Buffer::readable(REQUEST + 0x100, 3)]);
    running.guest.kick(0);
    running.wait_used(INFLATE, 1);
    assert!(is_gone(&running, PAGES));
}

#[test]
fn pages_are_served_up_to_their_limit_and_not_one_past_it() {
    let (mut running, _) = start(0);
    fill(&running, PAGES, 2);
    let page = pfn(PAGES);
    for (filler, served) in [(MAX_PAGES_PER_REQUEST - 2, true), (MAX_PAGES_PER_REQUEST - 1, false)] {
        fill(&running, PAGES, 2);
        let mut pages = vec![u32::MAX; filler];
        pages.extend([page, page + 1]);
        inflate(&mut running, &pages);
        assert_eq!(gone(&running, PAGES, 2), [true, served], "{filler}");
    }
}

#[test]
fn a_list_as_large_as_memory_costs_no_more_than_the_limit() {
    let (mut running, _) = start(0);
    fill(&running, PAGES, 1);
    // All of the first region as page numbers: zeros, and page 256 behind the limit.
    running.guest.poke(0x20_0000, &pfn(PAGES).to_le_bytes());
    running.rings[INFLATE].offer(&[Buffer::readable(0, REGION_SIZE as u32)]);
    running.guest.kick(0);
    running.wait_used(INFLATE, 1);
    assert!(!is_gone(&running, PAGES));
}

#[test]
fn a_flood_of_requests_leaves_the_loop_to_others() {
    let (mut running, _) = start(0);
    running.guest.poke(REQUEST, &[0xff; 4096]);
    for _ in 0..5 {
        for _ in 0..128 {
            running.rings[INFLATE].offer(&[Buffer::readable(REQUEST, 4096)]);
        }
        running.guest.kick(0);
        running.guest.event_loop.settle();
        running.wait_used(INFLATE, 128);
    }
}

#[test]
fn reports_that_are_not_whole_pages_take_whole_pages_only() {
    let (mut running, _) = start(STATS | REPORTING);
    let queue = 4;
    fill(&running, PAGES, 6);
    let buffers = [
        Buffer::writable(PAGES + 1, 0xfff),
        Buffer::writable(PAGES + 0x1001, 0x1fff),
        Buffer::writable(PAGES + 0x3fff, 0x1002),
        Buffer::writable(PAGES + 0x5000, 0),
    ];
    running.rings[queue].offer(&buffers);
    running.guest.kick(queue as u32);
    running.wait_used(queue, 1);
    assert_eq!(gone(&running, PAGES, 6), [false, false, true, false, true, false]);
    // What the device may only read is not given back.
    running.rings[queue].offer(&[Buffer::readable(PAGES, 0x1000)]);
    running.guest.kick(queue as u32);
    running.wait_used(queue, 1);
    assert!(!is_gone(&running, PAGES));
}

#[test]
fn a_report_outside_of_memory_needs_a_reset() {
    let (mut running, _) = start(STATS | REPORTING);
    running.rings[4].offer(&[Buffer::writable(REGION_SIZE, 0x1000)]);
    running.guest.kick(4);
    running.guest.wait_needs_reset();
}

#[test]
fn a_driver_that_reports_unasked_gets_its_reports_back() {
    let (mut running, handle) = start(STATS);
    let count = 100;
    for value in 0..count {
        running.guest.poke(REQUEST, &stat(4, value));
        running.rings[2].offer(&[Buffer::readable(REQUEST, 10)]);
    }
    running.guest.kick(2);
    let used = running.wait_used(2, count as usize - 1);
    assert_eq!(used.len(), count as usize - 1);
    assert_eq!(handle.stats().unwrap().free, Some(count - 1));
}

#[test]
fn statistics_are_read_up_to_their_limit_and_not_one_past_it() {
    for (filler, read) in [(MAX_STATS - 1, Some(7)), (MAX_STATS, None)] {
        let (mut running, handle) = start(STATS);
        let mut report = stat(0xffff, u64::MAX).repeat(filler);
        report.extend(stat(4, 7));
        offer_report(&mut running, &report);
        eventually("A report", || handle.stats().is_some());
        assert_eq!(handle.stats().unwrap().free, read, "{filler}");
    }
}

#[test]
fn a_report_of_any_length_is_read_as_far_as_it_goes() {
    let (mut running, handle) = start(STATS);
    let report = [stat(4, 1), stat(4, 2), stat(5, 3)].concat();
    for (len, free, total) in [(30, 2, Some(3)), (29, 2, None), (10, 1, None)] {
        offer_report(&mut running, &report[..len]);
        let expected = GuestStats { free: Some(free), total, ..Default::default() };
        eventually("A report", || handle.stats() == Some(expected));
    }
    for len in [9, 0] {
        offer_report(&mut running, &report[..len]);
        eventually("An empty report", || handle.stats() == Some(GuestStats::default()));
    }
}

#[test]
fn an_actual_size_beyond_memory_is_no_more_than_memory() {
    let (running, handle) = start(0);
    running.guest.transport_write(ACTUAL, &u32::MAX.to_le_bytes());
    assert_eq!(handle.actual(), 2 * REGION_SIZE);
    // The other fields are the device's, however the write is laid over them.
    running.guest.transport_write(0x100, &[0xff; 4]);
    running.guest.transport_write(0x108, &[0xff; 4]);
    running.guest.transport_write(0x100, &[0xff; 8]);
    running.guest.transport_write(0x107, &[0; 1]);
    running.guest.transport_write(0x1_0000_0100, &[0xff; 4]);
    assert_eq!(running.guest.read_config::<4>(0), [0; 4]);
    assert_eq!(running.guest.read_config::<4>(4), [0xff, 0xff, 0xff, 0]);
    assert_eq!(running.guest.read_config::<8>(8), [0; 8]);
}

#[test]
fn page_numbers_that_change_while_they_are_read_are_read_once() {
    let (mut running, _) = start(0);
    fill(&running, PAGES, 4);
    let memory = running.guest.memory.clone();
    let numbers = [pfn(PAGES), pfn(REGION_SIZE), u32::MAX];
    let _other = Meanwhile::repeat(move |turn| {
        use vm_memory::Bytes;
        let number = numbers[turn as usize % numbers.len()];
        memory.write_obj(number, vm_memory::GuestAddress(REQUEST)).unwrap();
    });
    for _ in 0..500 {
        running.rings[INFLATE].offer(&[Buffer::readable(REQUEST, 4)]);
        running.guest.kick(0);
        running.wait_used(INFLATE, 1);
    }
    assert_eq!(gone(&running, PAGES + PAGE_SIZE, 3), [false; 3]);
}

#[test]
fn a_target_that_nobody_follows_is_only_a_wish() {
    let (running, handle) = start(0);
    running.guest.event_loop.wait_rest();
    let rounds = running.guest.event_loop.rounds();
    for _ in 0..1000 {
        handle.set_target(REGION_SIZE).unwrap();
    }
    running.guest.event_loop.wait_rest();
    assert_eq!(handle.actual(), 0);
    assert_eq!(running.guest.event_loop.rounds(), rounds, "The loop has nothing to do with it");
}
