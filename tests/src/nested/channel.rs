//! The channel between the machine and the nested host: frames over one virtio-serial port.
//!
//! ```text
//! kind: u8 | size: u32, little-endian | payload
//! ```
//! The nested host says `Hello`, the machine answers with one `Request`; then come any number of
//! `Stdout`, `Stderr` and `Beat`, and one `Exit` at the end.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The port's name, below `/sys/class/virtio-ports/*/name`.
pub const PORT: &str = "inlay.channel";

/// The longest payload: output is cut into pieces of at most this size.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// What to run in the nested host.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Request {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// All of its environment.
    pub env: Vec<(String, String)>,
    /// Its working directory.
    pub cwd: String,
}

/// One message.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// The nested host is up.
    Hello,
    /// What to run.
    Request(Request),
    /// A piece of the command's standard output.
    Stdout(Vec<u8>),
    /// A piece of the command's standard error.
    Stderr(Vec<u8>),
    /// The command ended with this code: its own, or 128 + the signal that ended it.
    Exit(i32),
    /// The nested host's clock goes on: milliseconds since its start.
    Beat(u64),
}

impl Frame {
    /// Writes the frame with one call to `write_all`, so that writers that take turns keep frames whole.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, payload) = match self {
            Self::Hello => (0, Vec::new()),
            Self::Request(request) => (1, serde_json::to_vec(request)?),
            Self::Stdout(bytes) => (2, bytes.clone()),
            Self::Stderr(bytes) => (3, bytes.clone()),
            Self::Exit(code) => (4, code.to_le_bytes().to_vec()),
            Self::Beat(ms) => (5, ms.to_le_bytes().to_vec()),
        };
        let size = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let mut bytes = vec![kind];
        bytes.extend_from_slice(&size.to_le_bytes());
        bytes.extend_from_slice(&payload);
        to.write_all(&bytes)
    }

    /// Reads one frame.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut head = [0; 5];
        from.read_exact(&mut head)?;
        let [kind, size @ ..] = head;
        let size = u32::from_le_bytes(size) as usize;
        if size > MAX_PAYLOAD {
            return Err(io::Error::other(format!("A frame of {size} bytes is longer than {MAX_PAYLOAD}")));
        }
        let mut payload = vec![0; size];
        from.read_exact(&mut payload)?;
        let wrong = |_| io::Error::other("A frame's payload has the wrong size");
        match kind {
            0 => Ok(Self::Hello),
            1 => Ok(Self::Request(serde_json::from_slice(&payload)?)),
            2 => Ok(Self::Stdout(payload)),
            3 => Ok(Self::Stderr(payload)),
            4 => Ok(Self::Exit(i32::from_le_bytes(payload.try_into().map_err(wrong)?))),
            5 => Ok(Self::Beat(u64::from_le_bytes(payload.try_into().map_err(wrong)?))),
            _ => Err(io::Error::other(format!("A frame has the unknown kind {kind}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_way() {
        let request = Request { argv: vec!["true".into()], env: vec![("A".into(), "b".into())], cwd: "/".into() };
        let frames = [
            Frame::Hello,
            Frame::Request(request),
            Frame::Stdout(b"out".to_vec()),
            Frame::Stderr(Vec::new()),
            Frame::Exit(-1),
            Frame::Beat(7),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.write(&mut bytes).unwrap();
        }
        let mut from = bytes.as_slice();
        for frame in &frames {
            assert_eq!(Frame::read(&mut from).unwrap(), *frame);
        }
        assert!(from.is_empty());
    }

    #[test]
    fn an_overlong_frame_is_refused() {
        let mut bytes = vec![2];
        bytes.extend_from_slice(&u32::MAX.to_le_bytes());
        assert!(Frame::read(&mut bytes.as_slice()).is_err());
    }
}
