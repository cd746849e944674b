//! The state file and the manifest of a snapshot, with a checksum that fits, so that what is behind it is read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};
use vmm::snapshot::{Manifest, codec};

fn with_header(body: &[u8]) -> Vec<u8> {
    let (version, length) = (codec::VERSION.to_le_bytes(), (body.len() as u64).to_le_bytes());
    let sum = Sha256::new().chain_update(version).chain_update(length).chain_update(body).finalize();
    [&codec::MAGIC[..], &version, &length, &sum, body].concat()
}

fuzz_target!(|bytes: &[u8]| {
    let _ = Manifest::decode(bytes).map_err(|refusal| refusal.to_string());
    let _ = codec::decode(bytes).map_err(|refusal| refusal.to_string());
    match codec::decode(&with_header(bytes)) {
        Ok(state) => drop(codec::encode(&state).expect("What was decoded can be encoded")),
        Err(refusal) => assert!(!matches!(refusal, codec::CodecError::Checksum), "{refusal}"),
    }
});
