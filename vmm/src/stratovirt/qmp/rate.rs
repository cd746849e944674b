//! How many requests a client may make.

use std::time::{Duration, Instant};

/// Requests in a second, as StratoVirt has it.
pub const MAX_REQUESTS_PER_SECOND: u32 = 100;

const SECOND: Duration = Duration::from_secs(1);

/// Counts requests in windows of a second.
#[derive(Debug)]
pub struct RateLimit {
    window: Instant,
    admitted: u32,
}

impl RateLimit {
    /// A limit that nobody has used yet.
    pub fn new(now: Instant) -> Self {
        Self { window: now, admitted: 0 }
    }

    /// Whether a request that comes `now` is served.
    pub fn admit(&mut self, now: Instant) -> bool {
        if now.duration_since(self.window) >= SECOND {
            *self = Self::new(now);
        }
        let admitted = self.admitted < MAX_REQUESTS_PER_SECOND;
        self.admitted += u32::from(admitted);
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundred_are_served_and_the_next_waits_for_the_next_second() {
        let start = Instant::now();
        let mut limit = RateLimit::new(start);
        assert!((0..MAX_REQUESTS_PER_SECOND).all(|_| limit.admit(start)));
        assert!(!limit.admit(start));
        assert!(!limit.admit(start + SECOND - Duration::from_nanos(1)));
        assert!(limit.admit(start + SECOND));
    }
}
