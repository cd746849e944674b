//! What a driver may expect.

use std::io::{Read, Seek, SeekFrom};

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::BusDevice;
use crate::testkit::{Ring, memory};
use crate::virtio::queue::VirtQueue;

#[test]
fn the_configuration_space_tells_capacity_segments_and_sector_size() {
    let guest = Guest::new(device(&file(), false));
    assert_eq!(guest.read(8), 2);
    assert_eq!(u64::from_le_bytes(guest.read_config(0)), SECTORS);
    assert_eq!(u32::from_le_bytes(guest.read_config(12)), 254);
    assert_eq!(u32::from_le_bytes(guest.read_config(20)), 512);
    // Eight blocks in a physical one, and in the best request.
    assert_eq!(guest.read_config::<8>(24), [3, 0, 8, 0, 0, 0, 0, 0]);
    assert_eq!(guest.read_config::<4>(32), [1, 0, 1, 0]);
    let limits = [36, 40, 44, 48, 52, 56, 60].map(|offset| u32::from_le_bytes(guest.read_config(offset)));
    assert_eq!(limits, [1 << 22, 256, 8, 1 << 16, 1, 1, 0]);
    assert_eq!(guest.offered_features() & ALL, ALL);
    assert_eq!(guest.offered_features() & READ_ONLY, 0);
    let guest = Guest::new(device(&file(), true));
    assert_ne!(guest.offered_features() & READ_ONLY, 0);
    assert_eq!(guest.offered_features() & (DISCARD_FEATURE | WRITE_ZEROES_FEATURE), 0);
}

#[test]
fn a_part_of_a_sector_at_the_end_is_not_shown() {
    let file = file();
    file.set_len(SECTORS * 512 + 511).unwrap();
    let guest = Guest::new(device(&file, false));
    assert_eq!(u64::from_le_bytes(guest.read_config(0)), SECTORS);
}

#[test]
fn a_file_without_a_whole_sector_is_refused() {
    for (len, refused) in [(0, true), (511, true), (512, false)] {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        let result = Blk::new(BlkConfig::new("root", file), Confinement::On);
        assert_eq!(matches!(result, Err(BlkError { kind: BlkErrorKind::Empty(512), .. })), refused, "{len}");
    }
}

#[test]
fn reads_fill_several_segments() {
    let mut running = start(&file(), false);
    let data = [Buffer::writable(DATA, 1), Buffer::writable(DATA + 0x1000, 1022), Buffer::writable(DATA + 0x2000, 1)];
    assert_eq!(request(&mut running, READ, 3, &data), (OK, 1025));
    assert_eq!(running.guest.peek(DATA, 1), [3]);
    assert_eq!(running.guest.peek(DATA + 0x1000 + 510, 2), [3, 4]);
    assert_eq!(running.guest.peek(DATA + 0x2000, 1), [4]);
}

#[test]
fn writes_reach_the_file() {
    let file = file();
    let mut running = start(&file, false);
    running.guest.poke(DATA, &[0x5a; 300]);
    running.guest.poke(DATA + 0x1000, &[0xa5; 724]);
    let data = [Buffer::readable(DATA, 300), Buffer::readable(DATA + 0x1000, 724)];
    assert_eq!(request(&mut running, WRITE, SECTORS - 2, &data), (OK, 1));
    assert_eq!(request(&mut running, FLUSH, 0, &[]), (OK, 1));
    let mut bytes = [0; 1024];
    file.read_exact_at(&mut bytes, (SECTORS - 2) * 512).unwrap();
    assert!(bytes[..300] == [0x5a; 300] && bytes[300..] == [0xa5; 724]);
    let mut all = Vec::new();
    (&file).seek(SeekFrom::Start(0)).unwrap();
    (&file).read_to_end(&mut all).unwrap();
    assert_eq!(all.len() as u64, SECTORS * 512);
}

#[test]
fn a_driver_without_flush_gets_stable_writes() {
    let file = file();
    let mut running = Guest::new(device(&file, false)).start(0);
    running.guest.poke(DATA, &[1; 512]);
    let data = [Buffer::readable(DATA, 512)];
    assert_eq!(request(&mut running, WRITE, 0, &data), (OK, 1));
}

#[test]
fn the_serial_number_is_padded_to_20_bytes() {
    let mut running = start(&file(), false);
    running.guest.poke(DATA, &[0xff; 32]);
    let data = [Buffer::writable(DATA, 20)];
    assert_eq!(request(&mut running, GET_ID, 0, &data), (OK, 21));
    assert_eq!(running.guest.peek(DATA, 6), b"disk-7");
    assert_eq!(running.guest.peek(DATA + 6, 15), [&[0; 14][..], &[0xff]].concat());
    let short = [Buffer::writable(DATA, 19)];
    assert_eq!(request(&mut running, GET_ID, 0, &short), (IOERR, 1));
}

#[test]
fn a_read_only_drive_refuses_writes_but_flushes() {
    let file = file();
    let mut running = start(&file, true);
    running.guest.poke(DATA, &[0xff; 512]);
    assert_eq!(request(&mut running, WRITE, 0, &[Buffer::readable(DATA, 512)]), (IOERR, 1));
    assert_eq!(request(&mut running, FLUSH, 0, &[]), (OK, 1));
    let mut bytes = [1; 512];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 512]);
}

#[test]
fn a_header_may_be_split_and_share_a_descriptor_with_the_data() {
    let file = file();
    let mut running = start(&file, false);
    write_header(&running.guest, WRITE, 5);
    running.guest.poke(HEADER + 16, &[7; 512]);
    let buffers = [
        Buffer::readable(HEADER, 1),
        Buffer::readable(HEADER + 1, 12),
        Buffer::readable(HEADER + 13, 3 + 512),
        Buffer::writable(STATUS, 1),
    ];
    assert_eq!(exchange(&mut running, &buffers), (OK, 1));
    let mut bytes = [0; 512];
    file.read_exact_at(&mut bytes, 5 * 512).unwrap();
    assert_eq!(bytes, [7; 512]);
}

#[test]
fn the_status_may_share_a_descriptor_with_the_data() {
    let mut running = start(&file(), false);
    write_header(&running.guest, READ, 9);
    let buffers = [Buffer::readable(HEADER, 16), Buffer::writable(STATUS - 512, 513)];
    assert_eq!(exchange(&mut running, &buffers), (OK, 513));
    assert_eq!(running.guest.peek(STATUS - 512, 512), [9; 512]);
}

#[test]
fn requests_from_before_driver_ok_are_served_without_a_kick() {
    let mut running = Guest::new(device(&file(), false)).start_with(0, |guest, rings| {
        write_header(guest, FLUSH, 0);
        rings[0].offer(&[Buffer::readable(HEADER, 16), Buffer::writable(STATUS, 1)]);
    });
    assert_eq!(running.wait_used(0, 1), [(0, 1)]);
}

#[test]
fn a_queue_that_is_missing_needs_a_reset() {
    let guest = Guest::new(device(&file(), false));
    assert!(guest.negotiate(0));
    assert_eq!(guest.set_status(0xf), 0x4f);
}

#[test]
fn a_full_queue_of_requests_is_served_with_event_idx() {
    let mut running = Guest::new(device(&file(), false)).start(1 << 29);
    write_header(&running.guest, READ, 1);
    let mut offered = 0;
    for _ in 0..85 {
        running.rings[0].offer(&[
            Buffer::readable(HEADER, 16),
            Buffer::writable(DATA, 512),
            Buffer::writable(STATUS, 1),
        ]);
        offered += 1;
    }
    running.guest.kick(0);
    assert!(running.wait_used(0, offered).iter().all(|(_, len)| *len == 513));
}

#[test]
fn a_driver_chooses_whether_writes_are_stable() {
    // Features, what the driver writes to `writeback`, and what it is then.
    for (features, written, writeback) in [
        (FLUSH_FEATURE, None, 1),
        (0, None, 0),
        (CONFIG_WCE, None, 0),
        (FLUSH_FEATURE | CONFIG_WCE, None, 1),
        (FLUSH_FEATURE | CONFIG_WCE, Some(0), 0),
        (FLUSH_FEATURE | CONFIG_WCE, Some(1), 1),
        // Not a value.
        (FLUSH_FEATURE | CONFIG_WCE, Some(2), 1),
    ] {
        let running = Guest::new(device(&file(), false)).start(features);
        if let Some(value) = written {
            running.guest.transport.write(0x100 + 32, &[value]);
        }
        assert_eq!(running.guest.read_config(32), [writeback], "{features:#x} {written:?}");
        running.guest.set_status(0);
        assert_eq!(running.guest.read_config(32), [1]);
    }
}

#[test]
fn what_must_be_stable_ends_with_a_sync() {
    let disk = Arc::new(image::Disk::open(file(), ImageFormat::Raw, false, false).unwrap());
    let memory = memory();
    for (kind, writeback, expected) in [
        (WRITE, true, false),
        (WRITE, false, true),
        (WRITE_ZEROES, true, false),
        (WRITE_ZEROES, false, true),
        (DISCARD, false, true),
        (READ, false, false),
        (FLUSH, true, true),
    ] {
        let mut ring = Ring::new(&memory, DATA + 0x1_0000, 16);
        let mut queue = VirtQueue::new(ring.activate().0, &memory, 0);
        let requests = request::Requests::new(Arc::clone(&disk), [0; 20], Arc::new(writeback.into()), ALL);
        memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        memory.write_obj(1_u32, GuestAddress(DATA + 8)).unwrap();
        let len = if [DISCARD, WRITE_ZEROES].contains(&kind) { 16 } else { 512 };
        let data = Buffer { addr: DATA, len, writable: kind == READ };
        ring.offer(&[Buffer::readable(HEADER, 16), data, Buffer::writable(STATUS, 1)]);
        let chain = queue.pop().unwrap().unwrap();
        let request::Action::Run { mut operation, .. } = requests.read(&memory, &chain).unwrap().action else {
            panic!("Kind {kind} is work on the image");
        };
        let mut steps = Vec::new();
        while let Some(step) = operation.step() {
            steps.push(step);
            operation.finish(Ok(512)).unwrap();
        }
        let synced = matches!(steps.last(), Some(operation::Step::Sync));
        assert_eq!(synced, expected, "kind {kind} writeback {writeback}");
    }
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeroes_and_their_neighbours_stay() {
    for engine in ENGINES {
        let file = file();
        let mut running = start_config(BlkConfig { engine, ..config(&file) });
        assert_eq!(erase(&mut running, WRITE_ZEROES, &[(9, 2, 0)]), OK);
        assert_eq!(erase(&mut running, WRITE_ZEROES, &[(13, 1, 1)]), OK);
        assert_eq!(erase(&mut running, DISCARD, &[(16, 8, 0), (32, 0, 0), (40, 8, 0)]), OK);
        for number in 0..SECTORS {
            let erased = [9, 10, 13].contains(&number) || (16..24).contains(&number) || (40..48).contains(&number);
            let expected = if erased { 0 } else { number as u8 };
            assert_eq!(sector(&file, number), [expected; 512], "{engine:?} sector {number}");
        }
    }
}

#[test]
fn zeroes_are_written_where_the_file_system_cannot_allocate_them() {
    let mut operation = operation::Operation::erase(
        operation::Erasure::Zero,
        [operation::ByteRange { position: 512, len: 1024 }].into(),
        false,
    );
    assert!(matches!(operation.step(), Some(operation::Step::Allocate { .. })));
    operation.finish(Err(std::io::Error::from_raw_os_error(libc::EOPNOTSUPP))).unwrap();
    for (position, moved) in [(512, 1000), (1512, 24)] {
        let Some(operation::Step::Write(call)) = operation.step() else { panic!("Zeroes are written") };
        assert_eq!(call.position, position);
        operation.finish(Ok(moved)).unwrap();
    }
    assert!(operation.step().is_none());
}

#[test]
fn an_image_that_grows_and_shrinks_is_told_to_the_driver() {
    let file = file();
    let device = device(&file, false);
    let control = device.control();
    let mut running = Guest::new(device).start(ALL);
    let data = [Buffer::writable(DATA, 512)];
    assert_eq!(request(&mut running, READ, SECTORS, &data).0, IOERR);

    let generation = running.guest.read(0xfc);
    file.set_len((SECTORS + 8) * 512).unwrap();
    assert_eq!(control.refresh_capacity().unwrap(), (SECTORS + 8) * 512);
    running.guest.wait_interrupt(2);
    assert_ne!(running.guest.read(0xfc), generation);
    assert_eq!(u64::from_le_bytes(running.guest.read_config(0)), SECTORS + 8);
    assert_eq!(request(&mut running, READ, SECTORS, &data).0, OK);

    file.set_len(8 * 512).unwrap();
    control.refresh_capacity().unwrap();
    running.guest.wait_interrupt(2);
    assert_eq!(request(&mut running, READ, 8, &data).0, IOERR);
    assert_eq!(request(&mut running, READ, 7, &data).0, OK);

    running.guest.set_status(0);
    control.refresh_capacity().unwrap();
    assert_eq!(running.guest.take_interrupt(), 0, "Nobody is there to be told");
}

#[test]
fn each_queue_answers_for_itself() {
    for engine in ENGINES {
        let mut running = start_config(BlkConfig { queues: 3, engine, ..config(&file()) });
        assert_eq!(u16::from_le_bytes(running.guest.read_config(34)), 3);
        write_header(&running.guest, READ, 5);
        for index in [2, 0, 1] {
            let data = Buffer::writable(DATA + 0x1000 * u64::from(index), 512);
            running.rings[index as usize].offer(&[Buffer::readable(HEADER, 16), data, Buffer::writable(STATUS, 1)]);
            running.guest.kick(index);
            assert_eq!(running.wait_used(index as usize, 1), [(0, 513)]);
            assert_eq!(running.guest.peek(data.addr, 512), [5; 512]);
        }
    }
}

#[test]
fn queues_that_the_driver_leaves_out_are_not_missed() {
    let guest = Guest::new(Box::new(Blk::new(BlkConfig { queues: 4, ..config(&file()) }, Confinement::On).unwrap()));
    assert!(guest.negotiate(ALL));
    let ring = guest.ring(0, 256);
    guest.set_up_queue(0, &ring);
    assert_eq!(guest.set_status(0xf), 0xf);
    let mut running = Running { guest, rings: vec![ring] };
    assert_eq!(request(&mut running, FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn the_block_size_is_told_with_its_place_in_a_page() {
    for (size, exponent) in [(512, 3), (1024, 2), (4096, 0)] {
        let config = BlkConfig { logical_block_size: Some(size), ..config(&file()) };
        let guest = Guest::new(Box::new(Blk::new(config, Confinement::On).unwrap()));
        assert_eq!(u32::from_le_bytes(guest.read_config(20)), size);
        assert_eq!(guest.read_config(24), [exponent]);
        assert_eq!(u16::from_le_bytes(guest.read_config(26)), 1 << exponent);
    }
}

#[test]
fn numbers_that_make_no_drive_are_refused() {
    let good = || config(&file());
    let refused = |config: BlkConfig| Blk::new(config, Confinement::On).err().map(|error| error.kind.to_string());
    for queues in [1, MAX_QUEUES] {
        assert_eq!(refused(BlkConfig { queues, ..good() }), None);
    }
    for queues in [0, MAX_QUEUES + 1] {
        assert!(refused(BlkConfig { queues, ..good() }).unwrap().contains("request queues"));
    }
    for queue_size in [4, 1024] {
        assert_eq!(refused(BlkConfig { queue_size, ..good() }), None);
    }
    for queue_size in [0, 2, 3, 6, 2048] {
        assert!(refused(BlkConfig { queue_size, ..good() }).unwrap().contains("Queue size"));
    }
    for size in [0, 256, 513, 1536, 8192] {
        let config = BlkConfig { logical_block_size: Some(size), ..good() };
        assert!(refused(config).unwrap().contains("Block size"));
    }
}

#[test]
fn what_was_done_is_counted_by_kind_and_outlives_a_reset() {
    let metrics = BlkMetrics::default();
    let config = BlkConfig { metrics: metrics.clone(), ..config(&file()) };
    let mut running = start_config(config);
    let count = |kind| {
        let RequestCount { operations, bytes, failed } = metrics.count(kind);
        (operations, bytes, failed)
    };
    assert_eq!(request(&mut running, READ, 0, &[Buffer::writable(DATA, 1024)]).0, OK);
    assert_eq!(request(&mut running, WRITE, 0, &[Buffer::readable(DATA, 512)]).0, OK);
    assert_eq!(request(&mut running, WRITE, 1, &[Buffer::readable(DATA, 512)]).0, OK);
    assert_eq!(request(&mut running, FLUSH, 0, &[]).0, OK);
    assert_eq!(erase(&mut running, DISCARD, &[(8, 8, 0)]), OK);
    // What is refused by its numbers never reached the image.
    assert_eq!(request(&mut running, READ, SECTORS, &[Buffer::writable(DATA, 512)]).0, IOERR);
    running.guest.set_status(0);
    assert_eq!(count(RequestKind::Read), (1, 1024, 0));
    assert_eq!(count(RequestKind::Write), (2, 1024, 0));
    assert_eq!((count(RequestKind::Flush), count(RequestKind::Erase)), ((1, 0, 0), (1, 0, 0)));
}
