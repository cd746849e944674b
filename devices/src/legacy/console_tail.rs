//! The end of what a guest wrote to its console, kept for error reports.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that are kept: enough for a kernel's last words with a stack trace for each processor.
pub const CONSOLE_TAIL_SIZE: usize = 64 << 10;

/// The last [`CONSOLE_TAIL_SIZE`] bytes of a console. Clones share them.
#[derive(Clone, Default)]
pub struct ConsoleTail {
    bytes: Arc<Mutex<VecDeque<u8>>>,
}

impl ConsoleTail {
    /// A copy of what is kept.
    pub fn snapshot(&self) -> Vec<u8> {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.iter().copied().collect()
    }

    pub(super) fn push(&self, byte: u8) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes.len() >= CONSOLE_TAIL_SIZE {
            bytes.pop_front();
        }
        bytes.push_back(byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_bytes_at_the_limit_and_one_past_it() {
        let tail = ConsoleTail::default();
        tail.push(1);
        for _ in 1..CONSOLE_TAIL_SIZE {
            tail.push(2);
        }
        let full = tail.snapshot();
        assert_eq!((full.len(), full[0]), (CONSOLE_TAIL_SIZE, 1));
        tail.push(3);
        let past = tail.snapshot();
        assert_eq!((past.len(), past[0], past[CONSOLE_TAIL_SIZE - 1]), (CONSOLE_TAIL_SIZE, 2, 3));
    }
}
