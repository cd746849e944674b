//! The directory that the guest sees, and the containers' places in it.
//!
//! The guest must be able to write to containers' files and to nothing else. So directories are made in `layout`,
//! which the guest does not see, and the guest gets `shared`: a read-only bind mount of it, on which root file systems
//! and volumes are mounted with their own rights. A new directory in `layout` shows at once in `shared`.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::mount::{Mount, Mounted, mounts_below, unmount};
use super::{ResourceError, file_error};
use crate::ids::Id;

/// Where the agent mounts the share: kata's place, which the agent's `Storage` names.
pub const GUEST_SHARE: &str = "/run/kata-containers/shared/containers";
/// Tag of the virtio-fs device.
pub const TAG: &str = "kataShared";

const LAYOUT: &str = "layout";
const SHARED: &str = "shared";
const ROOTFS: &str = "rootfs";
const MOUNTS: &str = "mounts";

/// A sandbox's share. Dropped after its containers, it leaves nothing.
#[derive(Debug)]
pub struct Share {
    layout: PathBuf,
    shared: PathBuf,
    mounted: Option<Mounted>,
}

impl Share {
    /// Makes the share in the sandbox's directory, which must exist.
    pub fn create(sandbox: &Path) -> Result<Self, ResourceError> {
        let mut share = Self { layout: sandbox.join(LAYOUT), shared: sandbox.join(SHARED), mounted: None };
        make_dir(&share.layout)?;
        make_dir(&share.shared)?;
        share.mounted = Some(Mount::bind(&share.layout, true).mount(&share.shared)?);
        Ok(share)
    }

    /// The directory to be exported.
    pub fn exported(&self) -> &Path {
        &self.shared
    }

    /// Makes a container's place.
    pub fn add_container(&self, id: &Id) -> Result<ContainerShare, ResourceError> {
        let layout = self.layout.join(id.as_str());
        if let Err(error) = DirBuilder::new().mode(0o755).create(&layout) {
            return Err(match error.kind() {
                io::ErrorKind::AlreadyExists => ResourceError::Taken(id.to_string()),
                _ => file_error("make the directory", layout)(error),
            });
        }
        let share = ContainerShare {
            shared: self.shared.join(id.as_str()),
            guest: format!("{GUEST_SHARE}/{id}"),
            mounts: Vec::new(),
            layout,
        };
        make_dir(&share.layout.join(ROOTFS))?;
        make_dir(&share.layout.join(MOUNTS))?;
        Ok(share)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.mounted = None;
        remove_empty(&self.shared);
        remove_empty(&self.layout);
    }
}

/// A container's place in the share: its root file system and its volumes.
#[derive(Debug)]
pub struct ContainerShare {
    layout: PathBuf,
    shared: PathBuf,
    guest: String,
    mounts: Vec<Mounted>,
}

impl ContainerShare {
    /// Mounts the root file system from what the snapshotter gave, or from the bundle where it gave nothing. Returns
    /// the guest's path.
    pub fn mount_rootfs(&mut self, mounts: &[Mount], bundle_rootfs: &Path) -> Result<String, ResourceError> {
        let target = self.shared.join(ROOTFS);
        if mounts.is_empty() {
            self.mounts.push(Mount::bind(bundle_rootfs, false).mount(&target)?);
        }
        for mount in mounts {
            self.mounts.push(mount.mount(&target)?);
        }
        Ok(format!("{}/{ROOTFS}", self.guest))
    }

    /// Mounts a file or directory of the host for the container. Returns the guest's path.
    pub fn add_volume(&mut self, source: &Path, read_only: bool) -> Result<String, ResourceError> {
        let metadata = fs::metadata(source).map_err(file_error("examine", source))?;
        let base = source.file_name().map_or_else(|| "root".into(), |name| name.to_string_lossy());
        // Numbered, as two volumes may have one name; the name is for the reader of mount tables.
        let name = format!("{}-{base}", self.mounts.len());
        let placeholder = self.layout.join(MOUNTS).join(&name);
        if metadata.is_dir() {
            make_dir(&placeholder)?;
        } else {
            fs::File::create_new(&placeholder).map_err(file_error("make the file", &placeholder))?;
        }
        self.mounts.push(Mount::bind(source, read_only).mount(&self.shared.join(MOUNTS).join(&name))?);
        Ok(format!("{}/{MOUNTS}/{name}", self.guest))
    }
}

impl ContainerShare {
    /// Where the root file system and the volumes are mounted, the latest first.
    pub fn mount_points(&self) -> impl Iterator<Item = &Path> {
        self.mounts.iter().rev().map(Mounted::point)
    }
}

impl Drop for ContainerShare {
    fn drop(&mut self) {
        // The latest first: a volume may be mounted on another.
        while let Some(mounted) = self.mounts.pop() {
            drop(mounted);
        }
        if let Err(error) = remove_layout(&self.layout) {
            tracing::warn!(directory = %self.layout.display(), %error, "Cannot remove a container's place in the share");
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
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
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

fn make_dir(path: &Path) -> Result<(), ResourceError> {
    DirBuilder::new().mode(0o755).create(path).map_err(file_error("make the directory", path))
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
        assert_eq!(container.mount_rootfs(&[], &rootfs).unwrap(), format!("{GUEST_SHARE}/c1/rootfs"));
        let guest = container.add_volume(&dir.path().join("hosts"), false).unwrap();
        assert_eq!(guest, format!("{GUEST_SHARE}/c1/mounts/1-hosts"));
        container.add_volume(&volume, true).unwrap();

        let seen = share.exported().join("c1");
        fs::write(seen.join("rootfs/new"), "x").unwrap();
        assert_eq!(fs::read(rootfs.join("new")).unwrap(), b"x");
        assert_eq!(fs::read(seen.join("mounts/1-hosts")).unwrap(), b"h");
        for refused in [share.exported().join("new"), seen.join("new"), seen.join("mounts/2-v/new")] {
            assert_eq!(fs::write(&refused, "").unwrap_err().raw_os_error(), Some(libc::EROFS), "{}", refused.display());
        }

        // Whoever lets go of them is told of all of them, before they go.
        let points: Vec<_> = container.mount_points().map(Path::to_owned).collect();
        assert_eq!(points, [seen.join("mounts/2-v"), seen.join("mounts/1-hosts"), seen.join("rootfs")]);
        drop(container);
        assert!(names(share.exported()).is_empty());
        drop(share);
        assert!(names(&sandbox).is_empty());
        assert_eq!(fs::read(rootfs.join("new")).unwrap(), b"x");
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
        container.mount_rootfs(&[], &rootfs).unwrap();
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
    }
}
