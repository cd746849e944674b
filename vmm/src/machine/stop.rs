//! The end from outside.

use std::sync::PoisonError;

use super::{ExitReason, Machine};

impl Machine {
    /// Ends the machine, whatever the guest is doing, waits until its threads have left, and gives
    /// its memory back. A second call does nothing. The reason of a machine that ended before stays.
    pub fn stop(&self) {
        self.control.end(ExitReason::Stopped);
        // Who waits for memory gets it, or is told that there is none; nobody waits for somebody else's answer.
        if let Some(lazy) = &self.lazy {
            lazy.hurry();
        }
        self.live.hurry();
        self.control.join();
        for event_loop in &self.loops {
            event_loop.stop();
        }
        if let Some(lazy) = &self.lazy {
            lazy.stop();
        }
        self.live.wait_until_copied();
        drop(self.hardware.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}
