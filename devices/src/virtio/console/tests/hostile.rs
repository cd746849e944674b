//! A driver that sends what is no message, and hosts that do not listen.

use super::*;

#[test]
fn messages_that_are_too_short_are_passed_over() {
    let mut running = start_multiport(vec![port(0, true, streams().0)]);
    hear(&mut running, 1);
    let ready = message(0, 3, 1);
    for len in 0..ready.len() {
        say_bytes(&mut running, &ready[..len]);
    }
    // Nothing to read at all.
    running.rings[CONTROL_TX].offer(&[Buffer::writable(MESSAGE, 8)]);
    running.guest.kick(CONTROL_TX as u32);
    running.wait_used(CONTROL_TX, 1);
    assert_eq!(heard(&mut running), 0);
    // One that is too long counts as far as a message goes, one in pieces as a whole.
    say_bytes(&mut running, &[&ready[..], &[0xff; 100]].concat());
    assert_eq!(hear(&mut running, 2).len(), 2);
    running.guest.poke(MESSAGE, &ready);
    running.rings[CONTROL_TX].offer(&[Buffer::readable(MESSAGE, 3), Buffer::readable(MESSAGE + 3, 5)]);
    running.guest.kick(CONTROL_TX as u32);
    assert_eq!(hear(&mut running, 2).len(), 2);
}

#[test]
fn messages_about_ports_that_are_not_there_are_passed_over() {
    let mut running = start_multiport(vec![port(0, true, streams().0), port(2, false, streams().0)]);
    hear(&mut running, 2);
    for number in [1, 3, MAX_PORTS, MAX_PORTS + 1, u32::MAX] {
        for event in [3, 6] {
            say(&mut running, number, event, 1);
        }
    }
    assert_eq!(heard(&mut running), 0);
}

#[test]
fn messages_that_mean_nothing_are_passed_over() {
    let mut running = start_multiport(vec![port(0, true, streams().0)]);
    hear(&mut running, 1);
    for event in [1, 2, 4, 5, 7, 8, u16::MAX] {
        say(&mut running, 0, event, 1);
    }
    for (event, value) in [(0, 0), (0, 2), (3, 0), (3, u16::MAX)] {
        say(&mut running, 0, event, value);
    }
    assert_eq!(heard(&mut running), 0);
}

#[test]
fn a_flood_of_messages_without_buffers_for_answers_fills_nothing() {
    let mut running = guest(vec![port(0, true, streams().0), port(1, false, streams().0)]).start(MULTIPORT);
    for _ in 0..500 {
        say(&mut running, 0, 0, 1);
        say(&mut running, 0, 3, 1);
        say(&mut running, 1, 3, 1);
    }
    for _ in 0..32 {
        running.rings[CONTROL_RX].offer(&[Buffer::writable(CONTROL, CONTROL_SIZE)]);
    }
    running.guest.kick(CONTROL_RX as u32);
    // Add, console or name, and open, for each port once.
    assert_eq!(running.wait_used(CONTROL_RX, 6).len(), 6);
    assert_eq!(heard(&mut running), 0);
}

#[test]
fn buffers_that_are_too_small_for_a_message_come_back_empty() {
    let mut running = guest(vec![port(1, false, streams().0)]).start(MULTIPORT);
    say(&mut running, 0, 0, 1);
    say(&mut running, 1, 3, 1);
    // 8 bytes are enough for "add" and "open", but not for the name.
    for size in [7, 8, 8, 12, 13, 0, 8] {
        running.rings[CONTROL_RX].offer(&[Buffer::writable(CONTROL, size)]);
    }
    running.guest.kick(CONTROL_RX as u32);
    let lengths: Vec<u32> = running.wait_used(CONTROL_RX, 7).into_iter().map(|(_, len)| len).collect();
    assert_eq!(lengths, [0, 8, 0, 0, 13, 0, 8]);
}

#[test]
fn output_that_the_host_does_not_take_waits_in_its_queue() {
    let (end, mut host) = streams();
    let mut running = start_multiport(vec![port(1, false, end)]);
    let piece = 32 << 10;
    let text: Vec<u8> = (0..piece).map(|index| index as u8).collect();
    running.guest.poke(OUTPUT, &text);
    let count = 60;
    for _ in 0..count {
        running.rings[5].offer(&[Buffer::readable(OUTPUT, piece)]);
    }
    running.guest.kick(5);
    running.guest.event_loop.wait_rest();
    assert!(running.rings[5].used_idx() < count, "The host's socket does not hold so much");
    for _ in 0..count {
        assert!(read(&mut host, piece as usize) == text);
    }
    running.wait_used(5, count as usize);
}

#[test]
fn a_console_does_not_wait_for_a_host_that_does_not_read() {
    let (end, mut host) = streams();
    let mut running = guest(vec![port(0, true, end)]).start(0);
    let piece = 32 << 10;
    for _ in 0..60 {
        running.rings[1].offer(&[Buffer::readable(OUTPUT, piece)]);
    }
    running.guest.kick(1);
    running.wait_used(1, 60);
    // What comes after the host has read goes through again.
    let mut taken = vec![0; 1 << 20];
    while host.read(&mut taken).is_ok() {}
    print(&mut running, 1, b"here");
    assert_eq!(read(&mut host, 4), b"here");
}

#[test]
fn input_without_buffers_waits_with_the_host() {
    let (end, mut host) = streams();
    let mut running = guest(vec![port(0, true, end)]).start(0);
    host.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while let Ok(count) = host.write(&[7; 4096]) {
        sent += count;
    }
    running.guest.event_loop.wait_rest();
    let mut received = 0;
    while received < sent {
        running.rings[0].offer(&[Buffer::writable(INPUT, 64 << 10)]);
        running.guest.kick(0);
        received += running.wait_used(0, 1)[0].1 as usize;
    }
    assert_eq!(received, sent);
}

#[test]
fn chains_without_bytes_of_the_right_kind_come_back_empty() {
    let (end, mut host) = streams();
    let mut running = guest(vec![port(0, true, end)]).start(0);
    host.write_all(b"x").unwrap();
    running.rings[0].offer(&[Buffer::readable(INPUT, 100)]);
    running.rings[0].offer(&[Buffer::writable(INPUT, 0)]);
    running.rings[0].offer(&[Buffer::writable(INPUT, 1)]);
    running.guest.kick(0);
    assert_eq!(running.wait_used(0, 3), [(0, 0), (1, 0), (2, 1)]);
    running.rings[1].offer(&[Buffer::writable(OUTPUT, 100)]);
    running.rings[1].offer(&[Buffer::readable(OUTPUT, 0)]);
    running.guest.kick(1);
    assert_eq!(running.wait_used(1, 2), [(0, 0), (1, 0)]);
}

#[test]
fn a_buffer_as_large_as_memory_is_moved_in_pieces() {
    let file = tempfile::tempfile().unwrap();
    let end = PortEnd::Streams { input: None, output: Some(file.try_clone().unwrap()) };
    let mut running = guest(vec![port(0, true, end)]).start(0);
    running.rings[1].offer(&[Buffer::readable(0, 4 << 20), Buffer::readable(0, 4 << 20)]);
    running.guest.kick(1);
    running.wait_used(1, 1);
    assert_eq!(file.metadata().unwrap().len(), 8 << 20);
}

#[test]
fn a_loop_of_descriptors_needs_a_reset() {
    for queue in [1, CONTROL_TX] {
        let running = guest(vec![port(0, true, streams().0)]).start(MULTIPORT);
        let mut running = running;
        running.rings[queue].write_descriptor(0, OUTPUT, 16, 1, 0);
        running.rings[queue].publish(0);
        running.guest.kick(queue as u32);
        running.guest.wait_needs_reset();
    }
}

#[test]
fn a_reset_with_output_in_flight_leaves_it_behind() {
    let (end, mut host) = streams();
    let mut running = start_multiport(vec![port(1, false, end)]);
    for _ in 0..60 {
        running.rings[5].offer(&[Buffer::readable(OUTPUT, 32 << 10)]);
    }
    running.guest.kick(5);
    running.guest.event_loop.settle();
    running.guest.set_status(0);
    let mut taken = vec![0; 1 << 20];
    while host.read(&mut taken).is_ok() {}
    running.guest.event_loop.settle();
    assert_eq!(host.read(&mut taken).unwrap_err().kind(), ErrorKind::WouldBlock);
}
