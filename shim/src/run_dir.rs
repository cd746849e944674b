//! Where a running sandbox keeps its files.
//!
//! ```text
//! /run/inlay/s/<hash>                       the shim's ttrpc socket
//! /run/inlay/templates/<name>/              machines that sandboxes are restored from
//! /run/inlay/pool/<template>-<n>/           a sandbox that nobody has asked for yet; see `pool`
//! /run/inlay/starts/                        which sandboxes start, and which wait for that
//! /run/inlay/sandboxes/<sandbox>/state.json what `delete` needs when the process is gone
//! /run/inlay/sandboxes/<sandbox>/metrics    the socket for metrics, from the end of the start on
//! /run/inlay/sandboxes/<sandbox>/layout/    directories of the share, writable by the shim alone
//! /run/inlay/sandboxes/<sandbox>/shared/    the same, read-only, with the containers' mounts on it: what the guest sees
//! ```

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::ids::Id;

/// The root of all run-time state.
const DEFAULT_ROOT: &str = "/run/inlay";
/// Names another root, for a second installation on one host and for tests.
const ROOT_VARIABLE: &str = "INLAY_RUN_DIR";

/// The directory tree of run-time state.
#[derive(Debug, Clone)]
pub struct RunDir {
    root: PathBuf,
}

impl RunDir {
    /// `/run/inlay`, or what `INLAY_RUN_DIR` names.
    pub fn from_environment() -> Self {
        Self::at(std::env::var_os(ROOT_VARIABLE).map_or_else(|| PathBuf::from(DEFAULT_ROOT), PathBuf::from))
    }

    /// State below `root`.
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The directory with one entry for each sandbox.
    pub fn sandboxes(&self) -> PathBuf {
        self.root.join("sandboxes")
    }

    /// The directory with one entry for each template.
    pub fn templates(&self) -> PathBuf {
        self.root.join("templates")
    }

    /// The directory with one entry for each sandbox that waits to be asked for.
    pub fn pool(&self) -> PathBuf {
        self.root.join("pool")
    }

    /// The directory of the queue of starts.
    pub fn starts(&self) -> PathBuf {
        self.root.join("starts")
    }

    /// The directory of one sandbox.
    pub fn sandbox(&self, id: &Id) -> PathBuf {
        self.sandboxes().join(id.as_str())
    }

    /// The socket of the shim that serves `id`. The three parts that make a shim unique are hashed, so that the path
    /// is short enough for a Unix address (108 bytes) whatever their length.
    pub fn socket(&self, containerd: &str, namespace: &str, id: &Id) -> PathBuf {
        let mut hash = Sha256::new();
        for part in [containerd, namespace, id.as_str()] {
            hash.update(part.as_bytes());
            hash.update([0]);
        }
        self.root.join("s").join(hex(&hash.finalize()))
    }
}

/// The address form that containerd dials.
pub fn address_of(socket: &Path) -> String {
    format!("unix://{}", socket.display())
}

/// What `sha256sum` prints.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_unique_to_daemon_namespace_and_id() {
        let dir = RunDir::at("/run/inlay".into());
        let (a, b) = (Id::try_from("a").unwrap(), Id::try_from("b").unwrap());
        let first = dir.socket("/run/containerd/containerd.sock", "default", &a);
        assert_eq!(first, dir.socket("/run/containerd/containerd.sock", "default", &a));
        assert_ne!(first, dir.socket("/run/containerd/containerd.sock", "k8s.io", &a));
        assert_ne!(first, dir.socket("/run/other.sock", "default", &a));
        assert_ne!(first, dir.socket("/run/containerd/containerd.sock", "default", &b));
        // Parts are delimited: "xy" + "z" is not "x" + "yz".
        assert_ne!(dir.socket("xy", "z", &a), dir.socket("x", "yz", &a));
    }

    #[test]
    fn a_socket_fits_a_unix_address() {
        let id = Id::try_from("x".repeat(76)).unwrap();
        let path = RunDir::at("/run/inlay".into()).socket("/run/containerd/containerd.sock", "moby", &id);
        assert!(path.as_os_str().len() < 108);
        assert!(address_of(&path).starts_with("unix:///run/inlay/s/"));
    }
}
