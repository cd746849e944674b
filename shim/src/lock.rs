//! Locking without poisoning: no code here panics while it holds a lock, and each lock guards a single value. And locks
//! that are files.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether `file` is what has the name `path`: the lock of a file that has lost its name is nobody's.
pub fn is_named(file: &File, path: &Path) -> bool {
    let same = || {
        let (ours, theirs) = (file.metadata()?, path.symlink_metadata()?);
        Ok::<_, io::Error>((ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()))
    };
    same().unwrap_or(false)
}
