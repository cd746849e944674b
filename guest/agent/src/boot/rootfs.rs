//! An initramfs that containers can leave by `pivot_root`.
//!
//! The kernel's `rootfs` has no parent mount, and `pivot_root(2)` refuses to move such a root away (EINVAL). A bind
//! mount of it on itself, moved over it, has one: the same files, no copy, no memory.

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use nix::unistd::{chdir, chroot, mkdir};

const NOTHING: Option<&str> = None;
/// linux/magic.h
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
/// Where the bind mount is before it is moved; the directory stays, hidden under the new root's copy of itself.
const STEP: &str = "/.root";

/// To be called before anything is mounted. A root on a disk is left as it is.
pub fn make_pivotable() -> nix::Result<()> {
    if !is_in_memory(statfs("/")?.filesystem_type()) {
        return Ok(());
    }
    match mkdir(STEP, Mode::S_IRWXU) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(error) => return Err(error),
    }
    mount(Some("/"), STEP, NOTHING, MsFlags::MS_BIND, NOTHING)?;
    chdir(STEP)?;
    mount(Some("."), "/", NOTHING, MsFlags::MS_MOVE, NOTHING)?;
    chroot(".")?;
    chdir("/")
}

fn is_in_memory(kind: FsType) -> bool {
    kind == RAMFS_MAGIC || kind == TMPFS_MAGIC
}
