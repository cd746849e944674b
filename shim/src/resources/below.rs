//! Files that are reached through a directory that is held open, and not by a path that somebody may have changed.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};

/// A place that stays the same file whatever happens to its name. Nothing can be read through it.
const PLACE: OFlag = OFlag::O_PATH.union(OFlag::O_CLOEXEC);

/// The place of `path`, which may not leave `directory` nor go through a link.
pub fn open_below(directory: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    Ok(openat2(directory, path, OpenHow::new().flags(PLACE).resolve(resolve))?)
}

/// The place of an absolute path of the host, whose own links count; those of `/proc` to open files do not.
pub fn open_anywhere(path: &Path) -> io::Result<OwnedFd> {
    if !path.is_absolute() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "The path does not start at the root"));
    }
    Ok(openat2(AT_FDCWD, path, OpenHow::new().flags(PLACE).resolve(ResolveFlag::RESOLVE_NO_MAGICLINKS))?)
}

/// A path by which the kernel finds the place `opened`.
pub fn fd_path(opened: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_place_below_a_directory_is_reached_by_no_link_and_no_dots() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("base/a/b")).unwrap();
        fs::create_dir(dir.path().join("beside")).unwrap();
        symlink("/", dir.path().join("base/root")).unwrap();
        symlink("a", dir.path().join("base/inner")).unwrap();
        let base = open_anywhere(&dir.path().join("base")).unwrap();
        let below = |path: &str| open_below(base.as_fd(), Path::new(path));
        assert_eq!(fs::read_link(fd_path(below("a/b").unwrap().as_fd())).unwrap(), dir.path().join("base/a/b"));
        for path in ["../beside", "a/../../beside", "/etc", "root", "root/etc", "inner", "inner/b"] {
            assert!(below(path).is_err(), "{path}");
        }
    }

    #[test]
    fn a_path_of_the_host_is_whole_and_leads_through_no_process() {
        let dir = tempfile::tempdir().unwrap();
        symlink("/etc", dir.path().join("link")).unwrap();
        assert!(open_anywhere(&dir.path().join("link/passwd")).is_ok());
        assert!(open_anywhere(Path::new("etc")).is_err());
        assert!(open_anywhere(Path::new("/proc/self/root/etc")).is_err());
    }
}
