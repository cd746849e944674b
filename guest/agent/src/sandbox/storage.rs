//! Storages: what a request wants mounted, by the driver that it names.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use agent_proto::agent::{FSGroup, Storage};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{Gid, chown};
use std::os::unix::fs::PermissionsExt;
use thiserror::Error;

/// A storage could not be made available.
#[derive(Debug, Error)]
pub enum Error {
    /// A driver that this agent does not have.
    #[error("Storage driver {0:?} is not served; those that are: {list}", list = DRIVERS.join(", "))]
    Driver(String),
    /// A path that is not absolute or climbs up.
    #[error("Storage path {0:?} is not valid")]
    Path(String),
    /// An option that is not understood.
    #[error("Storage option {0:?} is not valid")]
    Option(String),
    /// The mount itself or what goes with it.
    #[error("Mounting {kind} storage {storage:?} on {target:?} failed")]
    Mount {
        /// Its file system type.
        kind: String,
        /// Its source.
        storage: String,
        /// Its mount point.
        target: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// The drivers that are served, as GetGuestDetails tells them.
pub const DRIVERS: [&str; 8] = ["9p", "bind", "blk", "ephemeral", "local", "mmioblk", "overlayfs", "virtio-fs"];

/// A driver option that names a directory to be made before an overlay is mounted (its upper and work directories).
const CREATE_DIRECTORY: &str = "io.katacontainers.volume.overlayfs.create_directory=";
/// A directory that a `local` storage makes is for everybody unless an option says otherwise, as an emptyDir is.
const LOCAL_MODE: u32 = 0o777;

/// Mount points, in the order in which they were mounted.
#[derive(Debug, Default, Clone)]
pub struct Mounts(Vec<PathBuf>);

impl Mounts {
    /// Unmounts all, last first. A mount that is busy is detached: its files go when the last user does.
    pub fn unmount(&self) {
        for target in self.0.iter().rev() {
            if let Err(errno) = umount2(target, MntFlags::MNT_DETACH) {
                tracing::warn!(target = %target.display(), %errno, "A storage is still mounted");
            }
        }
    }
}

/// Mounts all of them, or none. Beside the agent's thread: the source may be a slow device.
pub async fn mount_all(storages: &[Storage]) -> Result<Mounts, Error> {
    if storages.is_empty() {
        return Ok(Mounts::default());
    }
    let storages = storages.to_vec();
    let mount_each = move || {
        let mut mounts = Mounts::default();
        for storage in &storages {
            match mount_one(storage) {
                Ok(Some(target)) => mounts.0.push(target),
                Ok(None) => {}
                Err(error) => {
                    mounts.unmount();
                    return Err(error);
                }
            }
        }
        Ok(mounts)
    };
    tokio::task::spawn_blocking(mount_each).await.unwrap_or_else(|error| {
        let source = io::Error::other(error);
        Err(Error::Mount { kind: String::new(), storage: String::new(), target: String::new(), source })
    })
}

/// Answers the mount point if there is something to unmount.
fn mount_one(storage: &Storage) -> Result<Option<PathBuf>, Error> {
    let target = checked(&storage.mount_point)?;
    let failed = |source: io::Error| Error::Mount {
        kind: storage.fstype.clone(),
        storage: storage.source.clone(),
        target: storage.mount_point.clone(),
        source,
    };
    match storage.driver.as_str() {
        "local" => {
            make_local(storage, target)?.map_err(failed)?;
            apply_group(target, storage.fs_group.as_ref()).map_err(failed)?;
            return Ok(None);
        }
        "overlayfs" => {
            let made = storage.driver_options.iter().filter_map(|option| option.strip_prefix(CREATE_DIRECTORY));
            for directory in made {
                fs::create_dir_all(checked(directory)?).map_err(failed)?;
            }
        }
        "blk" | "mmioblk" => {
            // "blk" may also carry a PCI address, and this guest has no PCI.
            if !storage.source.starts_with("/dev/") {
                return Err(Error::Path(storage.source.clone()));
            }
        }
        "9p" | "bind" | "ephemeral" | "virtio-fs" => {}
        driver => return Err(Error::Driver(driver.to_owned())),
    }
    mount_storage(storage, target).map_err(failed)?;
    apply_group(target, storage.fs_group.as_ref()).map_err(failed)?;
    Ok(Some(target.to_owned()))
}

fn checked(path: &str) -> Result<&Path, Error> {
    let invalid = || Error::Path(path.to_owned());
    let path = Path::new(path);
    let climbs = path.components().any(|component| component == std::path::Component::ParentDir);
    if path.is_absolute() && !climbs { Ok(path) } else { Err(invalid()) }
}

fn mount_storage(storage: &Storage, target: &Path) -> io::Result<()> {
    let (flags, data) = options(&storage.options);
    let kind = if storage.driver == "bind" { "bind" } else { storage.fstype.as_str() };
    let flags = if kind == "bind" { flags | MsFlags::MS_BIND } else { flags };
    let source = Path::new(&storage.source);
    if flags.contains(MsFlags::MS_BIND) && source.is_file() {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::File::options().create(true).append(true).open(target)?;
    } else {
        fs::create_dir_all(target)?;
    }
    mount(Some(storage.source.as_str()), target, Some(kind), flags, Some(data.as_str()))?;
    if flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
        // A bind mount takes its flags only from a remount (mount(2)).
        let remount = flags | MsFlags::MS_REMOUNT;
        mount(None::<&str>, target, None::<&str>, remount, None::<&str>)?;
    }
    Ok(())
}

/// A directory, made with the mode that an option names.
fn make_local(storage: &Storage, target: &Path) -> Result<io::Result<()>, Error> {
    let invalid = |option: &str| Error::Option(option.to_owned());
    let mut mode = LOCAL_MODE;
    for option in &storage.options {
        if let Some(text) = option.strip_prefix("mode=") {
            mode = u32::from_str_radix(text, 8).ok().filter(|&mode| mode <= 0o7777).ok_or_else(|| invalid(option))?;
        }
    }
    let make = || {
        fs::create_dir_all(target)?;
        // By chmod, since the mode given to mkdir is masked.
        fs::set_permissions(target, fs::Permissions::from_mode(mode))
    };
    Ok(make())
}

/// Gives the root of a volume to a group, readable and writable for it, with the group inherited.
fn apply_group(target: &Path, group: Option<&FSGroup>) -> io::Result<()> {
    let Some(group) = group else { return Ok(()) };
    chown(target, None, Some(Gid::from_raw(group.group_id)))?;
    let mode = fs::metadata(target)?.permissions().mode();
    fs::set_permissions(target, fs::Permissions::from_mode(mode | 0o2070))
}

/// Options of mount(8): those that are flags of mount(2), and the rest for the file system.
fn options(list: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in list {
        match option.as_str() {
            "" | "defaults" | "rw" | "suid" | "dev" | "exec" => {}
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => flags |= MsFlags::MS_DIRSYNC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(driver: &str, target: &str) -> Storage {
        Storage { driver: driver.into(), mount_point: target.into(), ..Default::default() }
    }

    #[test]
    fn options_are_flags_or_data() {
        let list = ["ro", "nosuid", "size=1m", "lowerdir=/a:/b", "rw"].map(str::to_owned);
        let (flags, data) = options(&list);
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(data, "size=1m,lowerdir=/a:/b");
    }

    #[test]
    fn what_is_not_served_is_named() {
        let error = mount_one(&storage("nvdimm", "/run/x")).expect_err("Not served");
        assert!(error.to_string().contains("\"nvdimm\"") && error.to_string().contains("virtio-fs"), "{error}");
        for target in ["", "run/x", "/run/../etc"] {
            assert!(matches!(mount_one(&storage("ephemeral", target)), Err(Error::Path(_))), "{target}");
        }
        let pci = Storage { source: "00/02".into(), ..storage("blk", "/run/x") };
        assert!(matches!(mount_one(&pci), Err(Error::Path(_))));
    }

    #[test]
    fn a_local_storage_is_a_directory_of_the_mode_it_asks_for() {
        let root = tempfile::tempdir().expect("A directory");
        let target = root.path().join("a/b");
        let mut local = storage("local", target.to_str().expect("UTF-8"));
        local.options = vec!["mode=0750".into()];
        assert_eq!(mount_one(&local).expect("Made"), None);
        assert_eq!(fs::metadata(&target).expect("There").permissions().mode() & 0o7777, 0o750);
        local.options = vec!["mode=99999".into()];
        assert!(matches!(mount_one(&local), Err(Error::Option(_))));
    }
}
