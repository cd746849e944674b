//! What no driver may get away with.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testkit::Meanwhile;

/// Room for a large read.
const LARGE_DATA: u64 = 0x10_0000;

/// Sends a chain that no device can answer, and expects it to give up.
fn expect_needs_reset(buffers: &[Buffer]) {
    let mut running = start(&file(), false);
    write_header(&running.guest, READ, 0);
    running.rings[0].offer(buffers);
    running.guest.kick(0);
    running.guest.wait_needs_reset();
    assert_eq!(running.guest.peek(STATUS, 1), [UNTOUCHED]);
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut running = start(&file(), false);
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 15, 0x8000_0000, u32::MAX] {
        let data = [Buffer::writable(DATA, 512)];
        assert_eq!(request(&mut running, kind, 0, &data), (UNSUPP, 1), "{kind}");
    }
}

#[test]
fn sectors_at_the_capacity_and_beyond_where_the_sum_wraps() {
    let mut running = start(&file(), false);
    for (sector, len, status) in [
        (SECTORS - 1, 512, OK),
        (SECTORS - 1, 1024, IOERR),
        (SECTORS, 0, OK),
        (SECTORS, 512, IOERR),
        (SECTORS + 1, 0, IOERR),
        (u64::MAX / 512 - 1, 512, IOERR),
        (u64::MAX / 512, 512, IOERR),
        (u64::MAX / 512 + 1, 512, IOERR),
        (u64::MAX, 512, IOERR),
        (u64::MAX - 1, 1024, IOERR),
        (1 << 55, 512, IOERR),
    ] {
        for (kind, buffer) in [(READ, Buffer::writable(DATA, len)), (WRITE, Buffer::readable(DATA, len))] {
            let result = request(&mut running, kind, sector, &[buffer]);
            assert_eq!(result.0, status, "kind {kind} sector {sector:#x} length {len}");
        }
    }
}

#[test]
fn lengths_that_are_not_whole_sectors_are_errors() {
    let mut running = start(&file(), false);
    for len in [1, 511, 513] {
        assert_eq!(request(&mut running, READ, 0, &[Buffer::writable(DATA, len)]).0, IOERR);
        assert_eq!(request(&mut running, WRITE, 0, &[Buffer::readable(DATA, len)]).0, IOERR);
    }
}

#[test]
fn a_data_buffer_over_the_status_byte_does_not_hide_the_status() {
    let mut running = start(&file(), false);
    let data = [Buffer::writable(STATUS - 511, 512)];
    assert_eq!(request(&mut running, READ, 9, &data), (OK, 513));
}

#[test]
fn a_write_only_header_needs_a_reset() {
    expect_needs_reset(&[Buffer::writable(HEADER, 16), Buffer::writable(STATUS, 1)]);
}

#[test]
fn a_short_header_needs_a_reset() {
    expect_needs_reset(&[Buffer::readable(HEADER, 15), Buffer::writable(STATUS, 1)]);
}

#[test]
fn a_read_only_status_needs_a_reset() {
    expect_needs_reset(&[Buffer::readable(HEADER, 16), Buffer::readable(STATUS, 1)]);
}

#[test]
fn a_status_of_length_0_needs_a_reset() {
    expect_needs_reset(&[Buffer::readable(HEADER, 16), Buffer::writable(STATUS, 0)]);
}

#[test]
fn data_outside_memory_needs_a_reset() {
    expect_needs_reset(&[Buffer::readable(HEADER, 16), Buffer::writable(1 << 40, 512), Buffer::writable(STATUS, 1)]);
}

#[test]
fn a_device_that_gave_up_ignores_its_queue_until_it_is_reset() {
    let mut running = start(&file(), false);
    running.rings[0].offer(&[Buffer::readable(HEADER, 1)]);
    running.guest.kick(0);
    running.guest.wait_needs_reset();
    write_header(&running.guest, FLUSH, 0);
    running.rings[0].offer(&[Buffer::readable(HEADER, 16), Buffer::writable(STATUS, 1)]);
    running.guest.kick(0);
    running.guest.event_loop.settle();
    assert_eq!(running.guest.peek(STATUS, 1), [UNTOUCHED]);

    running.guest.set_status(0);
    let mut running = running.guest.start(FLUSH_FEATURE);
    assert_eq!(request(&mut running, FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn a_drive_that_shrinks_gives_errors_not_faults() {
    let file = file();
    let mut running = start(&file, false);
    file.set_len(512).unwrap();
    let data = [Buffer::writable(DATA, 512)];
    assert_eq!(request(&mut running, READ, 0, &data).0, OK);
    assert_eq!(request(&mut running, READ, 1, &data).0, IOERR);
}

/// CVE-2026-45782. The reads are so large that they last: what is not waited for is caught writing.
#[test]
fn a_reset_under_load_leaves_memory_alone_and_the_device_works_after_it() {
    const LARGE: u32 = 1 << 20;
    static MINE: [u8; LARGE as usize] = [0xee; LARGE as usize];
    let file = file();
    file.set_len(u64::from(LARGE)).unwrap();
    for turn in 0..30 {
        let engine = ENGINES[turn % ENGINES.len()];
        let mut running = start_config(BlkConfig { engine, ..config(&file) });
        write_header(&running.guest, READ, 0);
        for _ in 0..80 {
            running.rings[0].offer(&[
                Buffer::readable(HEADER, 16),
                Buffer::writable(LARGE_DATA, LARGE),
                Buffer::writable(STATUS, 1),
            ]);
        }
        running.guest.kick(0);
        running.guest.set_status(0);
        let used = running.rings[0].used_idx();
        running.guest.poke(LARGE_DATA, &MINE);
        running.guest.event_loop.settle();
        assert!(running.guest.peek(LARGE_DATA, MINE.len()) == MINE, "{engine:?} writes after the reset");
        assert_eq!(running.rings[0].used_idx(), used);

        let mut running = running.guest.start(ALL);
        assert_eq!(request(&mut running, FLUSH, 0, &[]), (OK, 1));
    }
}

#[test]
fn a_header_that_changes_while_it_is_served_is_read_once() {
    let mut running = start(&file(), true);
    let memory = running.guest.memory.clone();
    let _hostile = Meanwhile::repeat(move |turn| memory.write_obj(turn % 3, GuestAddress(HEADER)).unwrap());
    for _ in 0..500 {
        let data = [Buffer::writable(DATA, 512)];
        let (status, len) = request(&mut running, READ, 2, &data);
        // The status belongs to the length: both come from one look at the header.
        assert!(matches!((status, len), (OK, 513) | (IOERR, 1) | (UNSUPP, 1)), "{status} {len}");
    }
}

#[test]
fn a_read_only_drive_refuses_everything_that_changes_it() {
    let file = file();
    let mut running = start(&file, true);
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        assert_eq!(erase(&mut running, kind, &[(8, 8, flags)]), IOERR);
    }
    assert_eq!(request(&mut running, WRITE, 8, &[Buffer::readable(DATA, 512)]).0, IOERR);
    assert_eq!(sector(&file, 8), [8; 512]);
    // Nor can it be talked into the features.
    running.guest.set_status(0);
    assert!(!running.guest.negotiate(READ_ONLY | DISCARD_FEATURE));
}

#[test]
fn erasing_without_the_feature_is_unsupported() {
    let file = file();
    for (features, kind) in [(DISCARD_FEATURE, WRITE_ZEROES), (WRITE_ZEROES_FEATURE, DISCARD), (0, DISCARD)] {
        let mut running = Guest::new(device(&file, false)).start(features);
        assert_eq!(erase(&mut running, kind, &[(8, 8, 0)]), UNSUPP);
    }
    assert_eq!(sector(&file, 8), [8; 512]);
}

#[test]
fn flags_that_mean_nothing_are_unsupported() {
    let mut running = start(&file(), false);
    for (kind, flags) in [(DISCARD, 1), (DISCARD, 2), (DISCARD, 1 << 31), (WRITE_ZEROES, 2), (WRITE_ZEROES, u32::MAX)] {
        assert_eq!(erase(&mut running, kind, &[(0, 1, flags)]), UNSUPP, "kind {kind} flags {flags:#x}");
    }
    // One bad range spoils all.
    assert_eq!(erase(&mut running, DISCARD, &[(0, 8, 0), (8, 8, 1)]), UNSUPP);
}

#[test]
fn erased_ranges_at_their_limits_and_one_past() {
    let file = tempfile::tempfile().unwrap();
    let sectors = (1 << 22) + 1;
    file.set_len(sectors * 512).unwrap();
    let mut running = start_config(config(&file));
    for (kind, sector, count, status) in [
        (DISCARD, 0, 1 << 22, OK),
        (DISCARD, 0, (1 << 22) + 1, IOERR),
        (WRITE_ZEROES, 0, 1 << 16, OK),
        (WRITE_ZEROES, 0, (1 << 16) + 1, IOERR),
        (DISCARD, sectors - 8, 8, OK),
        (DISCARD, sectors - 8, 9, IOERR),
        (WRITE_ZEROES, sectors - 8, 9, IOERR),
        (DISCARD, sectors, 0, OK),
        (DISCARD, sectors + 1, 0, IOERR),
        (DISCARD, u64::MAX, 1, IOERR),
        (DISCARD, u64::MAX - 7, 8, IOERR),
        (WRITE_ZEROES, u64::MAX / 512 + 1, 1, IOERR),
        (WRITE_ZEROES, 1 << 55, 8, IOERR),
        (DISCARD, 0, u32::MAX, IOERR),
    ] {
        let result = erase(&mut running, kind, &[(sector, count, 0)]);
        assert_eq!(result, status, "kind {kind} sector {sector:#x} count {count:#x}");
    }
}

#[test]
fn range_lists_at_their_limits_and_one_past() {
    let mut running = start(&file(), false);
    for (kind, count, status) in [
        (DISCARD, 0, IOERR),
        (DISCARD, 256, OK),
        (DISCARD, 257, IOERR),
        (WRITE_ZEROES, 1, OK),
        (WRITE_ZEROES, 2, IOERR),
    ] {
        assert_eq!(erase(&mut running, kind, &vec![(0, 1, 0); count]), status, "kind {kind} with {count} ranges");
    }
    for len in [1, 15, 17, 31] {
        assert_eq!(request(&mut running, DISCARD, 0, &[Buffer::readable(DATA, len)]).0, IOERR);
    }
    // Ranges where data for the device to write should be.
    assert_eq!(request(&mut running, DISCARD, 0, &[Buffer::writable(DATA, 16)]).0, IOERR);
}

#[test]
fn data_of_the_wrong_direction_is_no_data() {
    let file = file();
    let mut running = start(&file, false);
    running.guest.poke(DATA, &[0xee; 512]);
    // A read into what is only readable, and a write from what is only writable: no bytes at all.
    assert_eq!(request(&mut running, READ, 1, &[Buffer::readable(DATA, 512)]), (OK, 1));
    assert_eq!(request(&mut running, WRITE, 1, &[Buffer::writable(DATA, 512)]), (OK, 1));
    assert_eq!(running.guest.peek(DATA, 512), [0xee; 512]);
    assert_eq!(sector(&file, 1), [1; 512]);
}

#[test]
fn as_many_segments_as_a_queue_can_hold_are_moved_by_each_engine() {
    for engine in ENGINES {
        let file = file();
        let mut running = start_config(BlkConfig { queue_size: 1024, engine, ..config(&file) });
        // 1022 segments: 1020 of one byte, and two for the rest of four sectors.
        let mut data: Vec<_> = (0..1020).map(|index| Buffer::writable(DATA + 2 * index, 1)).collect();
        data.push(Buffer::writable(DATA + 0x2000, 4));
        data.push(Buffer::writable(DATA + 0x3000, 1024));
        assert_eq!(request(&mut running, READ, 2, &data), (OK, 2049), "{engine:?}");
        assert_eq!(running.guest.peek(DATA + 2 * 511, 3), [2, 0, 3]);
        assert_eq!(running.guest.peek(DATA + 0x3000, 1024), [[4; 512], [5; 512]].concat());
    }
}

#[test]
fn a_write_that_the_host_refuses_is_an_error_and_the_device_goes_on() {
    for engine in ENGINES {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(SECTORS * 512).unwrap();
        // A driver may write, but the descriptor may not.
        let file = File::open(named.path()).unwrap();
        let mut running = start_config(BlkConfig { engine, ..BlkConfig::new("root", file) });
        assert_eq!(request(&mut running, WRITE, 0, &[Buffer::readable(DATA, 512)]), (IOERR, 1), "{engine:?}");
        assert_eq!(erase(&mut running, DISCARD, &[(0, 8, 0)]), IOERR);
        assert_eq!(erase(&mut running, WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
        assert_eq!(request(&mut running, READ, 0, &[Buffer::writable(DATA, 512)]), (OK, 513));
    }
}

#[test]
fn a_write_over_the_end_of_a_full_host_is_an_error_after_a_part() {
    let mut write = operation::Operation::transfer(transfer::Transfer::zeroes(0, 4096), false);
    assert!(matches!(write.step(), Some(operation::Step::Write(_))));
    write.finish(Ok(1024)).unwrap();
    let Some(operation::Step::Write(call)) = write.step() else { panic!("The rest is written") };
    assert_eq!(call.position, 1024);
    write.finish(Err(std::io::ErrorKind::Interrupted.into())).unwrap();
    let Some(operation::Step::Write(call)) = write.step() else { panic!("The same part again") };
    assert_eq!(call.position, 1024);
    assert_eq!(write.finish(Ok(0)).unwrap_err().kind(), std::io::ErrorKind::WriteZero);
}

#[test]
fn a_raw_image_that_looks_like_qcow2_stays_raw() {
    let file = file();
    let mut running = start(&file, false);
    running.guest.poke(DATA, b"QFI\xfb\0\0\0\x03");
    assert_eq!(request(&mut running, WRITE, 0, &[Buffer::readable(DATA, 512)]).0, OK);
    drop(running);
    let mut running = start(&file, false);
    assert_eq!(u64::from_le_bytes(running.guest.read_config(0)), SECTORS);
    assert_eq!(request(&mut running, READ, 1, &[Buffer::writable(DATA, 512)]).0, OK);
    assert_eq!(running.guest.peek(DATA, 512), [1; 512]);
}
