//! A snapshot that is being written beside the one that is in its directory.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::layers::hold;
use super::{BASE, MANIFEST, MEMORY, STATE, SnapshotError};

/// Files that take the place of those of the same names together. Until then what is in the directory stays as it is;
/// where that is never, they are removed.
pub(crate) struct Draft<'a> {
    directory: &'a Path,
    based: bool,
}

impl<'a> Draft<'a> {
    /// Begins a snapshot in `directory`, which is made where it does not exist.
    pub fn begin(directory: &'a Path) -> Result<Self, SnapshotError> {
        fs::create_dir_all(directory).map_err(SnapshotError::write(directory))?;
        Ok(Self { directory, based: false })
    }

    /// Writes the file `name`, for this user alone: guests have secrets.
    pub fn put<T>(
        &self,
        name: &str,
        write: impl FnOnce(&File, &Path) -> Result<T, SnapshotError>,
    ) -> Result<T, SnapshotError> {
        let (file, path) = self.open(name)?;
        let written = write(&file, &path)?;
        file.sync_all().map_err(SnapshotError::write(&path))?;
        Ok(written)
    }

    /// Makes the file `name` for whoever writes it, and is to bring it to the disk, before all is published.
    pub fn open(&self, name: &str) -> Result<(File, PathBuf), SnapshotError> {
        let path = self.new_path(name);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path);
        Ok((file.map_err(SnapshotError::write(&path))?, path))
    }

    /// Leads to the snapshot that this one is the difference to.
    pub fn put_base(&mut self, base: &Path) -> Result<(), SnapshotError> {
        let path = self.new_path(BASE);
        remove(&path).and_then(|()| link(base, &path)).map_err(SnapshotError::write(&path))?;
        self.based = true;
        Ok(())
    }

    /// Puts the new snapshot in the place of the old one, while nobody opens it. The manifest goes first and comes last:
    /// if this process or the host dies in between, there is no snapshot, and none that is half of each.
    pub fn publish(self) -> Result<(), SnapshotError> {
        let held = hold(self.directory, libc::LOCK_EX).map_err(SnapshotError::write(self.directory))?;
        let path = self.directory.join(MANIFEST);
        remove(&path).map_err(SnapshotError::write(&path))?;
        if !self.based {
            let path = self.directory.join(BASE);
            remove(&path).map_err(SnapshotError::write(&path))?;
        }
        let names = [MEMORY, STATE].into_iter().chain(self.based.then_some(BASE)).chain([MANIFEST]);
        for name in names {
            let path = self.directory.join(name);
            fs::rename(self.new_path(name), &path).map_err(SnapshotError::write(&path))?;
        }
        held.sync_all().map_err(SnapshotError::write(self.directory))
    }

    fn new_path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.new"))
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        for name in [MEMORY, STATE, BASE, MANIFEST] {
            // Those that were published have other names.
            let _ = fs::remove_file(self.new_path(name));
        }
    }
}

/// Makes a symbolic link: by the call that filters allow, which is not the C library's choice for `symlink`.
fn link(target: &Path, path: &Path) -> io::Result<()> {
    let (target, path) = (CString::new(target.as_os_str().as_bytes())?, CString::new(path.as_os_str().as_bytes())?);
    // SAFETY: two C strings that live through the call.
    match unsafe { libc::symlinkat(target.as_ptr(), libc::AT_FDCWD, path.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
