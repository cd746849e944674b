//! Requests for blocks of memory (virtio 1.2 section 5.15.6).

#![no_main]

use std::io;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use devices::testkit::memory;
use devices::virtio::mem::{Mem, MemConfig, PluggableMemory};
use inlay_fuzz::{Case, Request, play_with};
use libfuzzer_sys::fuzz_target;

const ADDR: u64 = 4 << 30;
const BLOCK: u64 = 2 << 20;
const BLOCKS: usize = 16;

#[derive(Arbitrary, Debug)]
struct MemRequest {
    kind: u8,
    block: u8,
    offset: Option<u64>,
    blocks: u16,
}

impl Request for MemRequest {
    fn bytes(&self) -> Vec<u8> {
        let addr = (ADDR + u64::from(self.block % 20) * BLOCK).wrapping_add(self.offset.unwrap_or(0));
        let blocks = if self.blocks > 0xff00 { self.blocks } else { self.blocks % 20 };
        let kind = u16::from(self.kind % 5);
        [&kind.to_le_bytes()[..], &[0; 6], &addr.to_le_bytes(), &blocks.to_le_bytes(), &[0; 6]].concat()
    }
}

/// Keeps its own books: nothing is plugged twice, and nothing beyond the end.
#[derive(Clone, Default)]
struct Books(Arc<Mutex<[bool; BLOCKS]>>);

impl Books {
    fn turn(&self, offset: u64, len: u64, plugged: bool) {
        assert!(offset % BLOCK == 0 && len % BLOCK == 0, "Whole blocks: {offset:#x}, {len:#x}");
        let mut books = self.0.lock().expect("Books");
        for block in offset / BLOCK..(offset + len) / BLOCK {
            let entry = &mut books[usize::try_from(block).expect("A block")];
            assert!(!plugged || !*entry, "Block {block} is plugged twice");
            *entry = plugged;
        }
    }
}

impl PluggableMemory for Books {
    fn plug(&self, offset: u64, len: u64) -> io::Result<()> {
        self.turn(offset, len, true);
        Ok(())
    }

    fn unplug(&self, offset: u64, len: u64) -> io::Result<()> {
        self.turn(offset, len, false);
        Ok(())
    }
}

fuzz_target!(|case: Case<MemRequest>| {
    let size = BLOCKS as u64 * BLOCK;
    let config = MemConfig { size, block_size: BLOCK, requested: size / 2, node: 0 };
    let books = Books::default();
    let (mem, handle) = Mem::new(config, ADDR, Box::new(books)).expect("A region");
    let host = move |said: &[u8]| {
        if let [blocks, ..] = said {
            let _ = handle.set_requested(u64::from(*blocks) * BLOCK);
        }
        assert!(handle.plugged() <= size, "No more than there is");
    };
    play_with(Box::new(mem), memory(), &case, Box::new(host));
});
