//! What `delete` must know when the process is gone.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bootstrap::ProcessIdentity;
use crate::ids::Id;
use crate::metrics;
use crate::resources::cgroup::MadeDirectories;
use crate::resources::share;
use crate::run_dir::RunDir;

const FILE: &str = "state.json";
const TEMPORARY: &str = ".state.json";
const VSOCK: &str = "vsock";
/// Raised when a field changes its meaning; a state of another version is not read.
const VERSION: u32 = 1;

/// A sandbox's traces outside of its process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The sandbox.
    pub sandbox: Id,
    /// containerd's namespace.
    pub namespace: String,
    /// The process that serves it.
    pub shim: ProcessIdentity,
    /// The process that mounts for it.
    pub helper: Option<ProcessIdentity>,
    /// Its ttrpc socket.
    pub socket: Option<PathBuf>,
    /// Control groups that were made for it.
    pub cgroups: MadeDirectories,
}

/// Why a sandbox's directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// Another sandbox of that name runs, perhaps in another namespace.
    #[error("A sandbox {id} runs already, in the namespace {namespace}")]
    Runs {
        /// The sandbox.
        id: Id,
        /// containerd's namespace.
        namespace: String,
    },
    /// A file or directory.
    #[error("Cannot {what} {}", path.display())]
    File {
        /// The verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Leftovers that cannot be removed.
    #[error("Cannot remove what an earlier sandbox {id} left")]
    Leftovers {
        /// The sandbox.
        id: Id,
        /// What is in the way.
        source: crate::resources::ResourceError,
    },
}

impl Record {
    /// A record of this process.
    pub fn of_this_process(
        sandbox: &Id,
        namespace: &str,
        socket: Option<PathBuf>,
        cgroups: MadeDirectories,
        helper: Option<ProcessIdentity>,
    ) -> io::Result<Self> {
        let (sandbox, namespace) = (sandbox.clone(), namespace.to_owned());
        Ok(Self { version: VERSION, sandbox, namespace, shim: ProcessIdentity::own()?, helper, socket, cgroups })
    }

    /// Reads a sandbox's record. `None` when there is none that could be understood.
    pub fn load(run_dir: &RunDir, id: &Id) -> Option<Self> {
        let text = fs::read(run_dir.sandbox(id).join(FILE)).ok()?;
        serde_json::from_slice(&text).ok().filter(|record: &Self| record.version == VERSION)
    }
}

/// A sandbox's directory below `/run/inlay/sandboxes`, removed when this value is dropped.
#[derive(Debug)]
pub struct SandboxDir {
    path: PathBuf,
}

impl SandboxDir {
    /// Makes the directory. What a dead shim left there is removed first.
    pub fn create(run_dir: &RunDir, id: &Id) -> Result<Self, PersistError> {
        let path = run_dir.sandbox(id);
        let failed = |what| {
            let path = path.clone();
            move |source| PersistError::File { what, path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(run_dir.sandboxes())
            .map_err(failed("make the directory for"))?;
        let make = || DirBuilder::new().mode(0o700).create(&path);
        match make() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if let Some(record) = Record::load(run_dir, id).filter(|record| record.shim.is_alive()) {
                    return Err(PersistError::Runs { id: id.clone(), namespace: record.namespace });
                }
                tracing::warn!("Removing what an earlier sandbox of the same name left");
                remove(run_dir, id)?;
                make().map_err(failed("make"))?;
            }
            made => made.map_err(failed("make"))?,
        }
        Ok(Self { path })
    }

    /// Makes a directory for a sandbox that nobody has asked for yet. What a dead process left there is removed first.
    pub fn create_nameless(path: PathBuf) -> Result<Self, PersistError> {
        let failed = |what| {
            let path = path.clone();
            move |source| PersistError::File { what, path, source }
        };
        if path.exists() {
            share::remove_leftovers(&path).map_err(io::Error::other).map_err(failed("clear"))?;
            drop(Self { path: path.clone() });
        }
        DirBuilder::new().mode(0o700).create(&path).map_err(failed("make"))?;
        Ok(Self { path })
    }

    /// Makes it the directory of the sandbox `id`.
    pub fn become_sandbox(&mut self, run_dir: &RunDir, id: &Id) -> Result<(), PersistError> {
        // Whatever had the name is dealt with as ever; an empty directory gives way to another.
        let place = Self::create(run_dir, id)?;
        fs::rename(&self.path, &place.path).map_err(|source| PersistError::File {
            what: "rename",
            path: self.path.clone(),
            source,
        })?;
        self.path.clone_from(&place.path);
        // Its directory is this one by now.
        std::mem::forget(place);
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where other programs connect to ports of the guest, if the configuration lets them.
    pub fn vsock_socket(&self) -> PathBuf {
        self.path.join(VSOCK)
    }

    /// Writes the record, whole or not at all.
    pub fn save(&self, record: &Record) -> Result<(), PersistError> {
        let (path, temporary) = (self.path.join(FILE), self.path.join(TEMPORARY));
        let written = serde_json::to_vec(record).map_err(io::Error::other).and_then(|json| fs::write(&temporary, json));
        written.and_then(|()| fs::rename(&temporary, &path)).map_err(|source| PersistError::File {
            what: "write",
            path,
            source,
        })
    }
}

impl Drop for SandboxDir {
    fn drop(&mut self) {
        for name in [VSOCK, metrics::SOCKET, TEMPORARY, FILE] {
            let _ = fs::remove_file(self.path.join(name));
        }
        if let Err(error) = fs::remove_dir(&self.path) {
            tracing::warn!(directory = %self.path.display(), %error, "Cannot remove the sandbox's directory");
        }
    }
}

/// Removes everything that a sandbox left on the host. Nothing left is success.
pub fn remove(run_dir: &RunDir, id: &Id) -> Result<(), PersistError> {
    let path = run_dir.sandbox(id);
    if !path.exists() {
        return Ok(());
    }
    share::remove_leftovers(&path).map_err(|source| PersistError::Leftovers { id: id.clone(), source })?;
    if let Some(record) = Record::load(run_dir, id) {
        record.cgroups.remove();
        if let Some(socket) = record.socket {
            let _ = fs::remove_file(socket);
        }
    }
    drop(SandboxDir { path });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> Id {
        Id::try_from("x").unwrap()
    }

    #[test]
    fn a_record_is_read_back_and_goes_with_its_directory() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = RunDir::at(root.path().into());
        let dir = SandboxDir::create(&run_dir, &id()).unwrap();
        let record = Record::of_this_process(&id(), "ns", Some("/s".into()), MadeDirectories::default(), None).unwrap();
        dir.save(&record).unwrap();
        assert_eq!(Record::load(&run_dir, &id()), Some(record));
        assert!(
            matches!(SandboxDir::create(&run_dir, &id()), Err(PersistError::Runs { namespace, .. }) if namespace == "ns")
        );
        drop(dir);
        assert_eq!(fs::read_dir(run_dir.sandboxes()).unwrap().count(), 0);
        assert_eq!(Record::load(&run_dir, &id()), None);
    }

    #[test]
    fn a_nameless_directory_becomes_a_sandboxs() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = RunDir::at(root.path().into());
        let path = root.path().join("spare");
        fs::create_dir_all(path.join("shared/x")).unwrap();
        let mut dir = SandboxDir::create_nameless(path.clone()).unwrap();
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
        dir.become_sandbox(&run_dir, &id()).unwrap();
        assert!(!path.exists() && dir.path() == run_dir.sandbox(&id()));
        let record = Record::of_this_process(&id(), "ns", None, MadeDirectories::default(), None).unwrap();
        dir.save(&record).unwrap();
        let mut second = SandboxDir::create_nameless(path.clone()).unwrap();
        assert!(matches!(second.become_sandbox(&run_dir, &id()), Err(PersistError::Runs { .. })));
        drop((dir, second));
        assert!(!path.exists() && !run_dir.sandbox(&id()).exists());
    }

    #[test]
    fn what_a_dead_shim_left_makes_place() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = RunDir::at(root.path().into());
        let dir = SandboxDir::create(&run_dir, &id()).unwrap();
        let socket = root.path().join("socket");
        fs::write(&socket, "").unwrap();
        let mut record =
            Record::of_this_process(&id(), "ns", Some(socket.clone()), MadeDirectories::default(), None).unwrap();
        record.shim.start_time -= 1;
        dir.save(&record).unwrap();
        std::mem::forget(dir);
        let again = SandboxDir::create(&run_dir, &id()).unwrap();
        assert!(!socket.exists() && Record::load(&run_dir, &id()).is_none());
        drop(again);
        remove(&run_dir, &id()).unwrap();
    }
}
