//! The system calls of a share, each as a safe function on descriptors.
//!
//! Nothing here takes a path from the guest but a single name, checked by
//! [`check_name`](super::names::check), relative to a directory's descriptor.

use std::ffi::{CStr, CString, c_int};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Longest target of a symbolic link, in bytes.
const MAX_LINK: usize = 4096;

/// A directory's or file's attributes and the mount it was reached through.
pub struct Stat {
    /// As `stat` has them.
    pub attr: libc::stat64,
    /// `stx_mnt_id`
    pub mount: u64,
}

fn check(result: c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn descriptor(result: c_int) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a system call just returned it as a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}

fn length(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Opens a directory named by the operator, for use as a starting point only.
pub fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    open_path(path, libc::O_DIRECTORY)
}

/// Opens a directory or file named by the operator, for looking at it. A symbolic link is not followed: a guest may have
/// put it there.
pub fn open_place(path: &Path) -> io::Result<OwnedFd> {
    open_path(path, libc::O_NOFOLLOW)
}

fn open_path(path: &Path, flags: c_int) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = flags | libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: `path` is a string that ends with a zero; the result is checked.
    descriptor(unsafe { libc::open(path.as_ptr(), flags) })
}

/// `openat2` that cannot leave `dir`: no symbolic link is followed, not even a magic one.
fn open_beneath(dir: BorrowedFd<'_>, name: &CStr, flags: c_int, mode: u32) -> io::Result<OwnedFd> {
    // SAFETY: all zeroes is a value of this structure of integers.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::from((flags | libc::O_NOFOLLOW | libc::O_CLOEXEC).cast_unsigned());
    how.mode = u64::from(mode);
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_SYMLINKS;
    // SAFETY: `name` ends with a zero and `how` is as long as is said; both live over the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_openat2, dir.as_raw_fd(), name.as_ptr(), &raw const how, size_of::<libc::open_how>())
    };
    descriptor(c_int::try_from(fd).unwrap_or(-1))
}

/// A handle on the entry `name` of `dir`, whatever it is: good for looking at it, not into it.
pub fn open_entry(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    open_beneath(dir, name, libc::O_PATH, 0)
}

/// Makes the regular file `name` in `dir` and opens it. Fails when there is such an entry.
pub fn create(dir: BorrowedFd<'_>, name: &CStr, flags: c_int, mode: u32) -> io::Result<File> {
    open_beneath(dir, name, flags | libc::O_CREAT | libc::O_EXCL, mode).map(File::from)
}

/// Attributes of what `fd` stands for.
pub fn stat(fd: BorrowedFd<'_>) -> io::Result<Stat> {
    // SAFETY: all zeroes is a value of this structure of integers.
    let mut statx: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path means `fd` itself; `statx` is valid for writing.
    check(unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW,
            libc::STATX_BASIC_STATS | libc::STATX_MNT_ID,
            &raw mut statx,
        )
    })?;
    // SAFETY: all zeroes is a value of this structure of integers.
    let mut attr: libc::stat64 = unsafe { std::mem::zeroed() };
    attr.st_dev = libc::makedev(statx.stx_dev_major, statx.stx_dev_minor);
    attr.st_ino = statx.stx_ino;
    attr.st_mode = u32::from(statx.stx_mode);
    attr.st_nlink = u64::from(statx.stx_nlink);
    attr.st_uid = statx.stx_uid;
    attr.st_gid = statx.stx_gid;
    attr.st_rdev = libc::makedev(statx.stx_rdev_major, statx.stx_rdev_minor);
    attr.st_size = signed(statx.stx_size);
    attr.st_blksize = i64::from(statx.stx_blksize);
    attr.st_blocks = signed(statx.stx_blocks);
    (attr.st_atime, attr.st_atime_nsec) = time(&statx.stx_atime);
    (attr.st_mtime, attr.st_mtime_nsec) = time(&statx.stx_mtime);
    (attr.st_ctime, attr.st_ctime_nsec) = time(&statx.stx_ctime);
    Ok(Stat { attr, mount: statx.stx_mnt_id })
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn time(time: &libc::statx_timestamp) -> (i64, i64) {
    (time.tv_sec, i64::from(time.tv_nsec))
}

/// Attributes of the file system that `fd` is on.
pub fn statfs(fd: BorrowedFd<'_>) -> io::Result<libc::statvfs64> {
    // SAFETY: all zeroes is a value of this structure of integers.
    let mut statvfs: libc::statvfs64 = unsafe { std::mem::zeroed() };
    // SAFETY: `statvfs` is valid for writing.
    check(unsafe { libc::fstatvfs64(fd.as_raw_fd(), &raw mut statvfs) })?;
    Ok(statvfs)
}

/// Makes a directory.
pub fn mkdir(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> io::Result<()> {
    // SAFETY: `name` ends with a zero.
    check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) })
}

/// Makes an empty file, a FIFO or a socket.
pub fn mknod(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> io::Result<()> {
    // SAFETY: `name` ends with a zero.
    check(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, 0) })
}

/// Makes a symbolic link.
pub fn symlink(target: &CStr, dir: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // SAFETY: both strings end with a zero.
    check(unsafe { libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr()) })
}

/// Where a symbolic link points.
pub fn readlink(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut target = vec![0; MAX_LINK];
    // SAFETY: an empty path means `fd` itself; the buffer is as long as is said.
    let count =
        length(unsafe { libc::readlinkat(fd.as_raw_fd(), c"".as_ptr(), target.as_mut_ptr().cast(), target.len()) })?;
    target.truncate(count);
    Ok(target)
}

/// Removes an entry; a directory's with `AT_REMOVEDIR` in `flags`.
pub fn unlink(dir: BorrowedFd<'_>, name: &CStr, flags: c_int) -> io::Result<()> {
    // SAFETY: `name` ends with a zero.
    check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) })
}

/// Renames an entry.
pub fn rename(from: (BorrowedFd<'_>, &CStr), to: (BorrowedFd<'_>, &CStr), flags: u32) -> io::Result<()> {
    // SAFETY: both names end with a zero.
    check(unsafe { libc::renameat2(from.0.as_raw_fd(), from.1.as_ptr(), to.0.as_raw_fd(), to.1.as_ptr(), flags) })
}

/// Changes owner and group; `u32::MAX` leaves one as it is.
pub fn chown(fd: BorrowedFd<'_>, uid: u32, gid: u32) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: an empty path means `fd` itself.
    check(unsafe { libc::fchownat(fd.as_raw_fd(), c"".as_ptr(), uid, gid, flags) })
}

/// Reserves or frees space of a file.
pub fn fallocate(file: &File, mode: u32, offset: u64, len: u64) -> io::Result<()> {
    let too_large = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let offset = i64::try_from(offset).map_err(too_large)?;
    let len = i64::try_from(len).map_err(too_large)?;
    // SAFETY: no memory is involved.
    check(unsafe { libc::fallocate64(file.as_raw_fd(), mode.cast_signed(), offset, len) })
}

/// The next data or hole of a file.
pub fn seek(file: &File, offset: u64, whence: c_int) -> io::Result<u64> {
    let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: no memory is involved.
    let found = unsafe { libc::lseek64(file.as_raw_fd(), offset, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}

/// Takes or gives up a lock, for everybody who has the same open file description; never waits.
pub fn set_lock(file: &File, mut lock: libc::flock) -> io::Result<()> {
    // SAFETY: `lock` is valid for the call.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) })
}

/// The lock that would keep this one from being taken, or this one as unlocked.
pub fn test_lock(file: &File, mut lock: libc::flock) -> io::Result<libc::flock> {
    // SAFETY: `lock` is valid for reading and writing.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
    Ok(lock)
}

/// Reads entries of an open directory from where it stands, as `getdents64` lays them out.
pub fn read_dir(dir: &File, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is as long as is said.
    let count = unsafe { libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), buffer.as_mut_ptr(), buffer.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// The way from a handle that was opened for looking at a file into the file: `/proc/self/fd`.
///
/// Its links lead to the very file that a descriptor stands for, whatever became of its name.
pub struct Reopener {
    fds: OwnedFd,
}

impl Reopener {
    /// Needs the proc file system where it always is.
    pub fn new() -> io::Result<Self> {
        Ok(Self { fds: open_dir(Path::new("/proc/self/fd"))? })
    }

    /// Opens what `fd` stands for.
    pub fn open(&self, fd: BorrowedFd<'_>, flags: c_int) -> io::Result<OwnedFd> {
        let name = number(fd);
        let flags = flags | libc::O_CLOEXEC;
        // SAFETY: `name` ends with a zero; the result is checked.
        descriptor(unsafe { libc::openat(self.fds.as_raw_fd(), name.as_ptr(), flags) })
    }

    /// Changes the permission bits. Not for a symbolic link, which has none.
    pub fn chmod(&self, fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
        let name = number(fd);
        // SAFETY: `name` ends with a zero.
        check(unsafe { libc::fchmodat(self.fds.as_raw_fd(), name.as_ptr(), mode, 0) })
    }

    /// Changes the times of access and modification.
    pub fn set_times(&self, fd: BorrowedFd<'_>, times: &[libc::timespec; 2]) -> io::Result<()> {
        let name = number(fd);
        // SAFETY: `name` ends with a zero, and two times are pointed to.
        check(unsafe { libc::utimensat(self.fds.as_raw_fd(), name.as_ptr(), times.as_ptr(), 0) })
    }

    /// Gives the file another name.
    pub fn link(&self, fd: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        let from = number(fd);
        // SAFETY: both names end with a zero.
        check(unsafe {
            libc::linkat(self.fds.as_raw_fd(), from.as_ptr(), dir.as_raw_fd(), name.as_ptr(), libc::AT_SYMLINK_FOLLOW)
        })
    }
}

fn number(fd: BorrowedFd<'_>) -> CString {
    // Digits have no zero byte.
    CString::new(fd.as_raw_fd().to_string()).unwrap_or_default()
}

/// The path of a file for the calls on extended attributes, which know no descriptor of a handle.
fn proc_path(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default()
}

/// Sets an extended attribute.
pub fn set_xattr(fd: BorrowedFd<'_>, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
    let path = proc_path(fd);
    // SAFETY: both strings end with a zero, and the value is as long as is said.
    check(unsafe {
        libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags.cast_signed())
    })
}

/// Reads an extended attribute and returns its length, or the length alone into an empty buffer.
pub fn get_xattr(fd: BorrowedFd<'_>, name: &CStr, value: &mut [u8]) -> io::Result<usize> {
    let path = proc_path(fd);
    // SAFETY: both strings end with a zero, and the buffer is as long as is said.
    length(unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) })
}

/// Reads the names of all extended attributes, each ended by a zero.
pub fn list_xattr(fd: BorrowedFd<'_>, names: &mut [u8]) -> io::Result<usize> {
    let path = proc_path(fd);
    // SAFETY: the string ends with a zero, and the buffer is as long as is said.
    length(unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) })
}

/// Removes an extended attribute.
pub fn remove_xattr(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let path = proc_path(fd);
    // SAFETY: both strings end with a zero.
    check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) })
}

/// How many descriptors the process may have open.
pub fn descriptor_limit() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for writing. It stays 0 should the call fail, which it cannot.
    let _ = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX)
}

/// User and group that this thread makes files as.
pub fn own_ids() -> (u32, u32) {
    // SAFETY: plain calls that cannot fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}
