//! Answering a block request (virtio 1.2 section 5.2.6).

use std::io;
use std::sync::Arc;

use tracing::debug;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{ByteValued, Le32, Le64};

use super::disk::Disk;
use crate::GuestMemory;
use crate::virtio::queue::{Chain, QueueError, Segments};
use crate::virtio::worker::ChainHandler;

/// The first readable bytes of each request; they may be spread over descriptors.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Header {
    kind: Le32,
    reserved: Le32,
    sector: Le64,
}

// SAFETY: three integers without padding between or after them; any bytes are valid.
unsafe impl ByteValued for Header {}

const HEADER_SIZE: u32 = 16;
const _: () = assert!(size_of::<Header>() == HEADER_SIZE as usize);

const STATUS_SIZE: u32 = 1;

/// Serves requests from a [`Disk`].
pub struct RequestHandler {
    disk: Arc<Disk>,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    /// Writes are stable before they complete.
    write_through: bool,
}

/// What the status byte says about a request that did not succeed.
enum Refusal {
    /// The request is understood but cannot be done.
    Io,
    /// The request type is not known.
    Unsupported,
    /// The driver broke the queue's rules.
    Queue(QueueError),
}

impl From<QueueError> for Refusal {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        debug!(%error, "A disk request fails");
        Self::Io
    }
}

impl RequestHandler {
    /// A handler that gives `serial` for the drive's identity.
    pub fn new(disk: Arc<Disk>, serial: [u8; VIRTIO_BLK_ID_BYTES as usize], write_through: bool) -> Self {
        Self { disk, serial, write_through }
    }

    /// Does the request and returns how many bytes of `data_in` it wrote.
    fn execute(
        &self,
        memory: &GuestMemory,
        header: Header,
        data_out: Segments<'_>,
        data_in: Segments<'_>,
    ) -> Result<u32, Refusal> {
        let sector = header.sector.to_native();
        match header.kind.to_native() {
            VIRTIO_BLK_T_IN => {
                let position = self.disk.position(sector, data_in.len()).ok_or(Refusal::Io)?;
                self.disk.read(data_in.buffers(memory)?, position)?;
                Ok(data_in.len())
            }
            VIRTIO_BLK_T_OUT => {
                if self.disk.read_only() {
                    return Err(Refusal::Io);
                }
                let position = self.disk.position(sector, data_out.len()).ok_or(Refusal::Io)?;
                self.disk.write(data_out.buffers(memory)?, position)?;
                if self.write_through {
                    self.disk.flush()?;
                }
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                self.disk.flush()?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                if data_in.len() < VIRTIO_BLK_ID_BYTES {
                    return Err(Refusal::Io);
                }
                data_in.write(memory, &self.serial)?;
                Ok(VIRTIO_BLK_ID_BYTES)
            }
            _ => Err(Refusal::Unsupported),
        }
    }
}

impl ChainHandler for RequestHandler {
    fn handle(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<u32, QueueError> {
        let writable = chain.writable();
        // The status is the last byte; without a place for it there is no way to answer.
        let data_len = writable.len().checked_sub(STATUS_SIZE).ok_or_else(|| chain.malformed())?;
        let (data_in, status) = writable.split_at(data_len).ok_or_else(|| chain.malformed())?;
        let readable = chain.readable();
        let (head, data_out) = readable.split_at(HEADER_SIZE).ok_or_else(|| chain.malformed())?;
        let header = head.read_obj(memory)?.ok_or_else(|| chain.malformed())?;

        let (code, written) = match self.execute(memory, header, data_out, data_in) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Refusal::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Refusal::Queue(error)) => return Err(error),
        };
        status.write(memory, &[u8::try_from(code).unwrap_or(u8::MAX)])?;
        Ok(written.saturating_add(STATUS_SIZE))
    }
}
