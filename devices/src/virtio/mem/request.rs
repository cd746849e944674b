//! Requests of the driver (section 5.15.6), read once.

/// Bytes of a request: type, padding, address, number of blocks, padding.
pub const REQUEST_SIZE: usize = 24;

/// Bytes of a response: type, padding, state.
pub const RESPONSE_SIZE: u32 = 10;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// A part of the region as the driver names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Guest physical address.
    pub addr: u64,
    /// Number of blocks.
    pub blocks: u16,
}

/// What a driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Blocks.
    Plug(Part),
    /// To be rid of blocks.
    Unplug(Part),
    /// To be rid of all.
    UnplugAll,
    /// Whether blocks are plugged.
    State(Part),
    /// What nobody knows.
    Unknown(u16),
}

impl Request {
    /// Reads a request.
    pub fn parse(bytes: [u8; REQUEST_SIZE]) -> Self {
        let [t0, t1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = bytes;
        let part =
            Part { addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]), blocks: u16::from_le_bytes([n0, n1]) };
        match u16::from_le_bytes([t0, t1]) {
            PLUG => Self::Plug(part),
            UNPLUG => Self::Unplug(part),
            UNPLUG_ALL => Self::UnplugAll,
            STATE => Self::State(part),
            other => Self::Unknown(other),
        }
    }
}

/// What a driver is told. The values are those of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Answer {
    /// Done.
    Ack = 0,
    /// It would have more than it is to have.
    Nack = 1,
    /// Not now.
    Busy = 2,
    /// The request makes no sense.
    Error = 3,
}

impl Answer {
    /// The response with `state`, 0 where there is none.
    pub fn to_bytes(self, state: u16) -> [u8; RESPONSE_SIZE as usize] {
        let ([t0, t1], [s0, s1]) = ((self as u16).to_le_bytes(), state.to_le_bytes());
        [t0, t1, 0, 0, 0, 0, 0, 0, s0, s1]
    }
}
