//! Physical memory.

/// The guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryConfig {
    /// Bytes, whole pages.
    pub size: u64,
}

impl MemoryConfig {
    /// A memory of `mib` MiB.
    pub fn from_mib(mib: u32) -> Self {
        Self { size: u64::from(mib) << 20 }
    }
}
