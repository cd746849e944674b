//! The packet header (virtio 1.2 section 5.10.6).
//!
//! The `virtio-vsock` crate wants header and payload in at most two descriptors; Linux since 6.7
//! sends more for payloads that are page fragments. So the 44 bytes are laid out here, and
//! [`Segments`](crate::virtio::queue::Segments) takes them from any number of descriptors.

use vm_memory::{ByteValued, Le16, Le32, Le64};

/// Bytes that a header takes on the ring.
pub const HEADER_SIZE: usize = 44;

/// The same, as queues count.
pub const HEADER_LEN: u32 = 44;

/// The context id that guests use for their host (`VMADDR_CID_HOST`).
pub const HOST_CID: u64 = 2;

/// The only packet type served: connected byte streams (`VIRTIO_VSOCK_TYPE_STREAM`).
pub const TYPE_STREAM: u16 = 1;

/// Flag of a SHUTDOWN: its sender receives no more.
pub const SHUTDOWN_RCV: u32 = 1;

/// Flag of a SHUTDOWN: its sender sends no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// Both directions of a connection.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

/// What a packet asks for (section 5.10.6.6).
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts a connection.
    pub const RESPONSE: u16 = 2;
    /// Refuses or ends a connection.
    pub const RST: u16 = 3;
    /// Ends one or both directions.
    pub const SHUTDOWN: u16 = 4;
    /// Carries payload.
    pub const RW: u16 = 5;
    /// Tells how much may be sent.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for a credit update.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A packet header in the host's byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload after the header.
    pub len: u32,
    /// Socket type, see [`TYPE_STREAM`].
    pub kind: u16,
    /// See [`op`].
    pub op: u16,
    /// Depends on `op`.
    pub flags: u32,
    /// Size of the sender's receive buffer for this connection.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

/// A header as it lies in guest memory: little endian, without padding.
#[derive(Clone, Copy, Default)]
#[repr(C, packed)]
struct Wire {
    src_cid: Le64,
    dst_cid: Le64,
    src_port: Le32,
    dst_port: Le32,
    len: Le32,
    kind: Le16,
    op: Le16,
    flags: Le32,
    buf_alloc: Le32,
    fwd_cnt: Le32,
}

const _: () = assert!(size_of::<Wire>() == HEADER_SIZE);

// SAFETY: plain integers without padding (packed), for which every bit pattern is a value.
unsafe impl ByteValued for Wire {}

impl Header {
    /// Reads a header from its bytes.
    pub fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Self {
        let mut wire = Wire::default();
        wire.as_mut_slice().copy_from_slice(bytes);
        Self {
            src_cid: wire.src_cid.to_native(),
            dst_cid: wire.dst_cid.to_native(),
            src_port: wire.src_port.to_native(),
            dst_port: wire.dst_port.to_native(),
            len: wire.len.to_native(),
            kind: wire.kind.to_native(),
            op: wire.op.to_native(),
            flags: wire.flags.to_native(),
            buf_alloc: wire.buf_alloc.to_native(),
            fwd_cnt: wire.fwd_cnt.to_native(),
        }
    }

    /// Lays the header out for guest memory.
    pub fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let wire = Wire {
            src_cid: self.src_cid.into(),
            dst_cid: self.dst_cid.into(),
            src_port: self.src_port.into(),
            dst_port: self.dst_port.into(),
            len: self.len.into(),
            kind: self.kind.into(),
            op: self.op.into(),
            flags: self.flags.into(),
            buf_alloc: self.buf_alloc.into(),
            fwd_cnt: self.fwd_cnt.into(),
        };
        let mut bytes = [0; HEADER_SIZE];
        bytes.copy_from_slice(wire.as_slice());
        bytes
    }

    /// The RST that answers this packet: same type, addresses swapped.
    pub fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_laid_out_as_the_specification_says() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: HOST_CID,
            src_port: 0x1122_3344,
            dst_port: 1024,
            len: 5,
            kind: TYPE_STREAM,
            op: op::RW,
            flags: 3,
            buf_alloc: 0x8000,
            fwd_cnt: 0xffff_fffe,
        };
        let bytes = header.to_bytes();
        assert_eq!(&bytes[..8], &[8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(&bytes[16..20], &[0x44, 0x33, 0x22, 0x11]);
        assert_eq!(&bytes[24..32], &[5, 0, 0, 0, 1, 0, 5, 0]);
        assert_eq!(&bytes[40..], &[0xfe, 0xff, 0xff, 0xff]);
        assert_eq!(Header::from_bytes(&bytes), header);
    }

    #[test]
    fn reset_goes_back_to_the_sender() {
        let request = Header { src_cid: 3, dst_cid: 2, src_port: 7, dst_port: 9, op: op::REQUEST, ..Header::default() };
        let reset = request.reset_reply();
        assert_eq!((reset.src_cid, reset.dst_cid, reset.src_port, reset.dst_port), (2, 3, 9, 7));
        assert_eq!(reset.op, op::RST);
    }
}
