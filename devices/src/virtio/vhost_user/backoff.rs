//! When to try again.

use std::time::{Duration, Instant};

use super::Patience;

/// Pauses that grow while a backend is away, and an end to it.
///
/// A backend that comes and goes at once is away as well: only one that stayed for [`Patience::longest_retry`] makes the
/// pauses short again.
#[derive(Debug)]
pub struct Backoff {
    patience: Patience,
    pause: Duration,
    away_since: Option<Instant>,
    here_since: Option<Instant>,
}

impl Backoff {
    /// Nobody is away yet.
    pub fn new(patience: Patience) -> Self {
        Self { patience, pause: patience.first_retry, away_since: None, here_since: None }
    }

    /// The backend works since `now`.
    pub fn arrived(&mut self, now: Instant) {
        self.here_since = Some(now);
    }

    /// The backend is away, or an attempt to reach it failed. Returns for how long to wait until the next attempt, or
    /// `None` when there should be none.
    pub fn pause(&mut self, now: Instant) -> Option<Duration> {
        let stayed = self.here_since.take().map(|since| now.saturating_duration_since(since));
        if stayed.is_some_and(|stayed| stayed >= self.patience.longest_retry) {
            self.away_since = None;
            self.pause = self.patience.first_retry;
        }
        let away_since = *self.away_since.get_or_insert(now);
        if now.saturating_duration_since(away_since) >= self.patience.absence {
            return None;
        }
        let pause = self.pause;
        self.pause = pause.saturating_mul(2).min(self.patience.longest_retry);
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Patience = Patience {
        answers: Duration::ZERO,
        first_retry: Duration::from_millis(10),
        longest_retry: Duration::from_millis(50),
        absence: Duration::from_secs(1),
    };

    #[test]
    fn pauses_grow_to_their_limit_and_end() {
        let mut backoff = Backoff::new(PATIENCE);
        let now = Instant::now();
        let pauses: Vec<_> = (0..5).map(|_| backoff.pause(now).unwrap().as_millis()).collect();
        assert_eq!(pauses, [10, 20, 40, 50, 50]);
        assert!(backoff.pause(now + PATIENCE.absence - Duration::from_millis(1)).is_some());
        assert_eq!(backoff.pause(now + PATIENCE.absence), None);
    }

    #[test]
    fn only_a_backend_that_stays_makes_pauses_short_again() {
        let mut backoff = Backoff::new(PATIENCE);
        let mut now = Instant::now();
        backoff.arrived(now);
        assert_eq!(backoff.pause(now), Some(PATIENCE.first_retry));
        // It comes and goes at once, until the absence is too long.
        let mut attempts = 0;
        loop {
            now += Duration::from_millis(49);
            backoff.arrived(now);
            if backoff.pause(now).is_none() {
                break;
            }
            attempts += 1;
        }
        assert_eq!(attempts, 20);
        backoff.arrived(now);
        assert_eq!(backoff.pause(now + PATIENCE.longest_retry), Some(PATIENCE.first_retry));
    }
}
