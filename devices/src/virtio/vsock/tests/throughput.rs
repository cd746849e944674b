//! How fast bytes pass. Run by hand: `cargo test --release -p devices throughput -- --ignored --nocapture`.

use std::io::{Read, Write};
use std::thread;
use std::time::Instant;

use super::*;

const TOTAL: usize = 256 << 20;

fn report(direction: &str, begin: Instant) {
    let rate = TOTAL as f64 / begin.elapsed().as_secs_f64() / (1 << 20) as f64;
    println!("{direction}: {rate:.0} MiB/s");
}

#[test]
#[ignore = "Measures, asserts nothing"]
fn from_a_pipe_to_the_guest() {
    let (mut driver, connector) = start();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let ports = driver.established(&connector, HostEnd::Source(reader.into()));
    driver.expect(op::SHUTDOWN);
    let begin = Instant::now();
    thread::spawn(move || writer.write_all(&vec![7; TOTAL]));
    let (mut received, mut told) = (0_u64, 0_u64);
    while received < TOTAL as u64 {
        for (head, len) in driver.running.rings[RX].take_used() {
            let index = driver.buffers.remove(&head).unwrap();
            received += u64::from(len - HEADER_LEN);
            driver.offer_buffer(index);
        }
        driver.running.guest.kick(RX as u32);
        // As Linux does: when less than 64 KiB of its buffer are known to be free.
        if received - told > u64::from(BUF_ALLOC) - (64 << 10) {
            told = received;
            let update = Driver::packet(ports, op::CREDIT_UPDATE);
            driver.send(Header { fwd_cnt: received as u32, ..update }, &[]);
        }
        thread::yield_now();
    }
    report("Pipe to guest", begin);
}

#[test]
#[ignore = "Measures, asserts nothing"]
fn from_the_guest_to_a_pipe() {
    let (mut driver, connector) = start();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let ports = driver.established(&connector, HostEnd::Sink(writer.into()));
    let begin = Instant::now();
    let taker = thread::spawn(move || {
        let mut bytes = vec![0; 1 << 20];
        let mut left = TOTAL;
        while left > 0 {
            left -= reader.read(&mut bytes).unwrap();
        }
    });
    let chunk = vec![7; 64 << 10];
    let (mut sent, mut forwarded) = (0_u32, 0_u32);
    while (sent as usize) < TOTAL {
        while sent - forwarded > (256 << 10) - chunk.len() as u32 {
            driver.poll();
            while let Some(packet) = driver.arrived.pop_front() {
                forwarded = packet.header.fwd_cnt;
            }
            thread::yield_now();
        }
        driver.data(ports, &chunk);
        sent += chunk.len() as u32;
    }
    taker.join().unwrap();
    report("Guest to pipe", begin);
}
