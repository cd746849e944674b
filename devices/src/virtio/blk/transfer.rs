//! Moving bytes between an image and guest memory, one call to the kernel after the other.

use std::io;

use super::aligned::AlignedMemory;
use crate::virtio::queue::HeldBuffers;

/// Bytes of this process's own memory that one transfer takes at most: what cannot go straight
/// to or from guest memory is moved in pieces of this size.
pub(super) const MAX_PIECE: usize = 64 << 10;

/// Which way the bytes go, as the disk sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

/// Bytes of an image that are on their way.
pub(super) struct Transfer {
    direction: Direction,
    position: u64,
    left: u64,
    data: Data,
}

enum Data {
    /// The kernel gets the guest's buffers as they are.
    Guest(HeldBuffers),
    /// Piece by piece through this process's memory.
    Bounced { buffers: HeldBuffers, piece: Piece, granularity: usize },
    /// Nothing of the guest's: zeroes are written.
    Zeroes(Piece),
}

/// What one call is asked to move.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub vectors: *const libc::iovec,
    pub count: libc::c_int,
    /// Byte position in the image.
    pub position: u64,
}

impl Transfer {
    /// Moves all of `buffers` from or to byte `position`, with nothing between the kernel and them.
    pub fn straight(direction: Direction, position: u64, len: u32, buffers: HeldBuffers) -> Self {
        Self { direction, position, left: len.into(), data: Data::Guest(buffers) }
    }

    /// Like [`straight`](Self::straight), through this process's own memory. Calls begin at
    /// multiples of `granularity` when `position` is one.
    pub fn bounced(direction: Direction, position: u64, len: u32, buffers: HeldBuffers, granularity: usize) -> Self {
        let left = u64::from(len);
        let data = Data::Bounced { buffers, piece: Piece::new(left), granularity };
        Self { direction, position, left, data }
    }

    /// Writes `len` zeroes from byte `position`.
    pub fn zeroes(position: u64, len: u64) -> Self {
        Self { direction: Direction::Write, position, left: len, data: Data::Zeroes(Piece::new(len)) }
    }

    /// Which way the bytes go.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Whether every byte is through.
    pub fn is_done(&self) -> bool {
        self.left == 0
    }

    /// The next call. What it points to stays in place until [`moved`](Self::moved) is called.
    pub fn next_call(&mut self) -> Call {
        let (position, left) = (self.position, self.left);
        let (vectors, count) = match &mut self.data {
            Data::Guest(buffers) => buffers.next_call(),
            Data::Bounced { buffers, piece, .. } => {
                let bytes = piece.limit_to(left);
                if self.direction == Direction::Write {
                    buffers.copy_to(bytes);
                }
                piece.vector()
            }
            Data::Zeroes(piece) => {
                piece.limit_to(left);
                piece.vector()
            }
        };
        Call { vectors, count, position }
    }

    /// For an image that is not moved by the kernel: its position and the next piece of a
    /// transfer that is not straight, to be filled or to be taken from; then
    /// [`moved`](Self::moved) is called.
    pub fn next_piece(&mut self) -> Option<(u64, &mut [u8])> {
        let bytes = match &mut self.data {
            Data::Guest(_) => return None,
            Data::Bounced { buffers, piece, .. } => {
                let bytes = piece.limit_to(self.left);
                if self.direction == Direction::Write {
                    buffers.copy_to(bytes);
                }
                bytes
            }
            Data::Zeroes(piece) => piece.limit_to(self.left),
        };
        Some((self.position, bytes))
    }

    /// The last call moved `count` bytes. None is an error: the image ended, or is full.
    pub fn moved(&mut self, count: usize) -> io::Result<()> {
        let mut count = count;
        match &mut self.data {
            Data::Guest(buffers) => buffers.advance(count),
            Data::Bounced { buffers, piece, granularity } => {
                // A rest that is not whole cannot be asked for by itself; it is moved again.
                count = count.saturating_sub(count.checked_rem(*granularity).unwrap_or_default());
                if self.direction == Direction::Read {
                    buffers.copy_from(piece.bytes(count));
                }
                buffers.advance(count);
            }
            Data::Zeroes(_) => {}
        }
        if count == 0 {
            return Err(match self.direction {
                Direction::Read => io::ErrorKind::UnexpectedEof.into(),
                Direction::Write => io::ErrorKind::WriteZero.into(),
            });
        }
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.position = self.position.saturating_add(count);
        self.left = self.left.saturating_sub(count);
        Ok(())
    }
}

/// Memory of this process as a vector for the kernel.
struct Piece {
    memory: AlignedMemory,
    /// Bytes of the current piece.
    len: usize,
    /// In a vector so that it stays in place when this is moved.
    vector: Vec<libc::iovec>,
}

// SAFETY: the vector points into `memory`, which is this piece's own and does not move with it.
unsafe impl Send for Piece {}

impl Piece {
    /// Zeroed memory for pieces of a transfer of `len` bytes.
    fn new(len: u64) -> Self {
        let len = usize::try_from(len).map_or(MAX_PIECE, |len| len.min(MAX_PIECE));
        Self { memory: AlignedMemory::new(len), len, vector: Vec::with_capacity(1) }
    }

    /// The piece of a transfer that has `left` bytes to go.
    fn limit_to(&mut self, left: u64) -> &mut [u8] {
        self.len = usize::try_from(left).map_or(self.len, |left| self.len.min(left));
        self.memory.bytes_mut().get_mut(..self.len).unwrap_or_default()
    }

    fn bytes(&self, count: usize) -> &[u8] {
        self.memory.bytes().get(..count.min(self.len)).unwrap_or_default()
    }

    fn vector(&mut self) -> (*const libc::iovec, libc::c_int) {
        let bytes = self.memory.bytes_mut().get_mut(..self.len).unwrap_or_default();
        let vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        self.vector.clear();
        self.vector.push(vector);
        (self.vector.as_ptr(), 1)
    }
}
