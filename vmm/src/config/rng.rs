//! Entropy.

use devices::virtio::rate_limiter::RateLimits;

/// A source of entropy for the guest: the host's `/dev/urandom`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RngConfig {
    /// How much the guest gets in a time; without limit by default.
    pub limits: RateLimits,
}
