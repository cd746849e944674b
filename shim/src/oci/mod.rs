//! The OCI runtime specification: the bundle's `config.json`, and what of it goes to the guest.

mod process;
mod resources;
mod seccomp;
mod translate;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ids::{Id, IdError};

pub use process::process;
pub use resources::{MemoryLimit, memory_limit, resources};
pub use translate::for_guest;

const CONFIG_FILE: &str = "config.json";
/// Set by containerd's CRI plugin: `sandbox` or `container`.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// Set by containerd's CRI plugin: the sandbox that a container belongs to.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// Why a container cannot be run as its specification asks.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("Cannot read the container's specification {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The text does not follow the specification.
    #[error("The container's {what} does not follow the OCI runtime specification")]
    Parse {
        /// What was parsed.
        what: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A part that must be there is not.
    #[error("The container's specification has no {0}")]
    Missing(&'static str),
    /// The annotations of a pod's container are incomplete.
    #[error("The container belongs to a pod, but the annotation {SANDBOX_ID} is not there")]
    NoSandboxId,
    /// The sandbox's identifier is no file name.
    #[error(transparent)]
    SandboxId(#[from] IdError),
    /// A hook, which would run on the host for a process that is not there.
    #[error("The {kind} hook {path} is not supported: hooks act on host processes, and the container's run in a guest")]
    Hook {
        /// Its kind, with the specification's name.
        kind: &'static str,
        /// Its program.
        path: String,
    },
}

/// What a container is to its shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It makes a sandbox: a pod's first container, or one that is in no pod.
    Sandbox,
    /// It joins a sandbox.
    Member {
        /// The sandbox.
        sandbox: Id,
    },
}

/// The only part of `config.json` that `start` and `delete` need.
#[derive(Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: HashMap<String, String>,
}

impl Role {
    /// Reads the role from the bundle's `config.json`.
    pub fn of_bundle(bundle: &Path) -> Result<Self, SpecError> {
        let annotated: Annotated = parse(&read(bundle)?)?;
        Self::of(&annotated.annotations)
    }

    /// Reads the role from annotations.
    pub fn of(annotations: &HashMap<String, String>) -> Result<Self, SpecError> {
        if annotations.get(CONTAINER_TYPE).map(String::as_str) != Some("container") {
            return Ok(Self::Sandbox);
        }
        let id = annotations.get(SANDBOX_ID).ok_or(SpecError::NoSandboxId)?;
        Ok(Self::Member { sandbox: Id::try_from(id.as_str())? })
    }
}

/// Reads the bundle's `config.json`.
pub fn load(bundle: &Path) -> Result<oci_spec::runtime::Spec, SpecError> {
    parse(&read(bundle)?)
}

/// Parses the process of an exec request.
pub fn parse_process(json: &[u8]) -> Result<oci_spec::runtime::Process, SpecError> {
    serde_json::from_slice(json).map_err(|source| SpecError::Parse { what: "process", source })
}

/// Parses the resources of an update request.
pub fn parse_resources(json: &[u8]) -> Result<oci_spec::runtime::LinuxResources, SpecError> {
    serde_json::from_slice(json).map_err(|source| SpecError::Parse { what: "resources", source })
}

fn read(bundle: &Path) -> Result<Vec<u8>, SpecError> {
    let path = bundle.join(CONFIG_FILE);
    std::fs::read(&path).map_err(|source| SpecError::Read { path, source })
}

fn parse<T: for<'a> Deserialize<'a>>(json: &[u8]) -> Result<T, SpecError> {
    serde_json::from_slice(json).map_err(|source| SpecError::Parse { what: "config.json", source })
}

/// The word that the specification has for an enumeration's value, such as `SCMP_ACT_ALLOW`.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn a_container_without_annotations_is_its_own_sandbox() {
        assert_eq!(Role::of(&HashMap::new()).unwrap(), Role::Sandbox);
        let pause = annotations(&[(CONTAINER_TYPE, "sandbox"), (SANDBOX_ID, "pod")]);
        assert_eq!(Role::of(&pause).unwrap(), Role::Sandbox);
    }

    #[test]
    fn a_pods_container_joins_the_pod() {
        let member = annotations(&[(CONTAINER_TYPE, "container"), (SANDBOX_ID, "pod")]);
        assert_eq!(Role::of(&member).unwrap(), Role::Member { sandbox: Id::try_from("pod").unwrap() });
        let lost = annotations(&[(CONTAINER_TYPE, "container")]);
        assert!(matches!(Role::of(&lost), Err(SpecError::NoSandboxId)));
        let bad = annotations(&[(CONTAINER_TYPE, "container"), (SANDBOX_ID, "../x")]);
        assert!(matches!(Role::of(&bad), Err(SpecError::SandboxId(_))));
    }

    #[test]
    fn a_missing_or_broken_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Role::of_bundle(dir.path()), Err(SpecError::Read { .. })));
        std::fs::write(dir.path().join(CONFIG_FILE), "{").unwrap();
        assert!(matches!(Role::of_bundle(dir.path()), Err(SpecError::Parse { .. })));
    }
}
