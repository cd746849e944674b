//! Guest buffers handed to the kernel as they are: no copy through this process.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

use crate::GuestMemory;

/// Buffers that one system call takes at most (`IOV_MAX` of Linux).
const MAX_BUFFERS_PER_CALL: usize = 1024;

/// Buffers in guest memory as an I/O vector.
///
/// The guest can read and write them at any time, so no Rust reference to their bytes is ever
/// made: only the kernel touches them.
#[derive(Default)]
pub struct GuestBuffers<'m> {
    vectors: Vec<libc::iovec>,
    /// The vectors point into mappings that this borrow keeps alive.
    memory: PhantomData<&'m GuestMemory>,
}

impl<'m> GuestBuffers<'m> {
    pub(super) fn push(&mut self, slice: &VolatileSlice<'m>) {
        self.vectors.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
    }

    /// Length of all buffers in bytes.
    pub fn len(&self) -> usize {
        self.vectors.iter().fold(0, |sum, vector| sum.saturating_add(vector.iov_len))
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads once from `source` into the buffers: one packet of a tap device.
    pub fn read_from(&self, source: BorrowedFd<'_>) -> io::Result<usize> {
        let (vectors, count) = first_call(&self.vectors);
        retry(|| {
            // SAFETY: each vector describes guest memory that is mapped as long as `self` lives,
            // and `count` is not above the number of vectors.
            unsafe { libc::readv(source.as_raw_fd(), vectors, count) }
        })
    }

    /// Writes the buffers to `sink` once: one packet of a tap device.
    pub fn write_to(&self, sink: BorrowedFd<'_>) -> io::Result<usize> {
        let (vectors, count) = first_call(&self.vectors);
        retry(|| {
            // SAFETY: as in `read_from`.
            unsafe { libc::writev(sink.as_raw_fd(), vectors, count) }
        })
    }

    /// Writes `head` and then the buffers to `sink` once, as one packet: for a beginning that was
    /// checked and must not change any more.
    pub fn write_behind(&self, head: &[u8], sink: BorrowedFd<'_>) -> io::Result<usize> {
        let first = libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
        let vectors: Vec<libc::iovec> = std::iter::once(first).chain(self.vectors.iter().copied()).collect();
        let (vectors, count) = first_call(&vectors);
        retry(|| {
            // SAFETY: the first vector is the live slice `head`, which writing to a file only
            // reads; the others are as in `read_from`.
            unsafe { libc::writev(sink.as_raw_fd(), vectors, count) }
        })
    }
}

/// Buffers in guest memory for an operation that runs on its own, and how far it has come.
///
/// They keep the guest's memory mapped. As with [`GuestBuffers`], the guest can change their
/// bytes at any time, so they are only handed to the kernel or copied.
pub struct HeldBuffers {
    vectors: Vec<libc::iovec>,
    /// How many of the vectors are through.
    done: usize,
    /// What the vectors point into.
    _memory: GuestMemory,
}

// SAFETY: the vectors are addresses in mappings that `_memory` keeps, which are the same for
// every thread, and nothing is reached through them but by copying or by the kernel.
unsafe impl Send for HeldBuffers {}

impl HeldBuffers {
    /// Holds `buffers`, which were made of this `memory`.
    pub(super) fn new(buffers: GuestBuffers<'_>, memory: &GuestMemory) -> Self {
        Self { vectors: buffers.vectors, done: 0, _memory: memory.clone() }
    }

    /// What is left, as one system call takes it: a list of vectors and its length. The list
    /// stays in place until the next call of [`advance`](Self::advance).
    pub fn next_call(&self) -> (*const libc::iovec, libc::c_int) {
        first_call(self.left())
    }

    /// Drops the first `bytes` bytes.
    pub fn advance(&mut self, bytes: usize) {
        let left = self.vectors.get_mut(self.done..).unwrap_or_default();
        let before = left.len();
        let after = advance(left, bytes).len();
        self.done = self.done.saturating_add(before.saturating_sub(after));
    }

    /// Whether each buffer begins and ends at a multiple of `alignment` in this process.
    pub fn is_aligned(&self, alignment: usize) -> bool {
        let aligned = |vector: &libc::iovec| {
            vector.iov_base.addr().is_multiple_of(alignment) && vector.iov_len.is_multiple_of(alignment)
        };
        self.left().iter().all(aligned)
    }

    /// Copies the first bytes to `target`; returns how many there were.
    pub fn copy_to(&self, target: &mut [u8]) -> usize {
        let mut copied: usize = 0;
        for slice in self.slices() {
            let Some(rest) = target.get_mut(copied..).filter(|rest| !rest.is_empty()) else { break };
            copied = copied.saturating_add(slice.copy_to(rest));
        }
        copied
    }

    /// Copies `source` to the first bytes, as far as there are any.
    pub fn copy_from(&self, source: &[u8]) {
        let mut rest = source;
        for slice in self.slices() {
            if rest.is_empty() {
                break;
            }
            let (part, behind) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(part);
            rest = behind;
        }
    }

    fn left(&self) -> &[libc::iovec] {
        self.vectors.get(self.done..).unwrap_or_default()
    }

    fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.left().iter().map(|vector| {
            // SAFETY: each vector describes guest memory that stays mapped as long as `self`
            // lives, and volatile accesses are how memory shared with a guest is accessed.
            unsafe { VolatileSlice::new(vector.iov_base.cast(), vector.iov_len) }
        })
    }
}

/// The vectors as one system call takes them.
fn first_call(vectors: &[libc::iovec]) -> (*const libc::iovec, libc::c_int) {
    let count = vectors.len().min(MAX_BUFFERS_PER_CALL);
    (vectors.as_ptr(), libc::c_int::try_from(count).unwrap_or_default())
}

/// Drops the first `bytes` bytes of the vectors.
fn advance(vectors: &mut [libc::iovec], mut bytes: usize) -> &mut [libc::iovec] {
    let mut whole: usize = 0;
    for vector in vectors.iter() {
        let Some(left) = bytes.checked_sub(vector.iov_len) else { break };
        bytes = left;
        whole = whole.saturating_add(1);
    }
    let rest = vectors.get_mut(whole..).unwrap_or_default();
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(bytes);
        first.iov_len = first.iov_len.saturating_sub(bytes);
    }
    rest
}

/// Runs a system call until it is not interrupted by a signal.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(moved) => return Ok(moved),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
