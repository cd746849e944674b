//! A name that one process at a time has: a file that is there, and locked, as long as somebody does.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// The right to what the file stands for. The kernel takes it from a process that ends.
#[derive(Debug)]
pub struct FileLock {
    path: PathBuf,
    file: Flock<File>,
}

impl FileLock {
    /// Takes the lock, making the file. `None` if somebody else has it, unless this `waits`.
    pub fn take(path: &Path, waits: bool) -> io::Result<Option<Self>> {
        let how = if waits { FlockArg::LockExclusive } else { FlockArg::LockExclusiveNonblock };
        loop {
            let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
            let file = match Flock::lock(file, how) {
                Ok(file) => file,
                Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
                Err((_, Errno::EINTR)) => continue,
                Err((_, errno)) => return Err(errno.into()),
            };
            // Whoever had it has removed the file: the lock of a file without a name is nobody's.
            if is_named(&file, path) {
                return Ok(Some(Self { path: path.to_owned(), file }));
            }
        }
    }

    /// The file, for what others should know of who has the lock.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // Before the lock goes: see `take`.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether `file` is what has the name `path`.
pub fn is_named(file: &File, path: &Path) -> bool {
    let same = || {
        let (ours, theirs) = (file.metadata()?, path.symlink_metadata()?);
        Ok::<_, io::Error>((ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()))
    };
    same().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_it_until_it_is_dropped_and_no_file_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = FileLock::take(&path, false).unwrap().unwrap();
        assert!(FileLock::take(&path, false).unwrap().is_none());
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || FileLock::take(&path, true).unwrap().is_some()
        });
        drop(lock);
        assert!(waiter.join().unwrap());
        assert!(!path.exists());
    }
}
