//! A descriptor chain, read from guest memory once.

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory as _, GuestMemoryError};

use super::{GuestBuffers, HeldBuffers, QueueError};
use crate::GuestMemory;

/// Bytes of one entry of the descriptor table (virtio 1.2 section 2.7.5).
const DESCRIPTOR_SIZE: u64 = 16;

/// A part of a buffer that lies in one memory region.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    addr: GuestAddress,
    len: u32,
}

/// The descriptor table of a queue, or one that a descriptor refers to (section 2.7.5.3).
struct Table {
    addr: u64,
    /// Entries.
    len: u16,
    is_indirect: bool,
}

impl Table {
    fn of(queue: &Queue) -> Self {
        Self { addr: queue.desc_table(), len: queue.size(), is_indirect: false }
    }

    fn read(&self, memory: &GuestMemory, index: u16) -> Result<Descriptor, QueueError> {
        if index >= self.len {
            return Err(QueueError::DescriptorIndex(index));
        }
        let offset = u64::from(index).saturating_mul(DESCRIPTOR_SIZE);
        let addr = GuestAddress(self.addr.wrapping_add(offset));
        memory.read_obj(addr).map_err(|source| QueueError::Memory { addr: addr.0, len: DESCRIPTOR_SIZE, source })
    }

    /// The table that `descriptor`, the one at `index` here, refers to. It is the last of its chain, there is one such
    /// table in it, and that is no longer than the queue (section 2.7.5.3.1).
    fn referred_to(&self, descriptor: &Descriptor, index: u16, queue: &Queue) -> Result<Self, QueueError> {
        let malformed = || QueueError::IndirectTable(index);
        let bytes = u64::from(descriptor.len());
        let len = bytes.checked_div(DESCRIPTOR_SIZE).and_then(|len| u16::try_from(len).ok()).ok_or_else(malformed)?;
        let is_whole = bytes.is_multiple_of(DESCRIPTOR_SIZE) && (1..=queue.size()).contains(&len);
        if self.is_indirect || descriptor.has_next() || !is_whole {
            return Err(malformed());
        }
        Ok(Self { addr: descriptor.addr().0, len, is_indirect: true })
    }
}

/// A chain of buffers that the driver made available.
///
/// Each descriptor was copied from guest memory once and checked: the chain ends, its length fits
/// 32 bits, readable buffers come before writable ones, and every byte is guest memory. The
/// contents of the buffers stay the guest's: it may change them at any time.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    /// How many of the segments are for the device to read; the rest is for it to write.
    readable: usize,
    readable_len: u32,
    /// Bytes of all segments.
    total_len: u32,
}

impl Chain {
    pub(super) fn parse(
        memory: &GuestMemory,
        queue: &Queue,
        indirect: bool,
        head: u16,
        mut segments: Vec<Segment>,
    ) -> Result<Self, QueueError> {
        segments.clear();
        let mut chain = Self { head, segments, readable: 0, readable_len: 0, total_len: 0 };
        let mut writable = false;
        let mut table = Table::of(queue);
        let mut index = head;
        // A chain cannot have more descriptors than the queue, and one that refers to others, unless it has a loop.
        for _ in 0..=queue.size() {
            let descriptor = table.read(memory, index)?;
            if descriptor.refers_to_indirect_table() {
                if !indirect {
                    return Err(QueueError::Indirect(index));
                }
                table = table.referred_to(&descriptor, index, queue)?;
                index = 0;
                continue;
            }
            if writable && !descriptor.is_write_only() {
                return Err(QueueError::Order(index));
            }
            writable = descriptor.is_write_only();
            chain.push(memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
        Err(QueueError::Endless(head))
    }

    /// Appends one descriptor's buffer. An empty one adds nothing.
    fn push(&mut self, memory: &GuestMemory, descriptor: &Descriptor) -> Result<(), QueueError> {
        let mut addr = descriptor.addr();
        let outside = |source| memory_error(descriptor.addr(), descriptor.len(), source);
        // Contiguous memory may be two regions (a plugged one after a built-in one), so a buffer
        // may have two parts.
        for slice in memory.get_slices(addr, descriptor.len() as usize) {
            let len = u32::try_from(slice.map_err(outside)?.len()).map_err(|_| QueueError::TooLong(self.head))?;
            self.segments.push(Segment { addr, len });
            addr = GuestAddress(addr.0.wrapping_add(u64::from(len)));
        }
        self.total_len = self.total_len.checked_add(descriptor.len()).ok_or(QueueError::TooLong(self.head))?;
        if !descriptor.is_write_only() {
            self.readable = self.segments.len();
            self.readable_len = self.total_len;
        }
        Ok(())
    }

    /// Index of the chain's first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The bytes for the device to read.
    pub fn readable(&self) -> Segments<'_> {
        let segments = self.segments.get(..self.readable).unwrap_or_default();
        Segments { segments, start: 0, len: self.readable_len }
    }

    /// The bytes for the device to write.
    pub fn writable(&self) -> Segments<'_> {
        let segments = self.segments.get(self.readable..).unwrap_or_default();
        Segments { segments, start: 0, len: self.total_len.saturating_sub(self.readable_len) }
    }

    /// The malformed-request error of this chain.
    pub fn malformed(&self) -> QueueError {
        QueueError::Request(self.head)
    }

    pub(super) fn into_storage(self) -> Vec<Segment> {
        self.segments
    }
}

/// A run of bytes in the buffers of a chain, without regard for where one buffer ends.
#[derive(Clone, Copy, Debug)]
pub struct Segments<'a> {
    segments: &'a [Segment],
    /// Bytes of `segments` before the run.
    start: u32,
    len: u32,
}

impl<'a> Segments<'a> {
    /// Length in bytes.
    pub fn len(self) -> u32 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The first `at` bytes and the rest, or `None` when there are fewer than `at`.
    pub fn split_at(self, at: u32) -> Option<(Self, Self)> {
        let rest = self.len.checked_sub(at)?;
        let start = self.start.checked_add(at)?;
        Some((Self { len: at, ..self }, Self { segments: self.segments, start, len: rest }))
    }

    /// Copies the first bytes out of guest memory; `None` when there are too few for a `T`.
    pub fn read_obj<T: ByteValued + Default>(self, memory: &GuestMemory) -> Result<Option<T>, QueueError> {
        let mut object = T::default();
        let copied = self.read(memory, object.as_mut_slice())?;
        Ok((copied == size_of::<T>()).then_some(object))
    }

    /// Copies bytes out of guest memory until `target` is full or the run ends; returns how many.
    pub fn read(self, memory: &GuestMemory, target: &mut [u8]) -> Result<usize, QueueError> {
        let mut copied: usize = 0;
        for (addr, len) in self.ranges() {
            let Some(rest) = target.get_mut(copied..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            let count = rest.len().min(len as usize);
            let (part, _) = rest.split_at_mut(count);
            memory.read_slice(part, addr).map_err(|source| memory_error(addr, len, source))?;
            copied = copied.saturating_add(count);
        }
        Ok(copied)
    }

    /// Copies `source` into guest memory until it or the run ends; returns how many bytes.
    pub fn write(self, memory: &GuestMemory, source: &[u8]) -> Result<usize, QueueError> {
        let mut copied: usize = 0;
        for (addr, len) in self.ranges() {
            let Some(rest) = source.get(copied..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            let count = rest.len().min(len as usize);
            let (part, _) = rest.split_at(count);
            memory.write_slice(part, addr).map_err(|source| memory_error(addr, len, source))?;
            copied = copied.saturating_add(count);
        }
        Ok(copied)
    }

    /// The run as a list of host buffers for the kernel to read into or write from.
    pub fn buffers(self, memory: &GuestMemory) -> Result<GuestBuffers<'_>, QueueError> {
        let mut buffers = GuestBuffers::default();
        self.append_to(memory, &mut buffers)?;
        Ok(buffers)
    }

    /// Like [`buffers`](Self::buffers), for an operation that goes on after the chain is put aside.
    pub fn held_buffers(self, memory: &GuestMemory) -> Result<HeldBuffers, QueueError> {
        Ok(HeldBuffers::new(self.buffers(memory)?, memory))
    }

    /// Appends the run to a list of host buffers.
    pub fn append_to<'m>(self, memory: &'m GuestMemory, buffers: &mut GuestBuffers<'m>) -> Result<(), QueueError> {
        for (addr, len) in self.ranges() {
            let slice = memory.get_slice(addr, len as usize).map_err(|source| memory_error(addr, len, source))?;
            buffers.push(&slice);
        }
        Ok(())
    }

    /// Where the run lies: guest address and length of each part, none of them empty.
    pub fn ranges(self) -> impl Iterator<Item = (GuestAddress, u32)> + 'a {
        let mut skip = self.start;
        let mut left = self.len;
        self.segments.iter().filter_map(move |segment| {
            let skipped = skip.min(segment.len);
            skip = skip.saturating_sub(skipped);
            let len = segment.len.saturating_sub(skipped).min(left);
            left = left.saturating_sub(len);
            let addr = GuestAddress(segment.addr.0.wrapping_add(u64::from(skipped)));
            (len > 0).then_some((addr, len))
        })
    }
}

fn memory_error(addr: GuestAddress, len: u32, source: GuestMemoryError) -> QueueError {
    QueueError::Memory { addr: addr.0, len: u64::from(len), source }
}
