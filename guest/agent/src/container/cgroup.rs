//! A container's cgroup (version 2; the kernel's Documentation/admin-guide/cgroup-v2.rst).

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libcgroups::common::{CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::LinuxResources;

use super::spec;

/// Where the hierarchy is mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";
/// How long the kernel may take to stop, thaw or empty a cgroup before that is an error.
const DEADLINE: Duration = Duration::from_secs(10);

/// The directories of the containers in the making. Held while directories above a container's own come or go: those that
/// start and end beside each other share them.
static MAKING: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A scheduler tick at 250 Hz, in milliseconds.
const TICK: u8 = 4;

/// The cgroup of a container, which exists from its creation to [`Cgroup::remove`].
#[derive(Debug, Clone)]
pub struct Cgroup {
    id: String,
    relative: PathBuf,
}

/// Where the container's cgroup is below the mount: as the specification says, in cgroupfs' form (`/a/b`) or in
/// systemd's (`slice:prefix:name`, of which a guest without systemd keeps the shape of the path).
pub fn path(given: &str, id: &str) -> Result<PathBuf, spec::Error> {
    let invalid = || spec::Error::CgroupPath(given.to_owned());
    let path = match given.split(':').collect::<Vec<_>>()[..] {
        [""] => PathBuf::from("/inlay").join(id),
        [_] => PathBuf::from(given),
        [slice, prefix, name] => {
            let leaf = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}-{name}.scope") };
            Path::new("/").join(slice).join(leaf)
        }
        _ => return Err(invalid()),
    };
    let path = Path::new("/").join(path);
    let mut depth = 0;
    for component in path.components() {
        match component {
            Component::RootDir => {}
            Component::Normal(_) => depth += 1,
            _ => return Err(invalid()),
        }
    }
    // The root itself is the agent's.
    if depth == 0 { Err(invalid()) } else { Ok(path) }
}

impl Cgroup {
    /// The cgroup at a path from [`path`].
    pub fn new(id: &str, relative: PathBuf) -> Self {
        Self { id: id.to_owned(), relative }
    }

    /// Its directory.
    pub fn directory(&self) -> PathBuf {
        Path::new(MOUNT).join(self.relative.strip_prefix("/").unwrap_or(&self.relative))
    }

    /// Makes the directories above its own, which stay at least as long as the answer. libcontainer makes the rest, and
    /// would make these as well, but fails where another container makes one at the same time.
    pub fn make_parents(&self) -> io::Result<Making> {
        let directory = self.directory();
        let mut making = making();
        directory.parent().map_or(Ok(()), fs::create_dir_all)?;
        making.push(directory.clone());
        Ok(Making(directory))
    }

    /// Kills every process in it and below it.
    pub fn kill(&self) -> io::Result<()> {
        match fs::write(self.directory().join("cgroup.kill"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    /// Stops all its processes, or lets them go on; blocks until that is so.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        let value = if frozen { "1" } else { "0" };
        fs::write(self.directory().join("cgroup.freeze"), value)?;
        self.wait_for("frozen", value)
    }

    /// Sets limits.
    pub fn update(&self, resources: &LinuxResources) -> io::Result<()> {
        let config =
            CgroupConfig { cgroup_path: self.relative.clone(), systemd_cgroup: false, container_name: self.id.clone() };
        let options = ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
        create_cgroup_manager(config)
            .map_err(|error| io::Error::other(error.to_string()))?
            .apply(&options)
            .map_err(|error| io::Error::other(crate::helper::chain(&error)))
    }

    /// Kills what is left in it and removes it, its children and those of its parents that this leaves empty, also where
    /// no more than these has been made. Blocks until the processes are gone.
    pub fn remove(&self) -> io::Result<()> {
        let directory = self.directory();
        if directory.exists() {
            self.kill()?;
            self.wait_for("populated", "0")?;
            self.remove_empty(&directory)?;
        }
        let making = making();
        for parent in directory.ancestors().skip(1) {
            // Whoever is in the making below it removes it in the end.
            let needed = making.iter().any(|other| other.starts_with(parent));
            if needed || parent == Path::new(MOUNT) || fs::remove_dir(parent).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// A task that is dead but still being switched away from no longer counts as populating its cgroup, yet makes its
    /// removal fail. No event tells when that is over, so the removal is tried again after a scheduler tick.
    fn remove_empty(&self, directory: &Path) -> io::Result<()> {
        let end = Instant::now() + DEADLINE;
        loop {
            match remove_tree(directory) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => {}
                result => return result,
            }
            poll(&mut [], PollTimeout::from(TICK))?;
        }
    }

    /// Blocks until `cgroup.events` says `key value`. The kernel wakes a poll for POLLPRI at each change.
    fn wait_for(&self, key: &str, value: &str) -> io::Result<()> {
        let mut events = File::open(self.directory().join("cgroup.events"))?;
        let end = Instant::now() + DEADLINE;
        loop {
            let mut text = String::new();
            events.rewind()?;
            events.read_to_string(&mut text)?;
            if text.lines().any(|line| line.split_once(' ') == Some((key, value))) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let what = format!("cgroup {} did not become {key} {value}", self.relative.display());
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            }
            let mut descriptors = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
            poll(&mut descriptors, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX))?;
        }
    }
}

/// A container in the making, by its directory.
#[derive(Debug)]
pub struct Making(PathBuf);

impl Drop for Making {
    fn drop(&mut self) {
        let mut making = making();
        if let Some(place) = making.iter().position(|directory| *directory == self.0) {
            making.swap_remove(place);
        }
    }
}

fn making() -> MutexGuard<'static, Vec<PathBuf>> {
    MAKING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Children first: a cgroup with children cannot be removed.
fn remove_tree(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_path_become_one() {
        let path = |given| path(given, "c1").map(|path| path.display().to_string()).ok();
        assert_eq!(path("/default/c1").as_deref(), Some("/default/c1"));
        assert_eq!(path("default/c1").as_deref(), Some("/default/c1"));
        assert_eq!(path("").as_deref(), Some("/inlay/c1"));
        assert_eq!(
            path("kubepods-pod1.slice:cri-containerd:abc").as_deref(),
            Some("/kubepods-pod1.slice/cri-containerd-abc.scope")
        );
        assert_eq!(path("a.slice::b").as_deref(), Some("/a.slice/b"));
    }

    #[test]
    fn a_path_stays_below_the_mount() {
        for given in ["/", "/a/../..", "..", "a:b", "a:b:c:d", "::", "../x:p:n"] {
            assert!(path(given, "c1").is_err(), "{given}");
        }
    }
}
