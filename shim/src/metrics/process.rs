//! What a sandbox's process takes of the host's memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Sums over all mappings of the process (proc_pid_smaps_rollup(5)).
const FILE: &str = "/proc/self/smaps_rollup";
/// Longest content that is read: it has some 25 lines of 30 bytes.
const MAX_LEN: usize = 4096;

/// Memory of a process, guest memory included, each page shared by n processes counted as the nth part of one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessMemory {
    /// Bytes that would be free if the process ended.
    pub private: u64,
    /// Its part of what it has in common with others, in bytes.
    pub shared: u64,
}

/// The file that tells it, opened while the process may still open whatever it likes.
#[derive(Debug, Clone)]
pub struct Meter(Arc<File>);

impl Meter {
    /// For this process.
    pub fn open() -> io::Result<Self> {
        File::open(FILE).map(|file| Self(Arc::new(file)))
    }

    /// How much it is now. The kernel walks all page tables: with gigabytes of guest memory that takes milliseconds.
    pub fn read(&self) -> Option<ProcessMemory> {
        let mut text = [0; MAX_LEN];
        let length = self.0.read_at(&mut text, 0).ok()?;
        parse(&String::from_utf8_lossy(text.get(..length)?))
    }
}

fn parse(text: &str) -> Option<ProcessMemory> {
    let kib = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
    };
    let private = kib("Private_Clean")?.checked_add(kib("Private_Dirty")?)?;
    // The kernel rounds each sum on its own.
    Some(ProcessMemory { private, shared: kib("Pss")?.saturating_sub(private) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_pages_count_in_part() {
        let text = "5500-7fff ---p 00000000 00:00 0    [rollup]\nRss:   9 kB\nPss:                  10 kB\nPss_Dirty:   3 kB\n\
                    Private_Clean:         1 kB\nPrivate_Dirty:         6 kB\n";
        assert_eq!(parse(text), Some(ProcessMemory { private: 7 << 10, shared: 3 << 10 }));
        for broken in ["", "Pss: 10 kB\n", "Pss: x kB\nPrivate_Clean: 1 kB\nPrivate_Dirty: 6 kB\n"] {
            assert_eq!(parse(broken), None, "{broken:?}");
        }
        let overflow = format!("Pss: 1 kB\nPrivate_Clean: {} kB\nPrivate_Dirty: 6 kB\n", u64::MAX);
        assert_eq!(parse(&overflow), None);
    }

    #[test]
    fn the_file_is_read_anew_each_time() {
        let meter = Meter::open().unwrap();
        let before = meter.read().unwrap();
        assert!(before.private > 0);
        let block = vec![1_u8; 64 << 20];
        let with_block = meter.read().unwrap();
        assert!(with_block.private > before.private + (48 << 20), "{before:?} {with_block:?}");
        drop(std::hint::black_box(block));
    }
}
