//! The file systems of the guest itself.

use std::fs;
use std::os::unix::fs::symlink;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use thiserror::Error;

/// A file system could not be mounted.
#[derive(Debug, Error)]
#[error("Mounting {kind} on {target} failed")]
pub struct Error {
    kind: &'static str,
    target: &'static str,
    source: std::io::Error,
}

struct FileSystem {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const fn file_system(kind: &'static str, target: &'static str, flags: MsFlags, data: &'static str) -> FileSystem {
    FileSystem { kind, target, flags, data }
}

/// In the order in which they are mounted.
const ALL: [FileSystem; 9] = {
    let inert = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC).union(MsFlags::MS_NODEV);
    let devices = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);
    let data = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
    [
        file_system("proc", "/proc", inert, ""),
        file_system("sysfs", "/sys", inert, ""),
        file_system("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755"),
        file_system("devpts", "/dev/pts", devices, "mode=0620,gid=5,ptmxmode=0666"),
        file_system("tmpfs", "/dev/shm", inert, "mode=1777"),
        // Executable: the root file systems of containers are mounted below /run.
        file_system("tmpfs", "/run", data, "mode=0755"),
        file_system("tmpfs", "/tmp", data, "mode=1777"),
        file_system("cgroup2", "/sys/fs/cgroup", inert, ""),
        file_system("mqueue", "/dev/mqueue", inert, ""),
    ]
};

/// What a guest kernel may lack without harm to containers that do not ask for it.
const OPTIONAL: [&str; 1] = ["mqueue"];

/// `/dev` links that programs expect and devtmpfs does not make.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts all of them. A target that is mounted already, by the kernel or an initrd's script, is left alone.
pub fn mount_all() -> Result<(), Error> {
    for entry in &ALL {
        let failed = |source| Error { kind: entry.kind, target: entry.target, source };
        fs::create_dir_all(entry.target).or_else(optional(entry)).map_err(failed)?;
        match mount(Some(entry.kind), entry.target, Some(entry.kind), entry.flags, Some(entry.data)) {
            Ok(()) | Err(Errno::EBUSY) => {}
            Err(error) => optional(entry)(error.into()).map_err(failed)?,
        }
    }
    for (original, link) in LINKS {
        // Present already when the initrd brings its own /dev.
        let _ = symlink(original, link);
    }
    Ok(())
}

fn optional(entry: &FileSystem) -> impl FnOnce(std::io::Error) -> std::io::Result<()> {
    let optional = OPTIONAL.contains(&entry.kind);
    move |error| if optional { Ok(()) } else { Err(error) }
}
