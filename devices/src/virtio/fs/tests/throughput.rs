//! How fast requests pass. Run by hand: `cargo test --release -p devices throughput -- --ignored --nocapture`.

use std::time::Instant;

use super::*;

#[test]
#[ignore = "Measures, asserts nothing"]
fn requests_and_data() {
    const REQUESTS: u32 = 10_000;
    const MIB: u32 = 256;
    let mut world = World::new();
    let client = &mut world.client;
    let begin = Instant::now();
    for _ in 0..REQUESTS {
        client.call(Opcode::Getattr, ROOT_ID, &longs([0, 0])).unwrap();
    }
    println!("GETATTR: {:.1} us", begin.elapsed().as_secs_f64() * 1e6 / f64::from(REQUESTS));

    let (entry, handle) = client.create(c"file", libc::O_RDWR, 0o600).unwrap();
    let data = vec![7; 1 << 20];
    let begin = Instant::now();
    for _ in 0..MIB {
        client.write(entry.nodeid, handle, 0, &data).unwrap();
    }
    println!("WRITE of 1 MiB: {:.0} MiB/s", f64::from(MIB) / begin.elapsed().as_secs_f64());
    let begin = Instant::now();
    for _ in 0..MIB {
        client.read(entry.nodeid, handle, 0, 1 << 20).unwrap();
    }
    println!("READ of 1 MiB: {:.0} MiB/s", f64::from(MIB) / begin.elapsed().as_secs_f64());
}
