//! Locks of files that count on the host, so that a guest and others who have the directory can exclude each other.
//!
//! What a guest's process is to its kernel, an open file description of its own is to the host's: each owner locks a file
//! through one description, and closing it gives up all that the owner had.

use std::fs::File;
use std::io;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::LK_FLOCK;
use fuse_backend_rs::api::filesystem::FileLock;

use super::{Share, sys};

/// The end of a lock that reaches to the end of the file, wherever that comes to be (`OFFSET_MAX` of Linux).
const TO_THE_END: u64 = i64::MAX.cast_unsigned();

impl Share {
    /// What stands in the way of `lock`, or that nothing does.
    pub(super) fn get_lock(&self, node: u64, handle: u64, owner: u64, lock: FileLock) -> io::Result<FileLock> {
        self.check_locks(0)?;
        let file = self.lock_file(node, handle, owner)?;
        let found = sys::test_lock(&file, range(&lock)?)?;
        let start = found.l_start.cast_unsigned();
        let end = if found.l_len == 0 {
            TO_THE_END
        } else {
            start.saturating_add(found.l_len.cast_unsigned()).saturating_sub(1)
        };
        // Whoever it is, it is no process of the guest.
        Ok(FileLock { start, end, lock_type: u32::from(found.l_type.cast_unsigned()), pid: 0 })
    }

    /// Takes or gives up a lock without waiting for it.
    pub(super) fn set_lock(&self, node: u64, handle: u64, owner: u64, lock: &FileLock, flags: u32) -> io::Result<()> {
        self.check_locks(flags)?;
        let file = self.lock_file(node, handle, owner)?;
        sys::set_lock(&file, range(lock)?)
    }

    /// A process of the guest has closed the file: its locks on it end, as POSIX wants.
    pub(super) fn flush_locks(&self, node: u64, owner: u64) -> io::Result<()> {
        self.check_locks(0)?;
        self.table().unlock(node, owner);
        Ok(())
    }

    fn check_locks(&self, flags: u32) -> io::Result<()> {
        // What `flock` locks stays the guest's own.
        if !self.switches.posix_locks || flags & LK_FLOCK != 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        Ok(())
    }

    fn lock_file(&self, number: u64, handle: u64, owner: u64) -> io::Result<Arc<File>> {
        let node = {
            let table = self.table();
            table.handle(handle, number)?;
            if let Some(file) = table.lock(number, owner) {
                return Ok(file);
            }
            table.check_room()?;
            table.node(number)?
        };
        let writable = self.open_file(&node, libc::O_RDWR.cast_unsigned());
        let file = match writable {
            // On a mount that cannot be written a lock for reading is still to be had.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                self.open_file(&node, libc::O_RDONLY.cast_unsigned())?
            }
            other => other?,
        };
        self.table().add_lock(number, owner, file.into())
    }
}

/// A lock in the form of `fcntl`.
fn range(lock: &FileLock) -> io::Result<libc::flock> {
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let kind = i16::try_from(lock.lock_type).map_err(|_| invalid())?;
    let start = i64::try_from(lock.start).map_err(|_| invalid())?;
    let len = match lock.end {
        TO_THE_END => 0,
        end => end.checked_sub(lock.start).and_then(|len| len.checked_add(1)).ok_or_else(invalid)?,
    };
    let len = i64::try_from(len).map_err(|_| invalid())?;
    let whence = i16::try_from(libc::SEEK_SET).unwrap_or_default();
    Ok(libc::flock { l_type: kind, l_whence: whence, l_start: start, l_len: len, l_pid: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(start: u64, end: u64, lock_type: u32) -> FileLock {
        FileLock { start, end, lock_type, pid: 1 }
    }

    #[test]
    fn ranges_at_their_ends() {
        let parts = |lock| range(&lock).map(|range| (range.l_start, range.l_len)).ok();
        assert_eq!(parts(lock(0, 0, 1)), Some((0, 1)));
        assert_eq!(parts(lock(5, TO_THE_END, 0)), Some((5, 0)));
        assert_eq!(parts(lock(TO_THE_END, TO_THE_END, 0)), Some((i64::MAX, 0)));
        for bad in [lock(1, 0, 0), lock(0, u64::MAX, 0), lock(u64::MAX, u64::MAX, 0), lock(0, 1, 1 << 16)] {
            let (start, end) = (bad.start, bad.end);
            assert_eq!(parts(bad), None, "{start} to {end}");
        }
    }
}
