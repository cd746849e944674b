//! What the log is told about a driver's mistakes. A guest can make as many as it likes, so that the host's disk must not
//! depend on their number.

use std::error::Error;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{Value, warn};

/// Complaints about a device that the log is told in each [`WINDOW`]: enough to see what a driver does wrong, and no more
/// than a few megabytes in a year of it.
pub const MAX_TOLD: u32 = 10;

/// The time in which no more than [`MAX_TOLD`] are told.
pub const WINDOW: Duration = Duration::from_secs(600);

/// What is said of a device that has given up on its driver.
pub const STOPS: &str = "The device stops until the driver resets it";

/// Complaints about one device.
#[derive(Debug, Default)]
pub struct Complaints(Mutex<Told>);

#[derive(Debug, Default)]
struct Told {
    /// When the window began.
    since: Option<Instant>,
    told: u32,
    untold: u64,
}

impl Told {
    /// Whether one may be told at this time; then how many were not since the last that was.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            (self.since, self.told) = (Some(now), 0);
        }
        if self.told >= MAX_TOLD {
            self.untold = self.untold.saturating_add(1);
            return None;
        }
        self.told = self.told.saturating_add(1);
        Some(std::mem::take(&mut self.untold))
    }
}

impl Complaints {
    /// Tells the log what is wrong with `device` and why, unless it was told much lately.
    pub fn tell(&self, device: impl Value, reason: &(dyn Error + 'static), what: &str) {
        let admitted = self.0.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now());
        match admitted {
            Some(0) => warn!(device, reason, "{what}"),
            Some(untold) => warn!(device, reason, untold, "{what}"),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_told_up_to_their_limit_and_not_one_past_it() {
        let mut told = Told::default();
        let start = Instant::now();
        for _ in 0..MAX_TOLD {
            assert_eq!(told.admit(start), Some(0));
        }
        let end = start + WINDOW;
        for now in [start, end - Duration::from_nanos(1)] {
            assert_eq!(told.admit(now), None);
        }
        // The next window's first tells of those.
        assert_eq!(told.admit(end), Some(2));
        assert_eq!(told.admit(end), Some(0));
    }

    #[test]
    fn a_clock_that_goes_back_opens_no_window() {
        let mut told = Told::default();
        let start = Instant::now() + WINDOW;
        for _ in 0..MAX_TOLD {
            told.admit(start);
        }
        assert_eq!(told.admit(start - WINDOW), None);
    }
}
