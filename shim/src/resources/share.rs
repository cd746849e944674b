//! The directory that the guest sees, and the containers' places in it.
//!
//! The guest must be able to write to containers' files and to nothing else. So directories are made in `layout`,
//! which the guest does not see, and the guest gets `shared`: a read-only bind mount of it, on which root file systems
//! and volumes are mounted with their own rights. A new directory in `layout` shows at once in `shared`.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::below::{open_anywhere, open_below};
use super::mount::{Mount, Mounted, Target, mounts_below, unmount};
use super::{ResourceError, file_error};
use crate::ids::Id;

/// Where the agent mounts the share: kata's place, which the agent's `Storage` names.
pub const GUEST_SHARE: &str = "/run/kata-containers/shared/containers";
/// Tag of the virtio-fs device.
pub const TAG: &str = "kataShared";

const LAYOUT: &str = "layout";
/// Name of the directory to be exported, in the sandbox's.
pub const SHARED: &str = "shared";
/// Name of a container's root file system in its place.
pub const ROOTFS: &str = "rootfs";
/// Name of the directory of a container's volumes in its place.
pub const MOUNTS: &str = "mounts";

/// A sandbox's share. Dropped after its containers, it leaves nothing.
///
/// Directories are held open, and names are looked up below them without following links: whoever can write to the
/// sandbox's directory cannot lead a mount elsewhere.
#[derive(Debug)]
pub struct Share {
    sandbox: PathBuf,
    layout: OwnedFd,
    mounted: Option<Mounted>,
}

impl Share {
    /// Makes the share in the sandbox's directory, which must exist.
    pub fn create(sandbox: &Path) -> Result<Self, ResourceError> {
        for name in [LAYOUT, SHARED] {
            make_dir(&sandbox.join(name))?;
        }
        let directory = open_anywhere(sandbox).map_err(file_error("open", sandbox))?;
        let layout = open_below(directory.as_fd(), Path::new(LAYOUT)).map_err(file_error("open", sandbox))?;
        let mut share = Self { sandbox: sandbox.to_owned(), layout, mounted: None };
        let on = Target { directory: directory.as_fd(), path: Path::new(SHARED) };
        share.mounted = Some(Mount::bind(LAYOUT, true).mount(on, Some(share.layout.as_fd()))?);
        Ok(share)
    }

    /// The sandbox's directory has another name.
    pub fn moved_to(&mut self, sandbox: &Path) {
        sandbox.clone_into(&mut self.sandbox);
    }

    /// Makes a container's place.
    pub fn add_container(&self, id: &Id) -> Result<ContainerShare, ResourceError> {
        let shared = self.mounted.as_ref().ok_or(ResourceError::NoShare)?.root();
        let name = Path::new(id.as_str());
        match mkdirat(&self.layout, name, DIRECTORY_MODE) {
            Err(nix::Error::EEXIST) => return Err(ResourceError::Taken(id.to_string())),
            made => made.map_err(|errno| file_error("make the directory", name)(errno.into()))?,
        }
        let place = ContainerShare {
            id: id.clone(),
            layout: self.layout.try_clone().map_err(file_error("open", name))?,
            shared: shared.try_clone_to_owned().map_err(file_error("open", name))?,
            place: None,
            volumes: Vec::new(),
            mounts: Vec::new(),
        };
        place.filled()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.mounted = None;
        for name in [SHARED, LAYOUT] {
            remove_empty(&self.sandbox.join(name));
        }
    }
}

/// A container's place in the share: its root file system and its volumes.
#[derive(Debug)]
pub struct ContainerShare {
    id: Id,
    layout: OwnedFd,
    shared: OwnedFd,
    /// The container's directory in the layout.
    place: Option<OwnedFd>,
    /// Names in [`MOUNTS`], and whether each is a directory.
    volumes: Vec<(String, bool)>,
    mounts: Vec<Mounted>,
}

impl ContainerShare {
    fn filled(mut self) -> Result<Self, ResourceError> {
        let name = Path::new(self.id.as_str());
        let place = open_below(self.layout.as_fd(), name).map_err(file_error("open", name))?;
        for inner in [ROOTFS, MOUNTS] {
            let made = mkdirat(&place, inner, DIRECTORY_MODE);
            made.map_err(|errno| file_error("make the directory", name.join(inner))(errno.into()))?;
        }
        self.place = Some(place);
        Ok(self)
    }

    /// Mounts a part of the root file system: of `bound`, where it is a bind mount.
    pub fn mount_rootfs(&mut self, mount: &Mount, bound: Option<BorrowedFd<'_>>) -> Result<(), ResourceError> {
        let path = Path::new(self.id.as_str()).join(ROOTFS);
        self.mounts.push(mount.mount(Target { directory: self.shared.as_fd(), path: &path }, bound)?);
        Ok(())
    }

    /// Mounts a file or directory of the host for the container, under a name made from `base`. Returns the name.
    pub fn add_volume(&mut self, source: BorrowedFd<'_>, base: &str, read_only: bool) -> Result<String, ResourceError> {
        let kind = fstat(source).map_err(|errno| file_error("examine", base)(errno.into()))?.st_mode;
        let is_directory = SFlag::from_bits_truncate(kind) & SFlag::S_IFMT == SFlag::S_IFDIR;
        // Numbered, as two volumes may have one name; the name is for the reader of mount tables.
        let name = format!("{}-{base}", self.mounts.len());
        let path = Path::new(MOUNTS).join(&name);
        let place = self.place.as_ref().ok_or_else(|| ResourceError::NoPlace(self.id.to_string()))?;
        let mounts = open_below(place.as_fd(), Path::new(MOUNTS)).map_err(file_error("open", MOUNTS))?;
        if is_directory {
            mkdirat(&mounts, name.as_str(), DIRECTORY_MODE)
        } else {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            nix::fcntl::openat(&mounts, name.as_str(), flags, Mode::from_bits_truncate(0o644)).map(drop)
        }
        .map_err(|errno| file_error("make the place holder", &path)(errno.into()))?;
        self.volumes.push((name.clone(), is_directory));
        let inside = Path::new(self.id.as_str()).join(path);
        let on = Target { directory: self.shared.as_fd(), path: &inside };
        self.mounts.push(Mount::bind(base, read_only).mount(on, Some(source))?);
        Ok(name)
    }

    /// Removes the place holders, which are empty directories and empty files.
    fn remove(&mut self) -> io::Result<()> {
        let place = self.place.take();
        if let Some(place) = &place {
            let mounts = open_below(place.as_fd(), Path::new(MOUNTS))?;
            while let Some((name, is_directory)) = self.volumes.pop() {
                let kind = if is_directory { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
                unlinkat(&mounts, name.as_str(), kind)?;
            }
            for name in [MOUNTS, ROOTFS] {
                unlinkat(place, name, UnlinkatFlags::RemoveDir)?;
            }
        }
        Ok(unlinkat(&self.layout, self.id.as_str(), UnlinkatFlags::RemoveDir)?)
    }
}

impl Drop for ContainerShare {
    fn drop(&mut self) {
        // The latest first: a volume may be mounted on another.
        while let Some(mounted) = self.mounts.pop() {
            drop(mounted);
        }
        if let Err(error) = self.remove() {
            tracing::warn!(container = %self.id, %error, "Cannot remove a container's place in the share");
        }
    }
}

/// Removes a sandbox's directory that a shim left behind: its mounts, then everything that the shim makes there.
pub fn remove_leftovers(sandbox: &Path) -> Result<(), ResourceError> {
    for point in mounts_below(sandbox)? {
        unmount(&point).map_err(file_error("unmount", &point))?;
    }
    for name in [SHARED, LAYOUT] {
        let directory = sandbox.join(name);
        remove_layout(&directory).map_err(file_error("remove", &directory))?;
    }
    Ok(())
}

/// Removes directories and empty files below `directory`, and it. Anything else stops it: a mount that is still there
/// holds somebody's data, and none of it may be lost.
fn remove_layout(directory: &Path) -> io::Result<()> {
    match fs::symlink_metadata(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(metadata) if metadata.is_dir() => {}
        // Whoever made a link of it, what it leads to is not the sandbox's.
        Ok(_) => return fs::remove_file(directory),
    }
    let entries = fs::read_dir(directory)?;
    if !mounts_below(directory).map_err(io::Error::other)?.is_empty() {
        return Err(io::Error::other("Something is still mounted there"));
    }
    for entry in entries {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            remove_layout(&entry.path())?;
        } else if metadata.is_file() && metadata.len() == 0 {
            fs::remove_file(entry.path())?;
        } else {
            return Err(io::Error::other(format!("{} is not a placeholder", entry.path().display())));
        }
    }
    fs::remove_dir(directory)
}

const DIRECTORY_MODE: Mode =
    Mode::S_IRWXU.union(Mode::S_IRGRP).union(Mode::S_IXGRP).union(Mode::S_IROTH).union(Mode::S_IXOTH);

fn make_dir(path: &Path) -> Result<(), ResourceError> {
    DirBuilder::new().mode(DIRECTORY_MODE.bits()).create(path).map_err(file_error("make the directory", path))
}

fn remove_empty(path: &Path) {
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(directory = %path.display(), %error, "Cannot remove");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root_only() -> Option<tempfile::TempDir> {
        if nix::unistd::geteuid().is_root() {
            return Some(tempfile::tempdir().unwrap());
        }
        eprintln!("skipped: mounting needs root");
        None
    }

    fn names(path: &Path) -> Vec<String> {
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_container_is_seen_writable_in_a_share_that_is_not() {
        let Some(dir) = root_only() else { return };
        let (sandbox, rootfs, volume) = (dir.path().join("sb"), dir.path().join("r"), dir.path().join("v"));
        for path in [&sandbox, &rootfs, &volume] {
            fs::create_dir(path).unwrap();
        }
        fs::write(dir.path().join("hosts"), "h").unwrap();
        let share = Share::create(&sandbox).unwrap();
        let id = Id::try_from("c1").unwrap();
        let mut container = share.add_container(&id).unwrap();
        assert!(matches!(share.add_container(&id), Err(ResourceError::Taken(_))));
        let place = |path: &Path| open_anywhere(path).unwrap();
        let source = place(&rootfs);
        container.mount_rootfs(&Mount::bind("r", false), Some(source.as_fd())).unwrap();
        let hosts = place(&dir.path().join("hosts"));
        assert_eq!(container.add_volume(hosts.as_fd(), "hosts", false).unwrap(), "1-hosts");
        container.add_volume(place(&volume).as_fd(), "v", true).unwrap();

        let seen = sandbox.join(SHARED).join("c1");
        fs::write(seen.join("rootfs/new"), "x").unwrap();
        assert_eq!(fs::read(rootfs.join("new")).unwrap(), b"x");
        assert_eq!(fs::read(seen.join("mounts/1-hosts")).unwrap(), b"h");
        for refused in [sandbox.join("shared/new"), seen.join("new"), seen.join("mounts/2-v/new")] {
            assert_eq!(fs::write(&refused, "").unwrap_err().raw_os_error(), Some(libc::EROFS), "{}", refused.display());
        }
        drop(container);
        assert!(names(&sandbox.join(SHARED)).is_empty());
        drop(share);
        assert!(names(&sandbox).is_empty());
        assert_eq!(fs::read(rootfs.join("new")).unwrap(), b"x");
    }

    #[test]
    fn a_link_in_the_layout_leads_no_mount_elsewhere() {
        let Some(dir) = root_only() else { return };
        let (sandbox, outside) = (dir.path().join("sb"), dir.path().join("outside"));
        fs::create_dir(&sandbox).unwrap();
        fs::create_dir_all(outside.join("rootfs")).unwrap();
        let share = Share::create(&sandbox).unwrap();
        let mut container = share.add_container(&Id::try_from("c1").unwrap()).unwrap();
        fs::rename(sandbox.join("layout/c1"), sandbox.join("layout/away")).unwrap();
        std::os::unix::fs::symlink(&outside, sandbox.join("layout/c1")).unwrap();
        let source = open_anywhere(dir.path()).unwrap();
        assert!(container.mount_rootfs(&Mount::bind("r", false), Some(source.as_fd())).is_err());
        assert_eq!(names(&outside.join("rootfs")), Vec::<String>::new());
        // A volume goes to the container's own directory, wherever that is, and is not mounted.
        assert!(container.add_volume(source.as_fd(), "v", false).is_err());
        assert!(mounts_below(&outside).unwrap().is_empty());
    }

    #[test]
    fn what_a_killed_shim_left_is_removed_and_no_data_with_it() {
        let Some(dir) = root_only() else { return };
        let (sandbox, rootfs) = (dir.path().join("sb"), dir.path().join("r"));
        fs::create_dir(&sandbox).unwrap();
        fs::create_dir(&rootfs).unwrap();
        fs::write(rootfs.join("data"), "x").unwrap();
        let share = Share::create(&sandbox).unwrap();
        let mut container = share.add_container(&Id::try_from("c1").unwrap()).unwrap();
        let source = open_anywhere(&rootfs).unwrap();
        container.mount_rootfs(&Mount::bind("r", false), Some(source.as_fd())).unwrap();
        std::mem::forget((share, container));
        remove_leftovers(&sandbox).unwrap();
        assert!(names(&sandbox).is_empty() && mounts_below(dir.path()).unwrap().is_empty());
        assert_eq!(fs::read(rootfs.join("data")).unwrap(), b"x");
        remove_leftovers(&sandbox).unwrap();
    }

    #[test]
    fn a_file_that_is_no_placeholder_stops_the_removal() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d/data"), "x").unwrap();
        assert!(remove_layout(&dir.path().join("d")).is_err());
        assert!(dir.path().join("d/data").exists());
        // A link is removed, and what it leads to is not looked at.
        fs::create_dir(dir.path().join("empty")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("empty"), dir.path().join("link")).unwrap();
        remove_layout(&dir.path().join("link")).unwrap();
        assert!(dir.path().join("empty").exists() && !dir.path().join("link").exists());
    }
}
