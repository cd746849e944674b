//! A file that says what it is, and whether it is whole.
//!
//! ```text
//! <what it is, and its version> <SHA-256 of the rest>
//! { JSON }
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::run_dir::hex;

/// Longest file that is read: a command line and two paths take a few KiB.
pub const MAX_LEN: u64 = 64 << 10;

/// Writes a fresh file whose first line begins with `header`.
pub fn write(path: &Path, header: &str, value: &impl Serialize) -> io::Result<()> {
    let json = serde_json::to_vec_pretty(value)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{header}{}", hex(&Sha256::digest(&json)))?;
    file.write_all(&json)?;
    file.sync_all()
}

/// The bytes of a file; more than [`MAX_LEN`] of one that is too long.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_LEN + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What these bytes hold, or why they hold nothing. Pure: whatever they are, it returns.
pub fn parse<T: DeserializeOwned>(header: &str, bytes: &[u8]) -> Result<T, &'static str> {
    if bytes.len() as u64 > MAX_LEN {
        return Err("it is too long");
    }
    let line_end = bytes.iter().position(|byte| *byte == b'\n').ok_or("it has no first line")?;
    let (line, json) = bytes.split_at(line_end);
    let json = json.get(1..).unwrap_or_default();
    let sum = line.strip_prefix(header.as_bytes()).ok_or("its first line is that of another version, or damaged")?;
    if sum != hex(&Sha256::digest(json)).as_bytes() {
        return Err("its checksum does not fit");
    }
    serde_json::from_slice(json).map_err(|_| "it has the right checksum and makes no sense")
}
