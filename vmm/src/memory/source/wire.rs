//! What is said between a machine that needs chunks and one that has them: a request, and a reply with its bytes behind it.
//!
//! Both are messages in postcard's format, with their length as 4 bytes, little-endian, before them.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::index::Sum;

/// Most bytes of a message. The longest has a checksum.
pub const MAX_MESSAGE: usize = 64;

/// Bytes before a message.
pub const LENGTH: usize = 4;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The index of chunks, as its file has it.
    Index,
    /// A chunk, as the file of chunks has it.
    Chunk(Sum),
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// So many bytes follow.
    Found(u32),
    /// There is no such thing.
    Missing,
}

/// A message with its length before it; empty for one that cannot be encoded, of which there is none.
pub fn encode(message: &impl Serialize) -> Vec<u8> {
    let body = postcard::to_stdvec(message).unwrap_or_default();
    let length = u32::try_from(body.len()).unwrap_or_default();
    length.to_le_bytes().into_iter().chain(body).collect()
}

/// The length of the message that follows, if it can be one.
pub fn length(bytes: [u8; LENGTH]) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(bytes)).ok().filter(|length| (1..=MAX_MESSAGE).contains(length))
}

/// The message that these bytes are. Pure: whatever they are, it returns.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Some(message),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_back_and_have_a_limit() {
        for request in [Request::Index, Request::Chunk([0xff; 32])] {
            let bytes = encode(&request);
            let (head, body) = bytes.split_first_chunk::<LENGTH>().expect("a length");
            assert_eq!(length(*head), Some(body.len()));
            assert_eq!(decode::<Request>(body), Some(request));
        }
        let found = encode(&Reply::Found(u32::MAX));
        assert_eq!(decode(&found[LENGTH..]), Some(Reply::Found(u32::MAX)));
        assert_eq!(length(64_u32.to_le_bytes()), Some(64));
        for wrong in [0, 65, u32::MAX] {
            assert_eq!(length(wrong.to_le_bytes()), None);
        }
        for bytes in [&[][..], &[2], &[1, 7], &[0, 0], &[0xff; 40]] {
            assert_eq!(decode::<Request>(bytes), None, "{bytes:?}");
        }
    }
}
