//! Control messages (section 5.3.6.2): 8 bytes of port, event and value, and a name after some.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// A message as it stands in memory.
pub const MESSAGE_SIZE: usize = 8;

/// Events.
const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What a driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// It knows control messages, or does not want any.
    DeviceReady(bool),
    /// It has set a port up, or could not.
    PortReady(u32, bool),
    /// A program of the guest opened a port, or closed it.
    PortOpen(u32, bool),
}

impl Said {
    /// Reads a message; `None` when it means nothing.
    pub fn parse(message: [u8; MESSAGE_SIZE]) -> Option<Self> {
        let [p0, p1, p2, p3, e0, e1, v0, v1] = message;
        let port = u32::from_le_bytes([p0, p1, p2, p3]);
        let value = u16::from_le_bytes([v0, v1]) == 1;
        match u16::from_le_bytes([e0, e1]) {
            DEVICE_READY => Some(Self::DeviceReady(value)),
            PORT_READY => Some(Self::PortReady(port, value)),
            PORT_OPEN => Some(Self::PortOpen(port, value)),
            _ => None,
        }
    }
}

/// What a device has to say about one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Saying {
    /// It exists.
    Add,
    /// It is a console.
    Console,
    /// It has a name.
    Name,
    /// Somebody is at the host's end, or nobody any more.
    Open(bool),
}

/// The messages about one port that wait for a buffer: at most one of each kind, so that a host
/// that comes and goes, and a driver that asks and asks, fill nothing.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Sayings(VecDeque<Saying>);

impl Sayings {
    /// Appends a message and drops an older one of its kind.
    pub fn push(&mut self, saying: Saying) {
        let kind = std::mem::discriminant(&saying);
        self.0.retain(|waiting| std::mem::discriminant(waiting) != kind);
        self.0.push_back(saying);
    }

    /// The message that is next.
    pub fn first(&self) -> Option<Saying> {
        self.0.front().copied()
    }

    /// The first message was sent.
    pub fn sent(&mut self) {
        self.0.pop_front();
    }
}

impl Saying {
    /// The message as it stands in memory.
    pub fn to_bytes(self, port: u32, name: &str) -> Vec<u8> {
        let (event, value): (u16, u16) = match self {
            Self::Add => (DEVICE_ADD, 1),
            Self::Console => (CONSOLE_PORT, 1),
            Self::Name => (PORT_NAME, 1),
            Self::Open(open) => (PORT_OPEN, open.into()),
        };
        let mut bytes = Vec::with_capacity(MESSAGE_SIZE.saturating_add(name.len()));
        bytes.extend(port.to_le_bytes());
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        if self == Self::Name {
            bytes.extend(name.as_bytes());
        }
        bytes
    }
}
