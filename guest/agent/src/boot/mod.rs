//! From the kernel's first user instruction to a guest that can run containers. The order:
//!
//! 1. the marker on the debug port (T3),
//! 2. a root that `pivot_root` works from,
//! 3. the mounts,
//! 4. this program, read-only, for helpers,
//! 5. the loopback interface and the limit of open files,
//! 6. an end to what would wake a guest that does nothing.

mod marker;
mod mounts;
mod program;
mod rootfs;

use std::fs;

use anyhow::{Context, Result};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};

/// Open files of the agent, and of processes whose specification states no limit: the kernel's own bound (fs.nr_open).
/// The kernel starts init with 1024, and each process of a container costs the agent up to six.
const MAX_FILES: u64 = 1 << 20;

/// How eagerly memory is compacted in the background, for which a kernel thread looks twice a second. Without it memory is
/// still compacted when somebody wants more in one piece than there is (Documentation/admin-guide/sysctl/vm.rst).
const PROACTIVE_COMPACTION: &str = "/proc/sys/vm/compaction_proactiveness";

/// Boots the guest. An error here ends PID 1, so the kernel panics and the host is told.
pub fn bring_up() -> Result<()> {
    marker::user_space_runs();
    rootfs::make_pivotable().context("Making the initramfs a root that can be pivoted from")?;
    mounts::mount_all()?;
    program::protect().context("Mounting the agent's own program for helpers")?;
    crate::net::bring_up_loopback().context("Bringing up the loopback interface")?;
    setrlimit(Resource::RLIMIT_NOFILE, MAX_FILES, MAX_FILES).context("Raising the limit of open files")?;
    // Not every kernel compacts.
    let _ = fs::write(PROACTIVE_COMPACTION, "0");
    Ok(())
}

/// Writes back what is dirty and asks the kernel to power off.
pub fn power_off() {
    // SAFETY: sync takes no arguments and touches no memory of this process.
    unsafe { libc::sync() };
    // Returns only on failure, and then PID 1 ends and the kernel panics: the host sees an end in either case.
    let _ = reboot(RebootMode::RB_POWER_OFF);
}
