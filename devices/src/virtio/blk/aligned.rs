//! Memory of this process that direct I/O takes.

/// What any direct I/O asks of an address, in bytes.
pub(super) const ALIGNMENT: usize = 4096;

/// Zeroed memory whose first byte is at a multiple of [`ALIGNMENT`].
pub(super) struct AlignedMemory {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedMemory {
    pub fn new(len: usize) -> Self {
        let memory = vec![0; len.saturating_add(ALIGNMENT)];
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { memory, start, len }
    }

    pub fn bytes(&self) -> &[u8] {
        let end = self.start.saturating_add(self.len);
        self.memory.get(self.start..end).unwrap_or_default()
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let end = self.start.saturating_add(self.len);
        self.memory.get_mut(self.start..end).unwrap_or_default()
    }
}
