//! Reading a block request and answering it (virtio 1.2 section 5.2.6). No engine, no events.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{ByteValued, Le32, Le64};

use super::config::{
    MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_WRITE_ZEROES_SECTORS, MAX_WRITE_ZEROES_SEGMENTS, SECTOR_SIZE,
};
use super::image::Disk;
use super::metrics::RequestKind;
use super::operation::{ByteRange, Erasure, Operation};
use super::transfer::Direction;
use crate::GuestMemory;
use crate::virtio::queue::{Chain, QueueError, Segments};

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

/// One range of a discard or a write of zeroes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RangeSegment {
    sector: Le64,
    num_sectors: Le32,
    flags: Le32,
}

// SAFETY: three integers without padding between or after them; any bytes are valid.
unsafe impl ByteValued for RangeSegment {}

const RANGE_SIZE: u32 = 16;
const _: () = assert!(size_of::<RangeSegment>() == RANGE_SIZE as usize);

const STATUS_SIZE: u32 = 1;

/// What the status byte of a request says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    /// The request is understood but cannot be done.
    IoError,
    /// The request is of an unknown kind.
    Unsupported,
}

impl Status {
    fn code(self) -> u8 {
        let code = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        u8::try_from(code).unwrap_or(u8::MAX)
    }
}

/// What a request asks for.
pub(super) struct Request {
    pub action: Action,
    /// Bytes of data that it moves.
    pub bytes: u32,
}

#[expect(clippy::large_enum_variant, reason = "there is one at a time, and boxing it would cost each request")]
pub(super) enum Action {
    /// Answered with a status alone.
    Refuse(Status),
    /// The serial number.
    Identify,
    /// Work on the image, which writes `written` bytes to the chain when it succeeds.
    Run { kind: RequestKind, operation: Operation, written: u32 },
}

enum Refusal {
    Status(Status),
    Queue(QueueError),
}

impl From<QueueError> for Refusal {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
}

const IO_ERROR: Refusal = Refusal::Status(Status::IoError);
const UNSUPPORTED: Refusal = Refusal::Status(Status::Unsupported);

/// Reads requests to a [`Disk`].
pub(super) struct Requests {
    disk: Arc<Disk>,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    /// Writes may be in a cache when they are complete.
    writeback: Arc<AtomicBool>,
    features: u64,
}

impl Requests {
    /// For a driver that accepted `features`.
    pub fn new(
        disk: Arc<Disk>,
        serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
        writeback: Arc<AtomicBool>,
        features: u64,
    ) -> Self {
        Self { disk, serial, writeback, features }
    }

    /// Reads the request in `chain`. Its header and ranges are looked at once. Nothing is done.
    ///
    /// An error is a chain that cannot even be answered.
    pub fn read(&self, memory: &GuestMemory, chain: &Chain) -> Result<Request, QueueError> {
        let (data_in, _) = split_status(chain)?;
        let (head, data_out) = chain.readable().split_at(HEADER_SIZE).ok_or_else(|| chain.malformed())?;
        let header = head.read_obj(memory)?.ok_or_else(|| chain.malformed())?;
        match self.interpret(memory, header, data_out, data_in) {
            Ok(request) => Ok(request),
            Err(Refusal::Status(status)) => Ok(Request { action: Action::Refuse(status), bytes: 0 }),
            Err(Refusal::Queue(error)) => Err(error),
        }
    }

    /// Writes the serial number; returns the bytes written and the status.
    pub fn identify(&self, memory: &GuestMemory, chain: &Chain) -> Result<(u32, Status), QueueError> {
        let (data_in, _) = split_status(chain)?;
        data_in.write(memory, &self.serial)?;
        Ok((VIRTIO_BLK_ID_BYTES, Status::Ok))
    }

    fn interpret(
        &self,
        memory: &GuestMemory,
        header: Header,
        data_out: Segments<'_>,
        data_in: Segments<'_>,
    ) -> Result<Request, Refusal> {
        let sector = header.sector.to_native();
        match header.kind.to_native() {
            VIRTIO_BLK_T_IN => self.transfer(memory, Direction::Read, sector, data_in, false),
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                self.transfer(memory, Direction::Write, sector, data_out, self.must_be_stable())
            }
            VIRTIO_BLK_T_FLUSH => {
                let operation = Operation::flush();
                Ok(Request { action: Action::Run { kind: RequestKind::Flush, operation, written: 0 }, bytes: 0 })
            }
            VIRTIO_BLK_T_GET_ID if data_in.len() < VIRTIO_BLK_ID_BYTES => Err(IO_ERROR),
            VIRTIO_BLK_T_GET_ID => Ok(Request { action: Action::Identify, bytes: 0 }),
            VIRTIO_BLK_T_DISCARD => self.discard(memory, data_out),
            VIRTIO_BLK_T_WRITE_ZEROES => self.write_zeroes(memory, data_out),
            _ => Err(UNSUPPORTED),
        }
    }

    fn transfer(
        &self,
        memory: &GuestMemory,
        direction: Direction,
        sector: u64,
        data: Segments<'_>,
        stable: bool,
    ) -> Result<Request, Refusal> {
        let bytes = data.len();
        let position = self.disk.position(sector, bytes.into()).ok_or(IO_ERROR)?;
        let transfer = self.disk.transfer(direction, position, bytes, data.held_buffers(memory)?);
        let (kind, written) = match direction {
            Direction::Read => (RequestKind::Read, bytes),
            Direction::Write => (RequestKind::Write, 0),
        };
        let operation = Operation::transfer(transfer, stable);
        Ok(Request { action: Action::Run { kind, operation, written }, bytes })
    }

    /// Section 5.2.6.2: the `unmap` flag means nothing to a discard, and unknown flags mean that
    /// the driver wants what this device does not do.
    fn discard(&self, memory: &GuestMemory, data: Segments<'_>) -> Result<Request, Refusal> {
        let ranges = self.ranges(memory, data, VIRTIO_BLK_F_DISCARD, MAX_DISCARD_SEGMENTS)?;
        if ranges.iter().any(|range| range.flags.to_native() != 0) {
            return Err(UNSUPPORTED);
        }
        self.erase(Erasure::Discard, &ranges, MAX_DISCARD_SECTORS)
    }

    fn write_zeroes(&self, memory: &GuestMemory, data: Segments<'_>) -> Result<Request, Refusal> {
        let ranges = self.ranges(memory, data, VIRTIO_BLK_F_WRITE_ZEROES, MAX_WRITE_ZEROES_SEGMENTS)?;
        let flags = ranges.first().map_or(0, |range| range.flags.to_native());
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
            return Err(UNSUPPORTED);
        }
        let erasure = if flags == 0 { Erasure::Zero } else { Erasure::ZeroUnmap };
        self.erase(erasure, &ranges, MAX_WRITE_ZEROES_SECTORS)
    }

    /// The ranges in `data`, read once.
    fn ranges(
        &self,
        memory: &GuestMemory,
        data: Segments<'_>,
        feature: u32,
        max: u32,
    ) -> Result<Vec<RangeSegment>, Refusal> {
        self.check_writable()?;
        if self.features & (1 << feature) == 0 {
            return Err(UNSUPPORTED);
        }
        let count = data.len() / RANGE_SIZE;
        if count == 0 || count > max || !data.len().is_multiple_of(RANGE_SIZE) {
            return Err(IO_ERROR);
        }
        let mut ranges = Vec::with_capacity(count as usize);
        let mut rest = data;
        while let Some((range, behind)) = rest.split_at(RANGE_SIZE) {
            ranges.extend(range.read_obj::<RangeSegment>(memory)?);
            rest = behind;
        }
        Ok(ranges)
    }

    fn erase(&self, erasure: Erasure, segments: &[RangeSegment], max_sectors: u32) -> Result<Request, Refusal> {
        let mut ranges = VecDeque::with_capacity(segments.len());
        for segment in segments {
            let sectors = segment.num_sectors.to_native();
            if sectors > max_sectors {
                return Err(IO_ERROR);
            }
            let len = u64::from(sectors).saturating_mul(SECTOR_SIZE.into());
            let position = self.disk.position(segment.sector.to_native(), len).ok_or(IO_ERROR)?;
            if len > 0 {
                ranges.push_back(ByteRange { position, len });
            }
        }
        let operation = Operation::erase(erasure, ranges, self.must_be_stable());
        Ok(Request { action: Action::Run { kind: RequestKind::Erase, operation, written: 0 }, bytes: 0 })
    }

    fn check_writable(&self) -> Result<(), Refusal> {
        if self.disk.read_only() { Err(IO_ERROR) } else { Ok(()) }
    }

    fn must_be_stable(&self) -> bool {
        !self.writeback.load(Ordering::Acquire)
    }
}

/// Writes the status of a request that wrote `written` bytes; returns how many the driver finds.
pub(super) fn answer(memory: &GuestMemory, chain: &Chain, status: Status, written: u32) -> Result<u32, QueueError> {
    let (_, place) = split_status(chain)?;
    place.write(memory, &[status.code()])?;
    Ok(written.saturating_add(STATUS_SIZE))
}

/// The data for the device to write, and the place of the status: the last byte. Without one there
/// is no way to answer.
fn split_status(chain: &Chain) -> Result<(Segments<'_>, Segments<'_>), QueueError> {
    let writable = chain.writable();
    let data_len = writable.len().checked_sub(STATUS_SIZE).ok_or_else(|| chain.malformed())?;
    writable.split_at(data_len).ok_or_else(|| chain.malformed())
}
