//! Replaceable devices.

/// How many drives and network interfaces the guest sees from the start, with something behind them or not; see
/// [`crate::hotplug`]. Where there are slots of a kind, all devices of the kind are in them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SlotConfig {
    /// Drives.
    pub blk: u8,
    /// Network interfaces.
    pub net: u8,
}

impl SlotConfig {
    /// What a guest of StratoVirt's microvm machine sees.
    pub const STRATOVIRT: Self = Self { blk: 4, net: 2 };
}
