//! A directory of the host as a guest may see it.
//!
//! `fuse-backend-rs` reads the requests and writes the answers; what they do to the host is done
//! here. Its own pass-through file system is not used because it trusts its client with more than
//! a guest deserves: it opens with whatever flags the guest sends (`O_PATH` in a CREATE follows a
//! symbolic link out of the share), makes device nodes, changes the umask of the whole process,
//! opens the root by its path again when a guest says DESTROY, and remembers each inode number
//! it ever saw.
//!
//! Everything is reached from one descriptor of the root, name by name: [`names`] checks the
//! name, [`sys`] opens it beneath its directory and follows no symbolic link. What a node is was
//! determined when it was looked up and cannot change, because its descriptor is kept: only
//! regular files and directories are ever opened for more than looking at them.

mod dir;
mod locks;
mod names;
mod ops;
mod sys;
mod table;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::api::filesystem::{Context, Entry, FsOptions, OpenOptions, ROOT_ID};
use tracing::warn;

use self::sys::{Reopener, Stat};
use self::table::{Id, Node, Table};
use super::CachePolicy;

/// Descriptors of the process that are not for files of the guest: its own, and a vsock's
/// connections.
const OTHER_DESCRIPTORS: usize = 2048;

/// Each file that a guest knows the name of is a descriptor, and a guest remembers as many as it
/// has memory for. Below this limit a program that walks through a large image may fail.
const FEW_DESCRIPTORS: usize = 64 << 10;

/// Permission bits of a mode.
const PERMISSIONS: u32 = 0o7777;

/// Where the mount is folded into inode numbers. File systems seldom use the high bits.
const MOUNT_SHIFT: u32 = 48;

/// What a share lets its guest do.
#[derive(Clone, Copy, Debug)]
pub struct Switches {
    /// What the guest may cache.
    pub cache: CachePolicy,
    /// The guest may collect writes.
    pub writeback: bool,
    /// The guest has extended attributes.
    pub xattr: bool,
    /// Locks of the guest count on the host.
    pub posix_locks: bool,
}

/// A directory that is shared with one guest.
pub struct Share {
    reopener: Reopener,
    table: Mutex<Table>,
    /// Mount that the root is on.
    root_mount: u64,
    switches: Switches,
    /// The guest does collect writes.
    writes_back: AtomicBool,
}

impl Share {
    /// Opens the directory. Mounts that are made below it later are part of it.
    pub fn new(root: &Path, switches: Switches) -> io::Result<Self> {
        let root = Self::node(sys::open_dir(root)?)?.0;
        let limit = sys::descriptor_limit();
        if limit < FEW_DESCRIPTORS {
            warn!(limit, "The process may open so few files that a guest may run out of them");
        }
        // Half where the limit is so low that little would be left.
        let limit = limit.saturating_sub(OTHER_DESCRIPTORS).max(limit >> 1);
        Ok(Self {
            reopener: Reopener::new()?,
            root_mount: root.id.mount,
            table: Mutex::new(Table::new(root, limit)),
            switches: Switches { writeback: switches.writeback && switches.cache != CachePolicy::Never, ..switches },
            writes_back: AtomicBool::new(false),
        })
    }

    /// The directory, for looking at it.
    pub fn root(&self) -> io::Result<OwnedFd> {
        self.known(ROOT_ID)?.fd().try_clone_to_owned()
    }

    /// Forgets all that the guest looked up and opened.
    pub fn reset(&self) {
        self.table().clear();
        self.writes_back.store(false, Ordering::Relaxed);
    }

    /// Forgets all that the guest looked up and opened on the mount whose root is at `path`.
    pub fn release_mount(&self, path: &Path) -> io::Result<()> {
        let mount = sys::stat(sys::open_place(path)?.as_fd())?.mount;
        if mount == self.root_mount {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.table().forget_mount(mount);
        Ok(())
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the guest has forgotten, or never knew, all but the root.
    pub fn only_root_known(&self) -> bool {
        self.table().len() <= 1
    }

    /// Whether the guest collects writes, as it said when it mounted the share.
    pub fn set_writes_back(&self, writes_back: bool) {
        self.writes_back.store(writes_back && self.switches.writeback, Ordering::Relaxed);
    }

    /// Whether the guest collects writes.
    pub fn writes_back(&self) -> bool {
        self.writes_back.load(Ordering::Relaxed)
    }

    /// What a fresh handle stands for.
    fn node(handle: OwnedFd) -> io::Result<(Node, Stat)> {
        let stat = sys::stat(handle.as_fd())?;
        let id = Id { dev: stat.attr.st_dev, ino: stat.attr.st_ino, mount: stat.mount };
        Ok((Node::new(handle, id, stat.attr.st_mode), stat))
    }

    fn known(&self, number: u64) -> io::Result<Arc<Node>> {
        self.table().node(number)
    }

    /// Looks up `name` in `parent` for the guest, which then knows it until it forgets it.
    fn enter(&self, parent: &Node, name: &CStr) -> io::Result<Entry> {
        self.enter_handle(sys::open_entry(parent.fd(), name)?)
    }

    fn enter_handle(&self, handle: OwnedFd) -> io::Result<Entry> {
        let (node, stat) = Self::node(handle)?;
        let attr = self.guest_attr(stat);
        let number = self.table().enter(node)?;
        let timeout = self.timeout();
        Ok(Entry { inode: number, attr, attr_timeout: timeout, entry_timeout: timeout, ..Entry::default() })
    }

    /// How long the guest may believe names and attributes.
    fn timeout(&self) -> Duration {
        match self.switches.cache {
            CachePolicy::Never => Duration::ZERO,
            CachePolicy::Auto => Duration::from_secs(1),
            CachePolicy::Always => Duration::from_secs(24 * 60 * 60),
        }
    }

    fn attributes(&self, node: &Node) -> io::Result<(libc::stat64, Duration)> {
        Ok((self.guest_attr(sys::stat(node.fd())?), self.timeout()))
    }

    fn guest_attr(&self, stat: Stat) -> libc::stat64 {
        let Stat { mut attr, mount } = stat;
        attr.st_ino = self.guest_inode_number(attr.st_ino, mount);
        attr
    }

    /// The guest sees all mounts as one file system, where equal inode numbers mean hard links of
    /// one file: numbers of other mounts than the root's are made different from the root's and
    /// from each other's.
    fn guest_inode_number(&self, ino: u64, mount: u64) -> u64 {
        ino ^ (mount ^ self.root_mount).wrapping_shl(MOUNT_SHIFT)
    }

    /// Makes the owner and permissions of a new file what the guest asked for. It was made as
    /// this thread's user and with the process's umask, and no request of the guest that names files is
    /// served before this returns.
    fn settle_new(&self, handle: BorrowedFd<'_>, context: &Context, mode: u32) -> io::Result<()> {
        let stat = sys::stat(handle)?.attr;
        let (uid, gid) = sys::own_ids();
        // In a directory with the set-group-id bit the new file has the directory's group.
        let wanted_gid = if stat.st_gid == gid { context.gid } else { stat.st_gid };
        if (uid, gid) != (context.uid, wanted_gid) {
            sys::chown(handle, context.uid, wanted_gid)?;
        }
        let is_dir = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        let is_link = stat.st_mode & libc::S_IFMT == libc::S_IFLNK;
        let inherited = if is_dir { stat.st_mode & libc::S_ISGID } else { 0 };
        let wanted = mode & PERMISSIONS | inherited;
        // A change of owner clears these bits.
        let cleared = wanted & (libc::S_ISUID | libc::S_ISGID) != 0;
        if !is_link && (cleared || stat.st_mode & PERMISSIONS != wanted) {
            self.reopener.chmod(handle, wanted)?;
        }
        Ok(())
    }

    /// Enters what was just made under `name`.
    fn enter_new(&self, parent: &Node, name: &CStr, context: &Context, mode: u32) -> io::Result<Entry> {
        let handle = sys::open_entry(parent.fd(), name)?;
        self.settle_new(handle.as_fd(), context, mode)?;
        self.enter_handle(handle)
    }

    /// Clears the set-user-id and set-group-id bits as a kernel does when somebody without
    /// privileges writes to a file. Ours does not, because this thread has them.
    fn drop_privilege_bits(&self, node: &Node) -> io::Result<()> {
        let mode = sys::stat(node.fd())?.attr.st_mode;
        // Without the group's execute bit, set-group-id meant mandatory locking.
        let group = if mode & libc::S_IXGRP != 0 { libc::S_ISGID } else { 0 };
        let privileges = mode & (libc::S_ISUID | group);
        if privileges == 0 {
            return Ok(());
        }
        self.reopener.chmod(node.fd(), mode & PERMISSIONS & !privileges)
    }

    /// Opens a regular file for the guest. The flags that mean something on the host are taken
    /// over, and no others.
    fn open_file(&self, node: &Node, flags: u32) -> io::Result<OwnedFd> {
        if node.kind != libc::S_IFREG {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        self.reopener.open(node.fd(), self.host_flags(flags)?)
    }

    fn host_flags(&self, guest: u32) -> io::Result<libc::c_int> {
        const SYNC: libc::c_int = libc::O_SYNC | libc::O_DSYNC;
        let guest = guest.cast_signed();
        let mut access = guest & libc::O_ACCMODE;
        if access == libc::O_ACCMODE {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut append = guest & libc::O_APPEND;
        if self.writes_back() {
            // The guest reads around what it writes, and places what it appends, by itself.
            append = 0;
            if access == libc::O_WRONLY {
                access = libc::O_RDWR;
            }
        }
        // Not O_DIRECT: the guest's buffers are aligned for its own file system, not the host's.
        Ok(access | append | guest & (libc::O_TRUNC | SYNC))
    }

    fn file_options(&self) -> OpenOptions {
        match self.switches.cache {
            CachePolicy::Never => OpenOptions::DIRECT_IO,
            CachePolicy::Auto => OpenOptions::empty(),
            CachePolicy::Always => OpenOptions::KEEP_CACHE,
        }
    }

    fn dir_options(&self) -> OpenOptions {
        match self.switches.cache {
            CachePolicy::Never | CachePolicy::Auto => OpenOptions::empty(),
            CachePolicy::Always => OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR,
        }
    }

    /// What is wanted of the guest's FUSE client; it does what it can of it.
    fn wanted_options(&self) -> FsOptions {
        let mut wanted = FsOptions::ASYNC_READ
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::INIT_EXT
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::ASYNC_DIO
            | FsOptions::CACHE_SYMLINKS
            // Without it Linux asks for file capabilities before each write.
            | FsOptions::HANDLE_KILLPRIV_V2;
        if self.switches.cache == CachePolicy::Auto {
            wanted |= FsOptions::AUTO_INVAL_DATA;
        }
        if self.switches.writeback {
            wanted |= FsOptions::WRITEBACK_CACHE;
        }
        if self.switches.posix_locks {
            wanted |= FsOptions::POSIX_LOCKS;
        }
        wanted
    }

    /// Where attributes are switched off, Linux asks once and then no more.
    fn check_xattrs(&self) -> io::Result<()> {
        if self.switches.xattr { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOSYS)) }
    }
}
