//! The state file: a header of [`HEADER_LEN`] bytes, then a [`MachineState`] in postcard's format.
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | [`MAGIC`] |
//! | 4 | version, little-endian |
//! | 8 | length of what follows the header, little-endian |
//! | 32 | SHA-256 of the version, the length and what follows the header |

use sha2::{Digest, Sha256};

use super::MachineState;

/// The first bytes of a state file.
pub const MAGIC: [u8; 8] = *b"INLAYVM\x01";

/// The version that is written.
pub const VERSION: u32 = 3;

/// The oldest version that is read.
pub const OLDEST_VERSION: u32 = 1;

/// Bytes before the state.
pub const HEADER_LEN: usize = 52;

/// Largest state file: several times what the most processors and devices take.
pub const MAX_LEN: u64 = 32 << 20;

/// Why bytes are no state file.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Shorter than a header.
    #[error("The state file has {0} bytes, which is less than its header has")]
    NoHeader(usize),
    /// Something else.
    #[error("The state file does not begin as one does")]
    Magic,
    /// Too old, or too new.
    #[error("The state file has version {found}; versions {OLDEST_VERSION} to {VERSION} can be read")]
    Version {
        /// Its version.
        found: u32,
    },
    /// Cut short, or with something behind it.
    #[error("The state file has {present} bytes of state where its header says {announced}")]
    Length {
        /// What the header says.
        announced: u64,
        /// What is there.
        present: u64,
    },
    /// Changed since it was written.
    #[error("The state file is damaged: its checksum does not fit")]
    Checksum,
    /// Not what this version writes.
    #[error("The state file has the right checksum and makes no sense")]
    Postcard(#[source] postcard::Error),
}

/// The bytes of a state file.
pub fn encode(state: &MachineState) -> Result<Vec<u8>, CodecError> {
    let body = postcard::to_stdvec(state).map_err(CodecError::Postcard)?;
    let mut bytes = Vec::with_capacity(HEADER_LEN + body.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(checksum(VERSION, &body));
    bytes.extend(body);
    Ok(bytes)
}

/// The state in a file with these bytes. Pure: whatever the bytes are, it returns.
pub fn decode(bytes: &[u8]) -> Result<MachineState, CodecError> {
    let no_header = || CodecError::NoHeader(bytes.len());
    let (magic, rest) = bytes.split_first_chunk::<8>().ok_or_else(no_header)?;
    let (version, rest) = rest.split_first_chunk::<4>().ok_or_else(no_header)?;
    let (length, rest) = rest.split_first_chunk::<8>().ok_or_else(no_header)?;
    let (sum, body) = rest.split_first_chunk::<32>().ok_or_else(no_header)?;
    if *magic != MAGIC {
        return Err(CodecError::Magic);
    }
    let found = u32::from_le_bytes(*version);
    if !(OLDEST_VERSION..=VERSION).contains(&found) {
        return Err(CodecError::Version { found });
    }
    let (announced, present) = (u64::from_le_bytes(*length), body.len() as u64);
    if announced != present {
        return Err(CodecError::Length { announced, present });
    }
    if *sum != checksum(found, body) {
        return Err(CodecError::Checksum);
    }
    match postcard::take_from_bytes(body).map_err(CodecError::Postcard)? {
        (state, []) => Ok(state),
        _ => Err(CodecError::Postcard(postcard::Error::DeserializeBadEncoding)),
    }
}

fn checksum(version: u32, body: &[u8]) -> [u8; 32] {
    let digest = Sha256::new().chain_update(version.to_le_bytes()).chain_update((body.len() as u64).to_le_bytes());
    digest.chain_update(body).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_irqchip;

    fn state() -> MachineState {
        MachineState {
            memory_size: 32 << 20,
            vcpus: Vec::new(),
            irqchips: vec![kvm_irqchip::default(); 3],
            clock: Default::default(),
            serial: Default::default(),
            devices: Vec::new(),
        }
    }

    #[test]
    fn a_state_is_read_back() {
        let bytes = encode(&state()).expect("encode");
        assert_eq!(encode(&decode(&bytes).expect("decode")).expect("encode"), bytes);
    }

    #[test]
    fn each_truncation_and_each_flipped_bit_is_refused() {
        let bytes = encode(&state()).expect("encode");
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length]).is_err(), "{length}");
        }
        for position in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[position] ^= 1 << bit;
                assert!(decode(&flipped).is_err(), "{position} {bit}");
            }
        }
        let longer: Vec<u8> = bytes.iter().copied().chain([0]).collect();
        assert!(matches!(decode(&longer), Err(CodecError::Length { .. })));
    }

    #[test]
    fn versions_are_read_from_the_oldest_to_this_one() {
        let bytes = encode(&state()).expect("encode");
        for found in [OLDEST_VERSION - 1, VERSION + 1, u32::MAX] {
            let mut other = bytes.clone();
            other[8..12].copy_from_slice(&found.to_le_bytes());
            assert!(matches!(decode(&other), Err(CodecError::Version { found: it }) if it == found));
        }
    }

    #[test]
    fn a_right_checksum_over_nonsense_is_refused() {
        for body in [vec![], vec![0xff; 64], vec![0x80; 4096]] {
            let mut bytes = MAGIC.to_vec();
            bytes.extend(VERSION.to_le_bytes());
            bytes.extend((body.len() as u64).to_le_bytes());
            bytes.extend(checksum(VERSION, &body));
            bytes.extend(body);
            assert!(matches!(decode(&bytes), Err(CodecError::Postcard(_))));
        }
    }
}
