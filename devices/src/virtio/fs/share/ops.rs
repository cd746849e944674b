//! The requests of FUSE, one by one. Those that are not here are answered ENOSYS, on purpose:
//!
//! - FLUSH, GETLK, SETLK, unless the host shares its locks: locks are then the guest's own, and there is nothing to
//!   flush. Linux asks once and no longer sends a FLUSH for each `close`.
//! - SETXATTR and its like, where extended attributes are switched off.
//! - ACCESS: Linux checks permissions itself for virtio-fs.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileLock, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};

use super::table::Node;
use super::{PERMISSIONS, Share, names, sys};
use crate::virtio::fs::CachePolicy;

/// Longest value and list of names of extended attributes that Linux has (`XATTR_SIZE_MAX`,
/// `XATTR_LIST_MAX`).
const MAX_XATTR: usize = 64 << 10;

type Opened = (Option<u64>, OpenOptions, Option<u32>);

impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;

    /// Also when the guest says it a second time: a guest that starts anew knows nothing.
    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.reset();
        let wanted = self.wanted_options();
        let writes_back = (capable & wanted).contains(FsOptions::WRITEBACK_CACHE);
        self.writes_back.store(writes_back, Ordering::Relaxed);
        Ok(wanted)
    }

    fn destroy(&self) {
        self.reset();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        names::check(name)?;
        match self.enter(&*self.known(parent)?, name) {
            // An entry without node is one that is known not to be there, for that long.
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.switches.cache == CachePolicy::Always => {
                Ok(Entry { entry_timeout: self.timeout(), ..Entry::default() })
            }
            other => other,
        }
    }

    fn forget(&self, _: &Context, node: u64, count: u64) {
        self.table().forget(node, count);
    }

    fn batch_forget(&self, _: &Context, requests: Vec<(u64, u64)>) {
        let mut table = self.table();
        for (node, count) in requests {
            table.forget(node, count);
        }
    }

    fn getattr(&self, _: &Context, node: u64, _: Option<u64>) -> io::Result<(libc::stat64, Duration)> {
        self.attributes(&*self.known(node)?)
    }

    fn setattr(
        &self,
        _: &Context,
        number: u64,
        attr: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        let node = self.known(number)?;
        if valid.contains(SetattrValid::MODE) {
            self.reopener.chmod(node.fd(), attr.st_mode & PERMISSIONS)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let keep = u32::MAX;
            let uid = if valid.contains(SetattrValid::UID) { attr.st_uid } else { keep };
            let gid = if valid.contains(SetattrValid::GID) { attr.st_gid } else { keep };
            sys::chown(node.fd(), uid, gid)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            if valid.contains(SetattrValid::KILL_SUIDGID) {
                self.drop_privilege_bits(&node)?;
            }
            self.truncate(&node, number, handle, attr.st_size)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            self.reopener.set_times(node.fd(), &times(&attr, valid))?;
        }
        self.attributes(&node)
    }

    fn readlink(&self, _: &Context, node: u64) -> io::Result<Vec<u8>> {
        sys::readlink(self.known(node)?.fd())
    }

    fn symlink(&self, context: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        names::check(name)?;
        let parent = self.room_in(parent)?;
        sys::symlink(target, parent.fd(), name)?;
        self.enter_new(&parent, name, context, 0)
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        _device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        names::check(name)?;
        let kind = mode & libc::S_IFMT;
        // A device node would be one of the host's.
        if ![0, libc::S_IFREG, libc::S_IFIFO, libc::S_IFSOCK].contains(&kind) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        let parent = self.room_in(parent)?;
        let permissions = mode & PERMISSIONS & !umask;
        sys::mknod(parent.fd(), name, kind | permissions)?;
        self.enter_new(&parent, name, context, permissions)
    }

    fn mkdir(&self, context: &Context, parent: u64, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        names::check(name)?;
        let parent = self.room_in(parent)?;
        let permissions = mode & PERMISSIONS & !umask;
        sys::mkdir(parent.fd(), name, permissions)?;
        self.enter_new(&parent, name, context, permissions)
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        names::check(name)?;
        sys::unlink(self.known(parent)?.fd(), name, 0)
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        names::check(name)?;
        sys::unlink(self.known(parent)?.fd(), name, libc::AT_REMOVEDIR)
    }

    fn rename(&self, _: &Context, from: u64, old_name: &CStr, to: u64, new_name: &CStr, flags: u32) -> io::Result<()> {
        names::check(old_name)?;
        names::check(new_name)?;
        // RENAME_WHITEOUT would make a device node.
        if flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let (from, to) = (self.known(from)?, self.known(to)?);
        sys::rename((from.fd(), old_name), (to.fd(), new_name), flags)
    }

    fn link(&self, _: &Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        names::check(name)?;
        let node = self.known(node)?;
        let parent = self.known(parent)?;
        self.reopener.link(node.fd(), parent.fd(), name)?;
        self.enter(&parent, name)
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        names::check(name)?;
        let parent = self.room_in(parent)?;
        let flags = self.host_flags(args.flags)?;
        let permissions = args.mode & PERMISSIONS & !args.umask;
        let exclusive = args.flags & libc::O_EXCL.cast_unsigned() != 0;
        let (entry, file) = match sys::create(parent.fd(), name, flags, permissions) {
            Ok(file) => {
                self.settle_new(file.as_fd(), context, permissions)?;
                let handle = self.reopener.open(file.as_fd(), libc::O_PATH)?;
                (self.enter_handle(handle)?, OwnedFd::from(file))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !exclusive => {
                let entry = self.enter(&parent, name)?;
                let file = self.open_known(entry.inode, args.flags, args.fuse_flags);
                (entry, file.inspect_err(|_| self.table().forget(entry.inode, 1))?)
            }
            Err(error) => return Err(error),
        };
        let handle = self.table().open(entry.inode, file.into());
        let handle = handle.inspect_err(|_| self.table().forget(entry.inode, 1))?;
        Ok((entry, Some(handle), self.file_options(), None))
    }

    fn open(&self, _: &Context, node: u64, flags: u32, fuse_flags: u32) -> io::Result<Opened> {
        self.table().check_room()?;
        let file = self.open_known(node, flags, fuse_flags)?;
        let handle = self.table().open(node, file.into())?;
        Ok((Some(handle), self.file_options(), None))
    }

    fn read(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        answer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let handle = self.table().handle(handle, node)?;
        handle.at_position(|file| answer.write_from(file, size as usize, offset))
    }

    fn write(
        &self,
        _: &Context,
        number: u64,
        handle: u64,
        data: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: bool,
        _: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let handle = self.table().handle(handle, number)?;
        if fuse_flags & WRITE_KILL_PRIV != 0 {
            self.drop_privilege_bits(&*self.known(number)?)?;
        }
        handle.at_position(|file| data.read_to(file, size as usize, offset))
    }

    fn fsync(&self, _: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let handle = self.table().handle(handle, node)?;
        if data_only { handle.file().sync_data() } else { handle.file().sync_all() }
    }

    fn fallocate(&self, _: &Context, node: u64, handle: u64, mode: u32, offset: u64, len: u64) -> io::Result<()> {
        let handle = self.table().handle(handle, node)?;
        sys::fallocate(handle.file(), mode, offset, len)
    }

    fn lseek(&self, _: &Context, node: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        // Positions are the guest's own; the host knows only where data and holes are.
        let whence = whence.cast_signed();
        if ![libc::SEEK_DATA, libc::SEEK_HOLE].contains(&whence) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let handle = self.table().handle(handle, node)?;
        sys::seek(handle.file(), offset, whence)
    }

    fn release(&self, _: &Context, node: u64, _: u32, handle: u64, _: bool, _: bool, _: Option<u64>) -> io::Result<()> {
        self.table().close(handle, node)
    }

    fn flush(&self, _: &Context, node: u64, _: u64, owner: u64) -> io::Result<()> {
        self.flush_locks(node, owner)
    }

    fn getlk(&self, _: &Context, node: u64, handle: u64, owner: u64, lock: FileLock, _: u32) -> io::Result<FileLock> {
        self.get_lock(node, handle, owner, lock)
    }

    fn setlk(&self, _: &Context, node: u64, handle: u64, owner: u64, lock: FileLock, flags: u32) -> io::Result<()> {
        self.set_lock(node, handle, owner, &lock, flags)
    }

    fn statfs(&self, _: &Context, node: u64) -> io::Result<libc::statvfs64> {
        sys::statfs(self.known(node)?.fd())
    }

    fn setxattr(&self, _: &Context, node: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        self.check_xattrs()?;
        names::check_xattr(name)?;
        sys::set_xattr(self.known(node)?.fd(), name, value, flags)
    }

    fn getxattr(&self, _: &Context, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.check_xattrs()?;
        names::check_xattr(name)?;
        let node = self.known(node)?;
        let mut value = vec![0; MAX_XATTR.min(size as usize)];
        let len = sys::get_xattr(node.fd(), name, &mut value)?;
        if size == 0 {
            return Ok(GetxattrReply::Count(u32::try_from(len).unwrap_or(u32::MAX)));
        }
        value.truncate(len);
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, _: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        self.check_xattrs()?;
        let node = self.known(node)?;
        // All of them even if only the length is asked for: not all are told.
        let mut names = vec![0; MAX_XATTR];
        let len = sys::list_xattr(node.fd(), &mut names)?;
        names.truncate(len);
        let names = names::keep_xattrs(&names);
        if size == 0 {
            return Ok(ListxattrReply::Count(u32::try_from(names.len()).unwrap_or(u32::MAX)));
        }
        if names.len() > size as usize {
            return Err(io::Error::from_raw_os_error(libc::ERANGE));
        }
        Ok(ListxattrReply::Names(names))
    }

    fn removexattr(&self, _: &Context, node: u64, name: &CStr) -> io::Result<()> {
        self.check_xattrs()?;
        names::check_xattr(name)?;
        sys::remove_xattr(self.known(node)?.fd(), name)
    }

    fn opendir(&self, _: &Context, node: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.table().check_room()?;
        let dir = self.known(node)?;
        if dir.kind != libc::S_IFDIR {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        let file = self.reopener.open(dir.fd(), libc::O_RDONLY | libc::O_DIRECTORY)?;
        let handle = self.table().open(node, file.into())?;
        Ok((Some(handle), self.dir_options()))
    }

    fn readdir(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let dir = self.known(node)?;
        let handle = self.table().handle(handle, node)?;
        handle.with_position(|file| self.list(&dir, file, size, offset, add))
    }

    fn readdirplus(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let dir = self.known(node)?;
        let handle = self.table().handle(handle, node)?;
        handle.with_position(|file| self.list_plus(&dir, file, size, offset, add))
    }

    fn fsyncdir(&self, context: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.fsync(context, node, data_only, handle)
    }

    fn releasedir(&self, _: &Context, node: u64, _: u32, handle: u64) -> io::Result<()> {
        self.table().close(handle, node)
    }
}

impl Share {
    /// A directory in which something is to be made, which needs room in the table.
    fn room_in(&self, parent: u64) -> io::Result<std::sync::Arc<Node>> {
        let table = self.table();
        table.check_room()?;
        table.node(parent)
    }

    fn open_known(&self, node: u64, flags: u32, fuse_flags: u32) -> io::Result<OwnedFd> {
        let node = self.known(node)?;
        let truncates = flags & libc::O_TRUNC.cast_unsigned() != 0;
        if truncates && fuse_flags & FOPEN_IN_KILL_SUIDGID != 0 && node.kind == libc::S_IFREG {
            self.drop_privilege_bits(&node)?;
        }
        self.open_file(&node, flags)
    }

    fn truncate(&self, node: &Node, number: u64, handle: Option<u64>, size: i64) -> io::Result<()> {
        let size = u64::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        if let Some(handle) = handle {
            let handle = self.table().handle(handle, number)?;
            return handle.file().set_len(size);
        }
        let file = self.open_file(node, libc::O_WRONLY.cast_unsigned())?;
        std::fs::File::from(file).set_len(size)
    }
}

/// The times that a SETATTR sets, in the form of `utimensat`.
fn times(attr: &libc::stat64, valid: SetattrValid) -> [libc::timespec; 2] {
    let time = |given: SetattrValid, now: SetattrValid, tv_sec: i64, tv_nsec: i64| {
        if valid.contains(now) {
            libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_NOW }
        } else if valid.contains(given) {
            libc::timespec { tv_sec, tv_nsec }
        } else {
            libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT }
        }
    };
    [
        time(SetattrValid::ATIME, SetattrValid::ATIME_NOW, attr.st_atime, attr.st_atime_nsec),
        time(SetattrValid::MTIME, SetattrValid::MTIME_NOW, attr.st_mtime, attr.st_mtime_nsec),
    ]
}
