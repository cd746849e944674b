//! Requests to make persistent memory durable (virtio 1.2 section 5.19.6).

#![no_main]

use arbitrary::Arbitrary;
use devices::virtio::pmem::Pmem;
use inlay_fuzz::{Case, Request, play};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Flush(Option<u32>);

impl Request for Flush {
    fn bytes(&self) -> Vec<u8> {
        self.0.unwrap_or(0).to_le_bytes().into()
    }
}

fuzz_target!(|case: Case<Flush>| {
    // In memory, where a flush costs nothing.
    let file = tempfile::tempfile_in("/dev/shm").expect("A file");
    play(Box::new(Pmem::new(4 << 30, 2 << 20, Some(file))), &case);
});
