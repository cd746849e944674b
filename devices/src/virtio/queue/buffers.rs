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

    /// Fills the buffers from `file`, starting at byte `offset`.
    pub fn read_exact_at(self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.transfer(offset, io::ErrorKind::UnexpectedEof, |vectors, count, offset| {
            // SAFETY: as in `read_from`.
            unsafe { libc::preadv64(file.as_raw_fd(), vectors, count, offset) }
        })
    }

    /// Writes the buffers to `file`, starting at byte `offset`.
    pub fn write_all_at(self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.transfer(offset, io::ErrorKind::WriteZero, |vectors, count, offset| {
            // SAFETY: as in `read_from`.
            unsafe { libc::pwritev64(file.as_raw_fd(), vectors, count, offset) }
        })
    }

    /// Calls until every byte is through; a call that moves none is the error `on_zero`.
    fn transfer(
        mut self,
        mut offset: u64,
        on_zero: io::ErrorKind,
        call: impl Fn(*const libc::iovec, libc::c_int, libc::off64_t) -> isize,
    ) -> io::Result<()> {
        let mut rest = self.vectors.as_mut_slice();
        while !rest.is_empty() {
            let at = libc::off64_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            let (vectors, count) = first_call(rest);
            let moved = retry(|| call(vectors, count, at))?;
            if moved == 0 {
                return Err(on_zero.into());
            }
            offset = offset.saturating_add(moved as u64);
            rest = advance(rest, moved);
        }
        Ok(())
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
