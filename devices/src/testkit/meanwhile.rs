//! Another processor of the guest that does something all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Runs a closure again and again in a thread until it is dropped.
pub struct Meanwhile {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Meanwhile {
    /// Starts to run `action`, which gets the number of the turn.
    pub fn repeat(mut action: impl FnMut(u32) + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut turn = 0_u32;
            while !stopped.load(Ordering::Relaxed) {
                action(turn);
                turn = turn.wrapping_add(1);
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Meanwhile {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            // A second panic while a failed test unwinds would hide the first.
            if !std::thread::panicking() {
                result.expect("No panic in the other thread");
            }
        }
    }
}
