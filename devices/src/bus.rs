//! The way a processor reaches a device: reads and writes at an offset of its window.

/// A device behind a window of port I/O or memory-mapped I/O.
///
/// Calls come from vCPU threads, from several at once: a device locks what it shares. `data` is
/// 1, 2, 4 or 8 bytes as the guest chose; an access that the device does not define is ignored
/// (reads leave `data` zeroed, as the bus hands it over), never an error and never a panic.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what stands at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Stores `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}
