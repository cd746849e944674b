//! How much a device may do in a time: token buckets for operations and for bytes.
//!
//! [`Budget`] is the pure half: it is asked with a time in hand and knows no clock. It belongs to
//! the configuration half of a device, so that a reset by the driver does not fill it.
//! [`RateLimiter`] is the glue for an active half: it asks with the time of now, and when the
//! answer is no its timer becomes readable as soon as the answer is yes.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

/// A bucket that fills by `size` tokens in each `refill` and holds no more than `size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketConfig {
    /// Tokens that a full bucket has: operations or bytes.
    pub size: NonZeroU64,
    /// Tokens on top of a full bucket at the beginning, which never come back.
    pub one_time_burst: u64,
    /// How long an empty bucket takes to be full, in nanoseconds.
    pub refill_ns: NonZeroU64,
}

impl BucketConfig {
    /// `rate` tokens a second, saved for at most one second, and no burst.
    pub fn per_second(rate: NonZeroU64) -> Self {
        Self { size: rate, one_time_burst: 0, refill_ns: NANOSECONDS_PER_SECOND }
    }
}

const NANOSECONDS_PER_SECOND: NonZeroU64 = match NonZeroU64::new(1_000_000_000) {
    Some(count) => count,
    None => NonZeroU64::MIN,
};

/// What a device may do; `None` is without limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Requests or frames.
    pub ops: Option<BucketConfig>,
    /// Bytes of their data.
    pub bytes: Option<BucketConfig>,
}

impl RateLimits {
    /// Whether there is no limit at all.
    pub fn is_unlimited(&self) -> bool {
        self.ops.is_none() && self.bytes.is_none()
    }
}

/// Tokens of one kind.
#[derive(Debug)]
struct TokenBucket {
    config: BucketConfig,
    /// What can be taken; below zero after an operation that costs more than a full bucket.
    balance: i128,
    burst: u64,
    /// Progress to the next token: elapsed nanoseconds times `size`, below `refill_ns`.
    partial: u128,
    filled: Instant,
}

impl TokenBucket {
    fn new(config: BucketConfig, now: Instant) -> Self {
        let balance = config.size.get().into();
        Self { config, balance, burst: config.one_time_burst, partial: 0, filled: now }
    }

    /// Adds the tokens of the time since the last call. Nothing is lost to rounding.
    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled).as_nanos();
        self.filled = self.filled.max(now);
        let size = u128::from(self.config.size.get());
        let refill = u128::from(self.config.refill_ns.get());
        let progress = elapsed.saturating_mul(size).saturating_add(self.partial);
        let tokens = i128::try_from(progress.div_euclid(refill)).unwrap_or(i128::MAX);
        self.partial = progress.rem_euclid(refill);
        let full = i128::from(self.config.size.get());
        self.balance = self.balance.saturating_add(tokens);
        if self.balance >= full {
            self.balance = full;
            self.partial = 0;
        }
    }

    /// How long it takes until `cost` can be taken, after [`fill`](Self::fill).
    fn wait(&self, cost: u64) -> Option<Duration> {
        let cost = cost.saturating_sub(self.burst);
        // What is larger than the bucket waits until it is full and is paid for afterwards:
        // otherwise it would wait for ever.
        let missing = i128::from(cost.min(self.config.size.get())).saturating_sub(self.balance);
        let missing = u128::try_from(missing).ok().filter(|missing| cost > 0 && *missing > 0)?;
        let progress = missing.saturating_mul(self.config.refill_ns.get().into()).saturating_sub(self.partial);
        let nanoseconds = progress.div_ceil(self.config.size.get().into());
        Some(Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)))
    }

    fn take(&mut self, cost: u64) {
        let from_burst = cost.min(self.burst);
        self.burst = self.burst.saturating_sub(from_burst);
        self.balance = self.balance.saturating_sub(cost.saturating_sub(from_burst).into());
    }
}

/// What is left of a device's [`RateLimits`].
#[derive(Debug)]
pub struct Budget {
    ops: Option<TokenBucket>,
    bytes: Option<TokenBucket>,
}

impl Budget {
    /// Full buckets.
    pub fn new(limits: RateLimits, now: Instant) -> Self {
        let bucket = |config: BucketConfig| TokenBucket::new(config, now);
        Self { ops: limits.ops.map(bucket), bytes: limits.bytes.map(bucket) }
    }

    /// Takes one operation on `bytes` bytes, from both buckets or from none; the error is how
    /// long it takes until that can be done.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        for bucket in [&mut self.ops, &mut self.bytes].into_iter().flatten() {
            bucket.fill(now);
        }
        let wait = |bucket: &Option<TokenBucket>, cost| bucket.as_ref().and_then(|bucket| bucket.wait(cost));
        if let Some(wait) = wait(&self.ops, 1).max(wait(&self.bytes, bytes)) {
            return Err(wait);
        }
        for (bucket, cost) in [(&mut self.ops, 1), (&mut self.bytes, bytes)] {
            if let Some(bucket) = bucket {
                bucket.take(cost);
            }
        }
        Ok(())
    }
}

/// A [`Budget`] with a clock and a timer, which an active half watches for
/// [`EventSet::IN`](event_manager::EventSet::IN).
pub struct RateLimiter {
    budget: Arc<Mutex<Budget>>,
    timer: TimerFd,
    /// The timer runs: everything waits for it, so that nothing overtakes what was refused.
    waiting: bool,
}

impl RateLimiter {
    /// A limiter on what is left of `budget`.
    pub fn new(budget: Arc<Mutex<Budget>>) -> io::Result<Self> {
        Ok(Self { budget, timer: TimerFd::new()?, waiting: false })
    }

    /// Whether an operation on `bytes` bytes may be done now. When not, the timer becomes
    /// readable at the time when it is worth to ask again.
    pub fn admit(&mut self, bytes: u64) -> bool {
        if self.waiting {
            return false;
        }
        let taken = self.budget.lock().unwrap_or_else(PoisonError::into_inner).take(bytes, Instant::now());
        let Err(wait) = taken else { return true };
        // Zero would disarm the timer. Without a timer the operation is done rather than lost.
        self.waiting = self.timer.reset(wait.max(Duration::from_nanos(1)), None).is_ok();
        !self.waiting
    }

    /// The timer was readable: it is not any more, and [`admit`](Self::admit) can be asked again.
    pub fn acknowledge_timer(&mut self) {
        if self.waiting {
            // Reading would block when the event is an old one; to disarm does not.
            let _ = self.timer.clear();
            self.waiting = false;
        }
    }
}

impl AsRawFd for RateLimiter {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    fn bucket(size: u64, one_time_burst: u64, refill: Duration) -> BucketConfig {
        let refill_ns = NonZeroU64::new(refill.as_nanos() as u64).unwrap();
        BucketConfig { size: NonZeroU64::new(size).unwrap(), one_time_burst, refill_ns }
    }

    fn ops(config: BucketConfig) -> RateLimits {
        RateLimits { ops: Some(config), bytes: None }
    }

    fn bytes(config: BucketConfig) -> RateLimits {
        RateLimits { ops: None, bytes: Some(config) }
    }

    #[test]
    fn a_full_bucket_is_spent_and_comes_back_with_time() {
        let start = Instant::now();
        let mut budget = Budget::new(ops(bucket(10, 0, 100 * MS)), start);
        for _ in 0..10 {
            assert_eq!(budget.take(0, start), Ok(()));
        }
        assert_eq!(budget.take(0, start), Err(10 * MS));
        assert_eq!(budget.take(0, start + 9 * MS), Err(MS));
        assert_eq!(budget.take(0, start + 10 * MS), Ok(()));
        assert_eq!(budget.take(0, start + 10 * MS), Err(10 * MS));
    }

    #[test]
    fn what_is_saved_is_never_more_than_a_full_bucket() {
        let start = Instant::now();
        let mut budget = Budget::new(ops(bucket(3, 0, MS)), start);
        let later = start + Duration::from_secs(3600);
        assert_eq!((0..4).filter(|_| budget.take(0, later).is_ok()).count(), 3);
    }

    #[test]
    fn a_burst_is_spent_first_and_once() {
        let start = Instant::now();
        let mut budget = Budget::new(ops(bucket(2, 5, MS)), start);
        assert_eq!((0..9).filter(|_| budget.take(0, start).is_ok()).count(), 7);
        let later = start + Duration::from_secs(1);
        assert_eq!((0..9).filter(|_| budget.take(0, later).is_ok()).count(), 2);
    }

    #[test]
    fn an_operation_larger_than_the_bucket_is_done_and_paid_for_afterwards() {
        let start = Instant::now();
        let mut budget = Budget::new(bytes(bucket(1000, 0, 100 * MS)), start);
        assert_eq!(budget.take(2500, start), Ok(()));
        // 1500 of debt and 1 token: 150.1 ms.
        assert_eq!(budget.take(1, start), Err(Duration::from_micros(150_100)));
        // The next large one waits for a full bucket.
        assert_eq!(budget.take(2500, start), Err(250 * MS));
        assert_eq!(budget.take(2500, start + 250 * MS), Ok(()));
    }

    #[test]
    fn both_buckets_or_none() {
        let start = Instant::now();
        let limits = RateLimits { ops: Some(bucket(2, 0, 10 * MS)), bytes: Some(bucket(100, 0, 10 * MS)) };
        let mut budget = Budget::new(limits, start);
        assert_eq!(budget.take(100, start), Ok(()));
        for _ in 0..5 {
            // No operation is lost to a byte limit that refuses.
            assert_eq!(budget.take(50, start), Err(5 * MS));
        }
        assert_eq!(budget.take(0, start), Ok(()), "What has no bytes does not wait for them");
        assert_eq!(budget.take(0, start), Err(5 * MS));
    }

    #[test]
    fn a_clock_that_stands_or_goes_back_gives_nothing() {
        let start = Instant::now() + Duration::from_secs(10);
        let mut budget = Budget::new(ops(bucket(1, 0, 10 * MS)), start);
        assert_eq!(budget.take(0, start), Ok(()));
        assert_eq!(budget.take(0, start - Duration::from_secs(5)), Err(10 * MS));
        assert_eq!(budget.take(0, start), Err(10 * MS));
        assert_eq!(budget.take(0, start + 10 * MS), Ok(()));
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let start = Instant::now();
        let largest = BucketConfig { size: NonZeroU64::MAX, one_time_burst: u64::MAX, refill_ns: NonZeroU64::MIN };
        let slowest = BucketConfig { size: NonZeroU64::MIN, one_time_burst: 0, refill_ns: NonZeroU64::MAX };
        let mut budget = Budget::new(RateLimits { ops: Some(largest), bytes: Some(largest) }, start);
        for _ in 0..3 {
            let _ = budget.take(u64::MAX, start + Duration::from_secs(u64::from(u32::MAX)));
        }
        let mut budget = Budget::new(bytes(slowest), start);
        assert_eq!(budget.take(u64::MAX, start), Ok(()));
        assert_eq!(budget.take(u64::MAX, start), Err(Duration::from_nanos(u64::MAX)));
    }

    proptest! {
        /// Whatever is asked and whenever: what was granted never exceeds burst + size + rate x
        /// time, and a driver that waits as told is served.
        #[test]
        fn the_rate_is_kept_and_waiting_helps(
            size in 1..5000_u64,
            burst in 0..3000_u64,
            refill_us in 1..50_000_u64,
            steps in prop::collection::vec((0..2000_u64, 0..3_000_000_u64), 1..100),
        ) {
            let start = Instant::now();
            let config = bucket(size, burst, Duration::from_micros(refill_us));
            let mut budget = Budget::new(bytes(config), start);
            let mut now = start;
            let mut granted = 0_u128;
            for (cost, pause) in steps {
                // More than a bucket is paid for later; that is another test's.
                let cost = cost.min(size);
                now += Duration::from_nanos(pause);
                if let Err(wait) = budget.take(cost, now) {
                    now += wait;
                    prop_assert_eq!(budget.take(cost, now), Ok(()));
                }
                granted += u128::from(cost);
                let elapsed = (now - start).as_nanos();
                let allowed = u128::from(size + burst)
                    + elapsed * u128::from(size) / u128::from(config.refill_ns.get());
                prop_assert!(granted <= allowed, "{} of {}", granted, allowed);
            }
        }
    }

    #[test]
    fn the_timer_becomes_readable_when_it_is_worth_to_ask_again() {
        let limits = ops(bucket(1, 0, 5 * MS));
        let budget = Arc::new(Mutex::new(Budget::new(limits, Instant::now())));
        let mut limiter = RateLimiter::new(Arc::clone(&budget)).unwrap();
        assert!(limiter.admit(0));
        assert!(!limiter.admit(0));
        assert!(!limiter.admit(0), "Nothing overtakes what was refused");
        limiter.timer.wait().unwrap();
        limiter.acknowledge_timer();
        assert!(limiter.admit(0));
        // An event that came too early is harmless.
        limiter.acknowledge_timer();
        // Another active half goes on where the last one stopped.
        let mut next = RateLimiter::new(budget).unwrap();
        assert!(!next.admit(0));
    }
}
