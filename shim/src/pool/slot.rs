//! A place in the pool.
//!
//! ```text
//! /run/inlay/pool/<template>-<n>/        the spare's directory, which becomes the sandbox's
//! /run/inlay/pool/<template>-<n>.socket  there when the spare can be claimed
//! /run/inlay/pool/.<template>-<n>.lock   there while a process fills the slot; names it
//! ```

use std::fs::{self, DirBuilder};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

use crate::bootstrap::ProcessIdentity;
use crate::file_lock::FileLock;
use crate::ids::Id;
use crate::resources::share;
use crate::run_dir::RunDir;

const SOCKET: &str = "socket";
const DRAFT: &str = "draft";
/// Longest identity that is read.
const MAX_IDENTITY: u64 = 256;
/// How long a spare may take to go: the kernel takes down its machine first.
const PATIENCE: Duration = Duration::from_secs(20);

/// A slot that this process fills. Dropped, it is free.
#[derive(Debug)]
pub struct Slot {
    place: PathBuf,
    _lock: FileLock,
}

impl Slot {
    /// Takes the slot `index` of the template `name`, if it is free. The process must not be forked while it has it.
    pub fn take(run_dir: &RunDir, name: &Id, index: u32) -> io::Result<Option<Self>> {
        let base = run_dir.pool();
        // What is claimed here becomes a sandbox: for this user alone.
        DirBuilder::new().recursive(true).mode(0o700).create(&base)?;
        let place = base.join(format!("{name}-{index}"));
        let Some(lock) = FileLock::take(&lock_of(&place), false)? else { return Ok(None) };
        serde_json::to_writer(lock.file(), &ProcessIdentity::own()?)?;
        lock.file().flush()?;
        Ok(Some(Self { place, _lock: lock }))
    }

    /// Where the spare's directory is.
    pub fn directory(&self) -> &Path {
        &self.place
    }

    /// A socket that nobody finds before it is [`open`](Self::open).
    pub fn listen(&self) -> io::Result<OwnedFd> {
        let path = beside(&self.place, DRAFT);
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        remove_if_there(&path)?;
        bind(std::os::fd::AsRawFd::as_raw_fd(&listener), &UnixAddr::new(&path)?)?;
        // One claims, the others go on to the next.
        listen(&listener, Backlog::new(1)?)?;
        Ok(listener)
    }

    /// From now on the spare can be claimed.
    pub fn open(&self) -> io::Result<()> {
        fs::rename(beside(&self.place, DRAFT), socket_of(&self.place))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        for extension in [SOCKET, DRAFT] {
            let _ = fs::remove_file(beside(&self.place, extension));
        }
    }
}

/// Sockets at which spares of the template `name` may be claimed.
pub fn sockets(run_dir: &RunDir, name: &Id) -> Vec<PathBuf> {
    let is_one = |path: &PathBuf| {
        let slot = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.strip_prefix(name.as_str()));
        path.extension().is_some_and(|extension| extension == SOCKET)
            && slot.and_then(|slot| slot.strip_prefix('-')).is_some_and(|index| index.parse::<u32>().is_ok())
    };
    let entries = fs::read_dir(run_dir.pool()).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(is_one).collect()
}

/// A slot that somebody fills, or has left something in.
#[derive(Debug)]
pub struct Occupant {
    /// The slot.
    pub slot: String,
    /// Who fills it, if anybody.
    pub process: Option<ProcessIdentity>,
    /// Whether it can be claimed.
    pub ready: bool,
    place: PathBuf,
}

/// Everything that is in the pool, in order; of the template `name` alone, if one is given.
pub fn occupants(run_dir: &RunDir, name: Option<&Id>) -> Vec<Occupant> {
    let entries = fs::read_dir(run_dir.pool()).into_iter().flatten().flatten();
    let mut slots: Vec<String> = entries
        .filter_map(|entry| {
            let file = entry.file_name().into_string().ok()?;
            let slot = file.strip_prefix('.').and_then(|file| file.strip_suffix(".lock")).unwrap_or(&file);
            let slot = slot.split('.').next()?.to_owned();
            let (of, index) = slot.rsplit_once('-')?;
            let wanted = name.is_none_or(|name| name.as_str() == of) && index.parse::<u32>().is_ok();
            wanted.then_some(slot)
        })
        .collect();
    slots.sort();
    slots.dedup();
    slots.into_iter().map(|slot| Occupant::of(run_dir.pool().join(&slot), slot)).collect()
}

/// Ends all spares, of the template `name` alone if one is given, and removes what they leave.
pub fn drain(run_dir: &RunDir, name: Option<&Id>) -> io::Result<()> {
    for occupant in occupants(run_dir, name) {
        occupant.remove()?;
    }
    match fs::remove_dir(run_dir.pool()) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => Err(error),
        _ => Ok(()),
    }
}

impl Occupant {
    fn of(place: PathBuf, slot: String) -> Self {
        let mut text = String::new();
        let read = fs::File::open(lock_of(&place)).and_then(|file| file.take(MAX_IDENTITY).read_to_string(&mut text));
        let identity: Option<ProcessIdentity> = read.ok().and_then(|_| serde_json::from_str(&text).ok());
        let process = identity.filter(ProcessIdentity::is_alive);
        let ready = process.is_some() && socket_of(&place).exists();
        Self { slot, process, ready, place }
    }

    /// A spare that is being claimed at this moment becomes a sandbox, and is left alone: it has no lock by then.
    fn remove(self) -> io::Result<()> {
        if let Some(process) = self.process {
            process.terminate(PATIENCE)?;
        }
        let Some(lock) = FileLock::take(&lock_of(&self.place), false)? else { return Ok(()) };
        if self.place.exists() {
            share::remove_leftovers(&self.place).map_err(io::Error::other)?;
            fs::remove_dir(&self.place)?;
        }
        drop(Slot { place: self.place, _lock: lock });
        Ok(())
    }
}

fn socket_of(place: &Path) -> PathBuf {
    beside(place, SOCKET)
}

fn beside(place: &Path, extension: &str) -> PathBuf {
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    place.with_file_name(format!("{name}.{extension}"))
}

fn lock_of(place: &Path) -> PathBuf {
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    place.with_file_name(format!(".{name}.lock"))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> Id {
        Id::of_literal("default")
    }

    #[test]
    fn a_slot_has_one_process_and_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = RunDir::at(root.path().into());
        let slot = Slot::take(&run_dir, &name(), 0).unwrap().unwrap();
        assert!(Slot::take(&run_dir, &name(), 0).unwrap().is_none());
        let _listener = slot.listen().unwrap();
        assert!(sockets(&run_dir, &name()).is_empty());
        assert!(!occupants(&run_dir, None)[0].ready);
        slot.open().unwrap();
        assert_eq!(sockets(&run_dir, &name()).len(), 1);
        let [found] = &occupants(&run_dir, Some(&name()))[..] else { panic!() };
        assert!(found.ready && found.process == Some(ProcessIdentity::own().unwrap()) && found.slot == "default-0");
        assert!(occupants(&run_dir, Some(&Id::of_literal("other"))).is_empty());
        drop(slot);
        assert_eq!(fs::read_dir(run_dir.pool()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_spare_left_is_drained() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = RunDir::at(root.path().into());
        let place = run_dir.pool().join("default-3");
        for name in ["layout", "shared"] {
            fs::create_dir_all(place.join(name)).unwrap();
        }
        fs::write(lock_of(&place), r#"{"pid":4000000,"start_time":1}"#).unwrap();
        fs::write(socket_of(&place), "").unwrap();
        let [found] = &occupants(&run_dir, None)[..] else { panic!() };
        assert!(!found.ready && found.process.is_none());
        drain(&run_dir, None).unwrap();
        assert!(!run_dir.pool().exists());
        drain(&run_dir, None).unwrap();
    }

    #[test]
    fn slots_of_names_that_begin_alike_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = RunDir::at(root.path().into());
        let (short, long) = (Id::of_literal("a"), Id::of_literal("a-b"));
        let slot = Slot::take(&run_dir, &long, 1).unwrap().unwrap();
        let _listener = slot.listen().unwrap();
        slot.open().unwrap();
        assert_eq!((sockets(&run_dir, &short).len(), sockets(&run_dir, &long).len()), (0, 1));
        assert!(occupants(&run_dir, Some(&short)).is_empty());
    }
}
