//! The cache outside the checkout, for what is costly to make.
//!
//! Every entry is named by a digest of what it was made from, is made beside its final place and
//! renamed there in one step. So an entry that exists is whole, two processes may make the same
//! one at once, and nothing has to be invalidated.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// `$INLAY_CACHE`, else `$XDG_CACHE_HOME/inlay`, else `~/.cache/inlay`.
pub fn root() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(dir) = set("INLAY_CACHE") {
        return dir.into();
    }
    match set("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir).join("inlay"),
        None => PathBuf::from(set("HOME").unwrap_or_else(|| "/root".into())).join(".cache/inlay"),
    }
}

/// A digest of everything an entry is made from.
#[derive(Clone, Default)]
pub struct Key(Sha256);

impl Key {
    /// A key of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one input. Its length is part of the digest, so that inputs cannot run together.
    pub fn with(mut self, input: impl AsRef<[u8]>) -> Self {
        let input = input.as_ref();
        self.0.update((input.len() as u64).to_le_bytes());
        self.0.update(input);
        self
    }

    /// The first 64 bits in hexadecimal: enough to tell entries of one cache apart.
    pub fn hex(self) -> String {
        hex(&self.0.finalize()[..8])
    }
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the path of the entry `<room>/<key>`, made by `make` where it does not exist.
///
/// `make` gets a path that does not exist yet and creates a file or a directory there.
pub fn entry(room: &str, key: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    static SERIAL: AtomicU32 = AtomicU32::new(0);

    let room = root().join(room);
    let place = room.join(key);
    if place.exists() {
        return Ok(place);
    }
    fs::create_dir_all(&room).with_context(|| format!("Cannot create {}", room.display()))?;
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let draft = room.join(format!(".{key}.{}.{serial}", process::id()));
    let made = make(&draft);
    if let Err(error) = made {
        remove(&draft);
        return Err(error);
    }
    if let Err(error) = fs::rename(&draft, &place) {
        remove(&draft);
        // Another process was faster: its entry is as good as ours.
        if !place.exists() {
            return Err(error).with_context(|| format!("Cannot put {} in place", place.display()));
        }
    }
    Ok(place)
}

fn remove(path: &Path) {
    if path.is_dir() {
        let _ = fs::remove_dir_all(path);
    } else {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_where_inputs_end() {
        let one = Key::new().with("ab").with("c").hex();
        let other = Key::new().with("a").with("bc").hex();
        assert_ne!(one, other);
    }
}
