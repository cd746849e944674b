//! Entropy.

/// A source of entropy for the guest: the host's `/dev/urandom`. There is nothing to choose yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RngConfig;
