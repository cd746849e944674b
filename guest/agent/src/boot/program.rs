//! A way to this program that containers cannot write through.
//!
//! A process that enters a container shows that container its program as `/proc/PID/exe`, and whoever opens that link
//! opens the file itself, past all paths: with it a container's root could replace the guest's PID 1 (CVE-2019-5736).
//! Through a read-only mount the same link opens nothing for writing.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::helper;

const NOTHING: Option<&str> = None;

/// Mounts this program's file, read-only, where helpers are started from.
pub fn protect() -> io::Result<()> {
    let target = Path::new(helper::PROGRAM);
    if let Some(directory) = target.parent() {
        fs::create_dir_all(directory)?;
    }
    File::create(target)?;
    mount(Some("/proc/self/exe"), target, NOTHING, MsFlags::MS_BIND, NOTHING)?;
    let read_only =
        MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(NOTHING, target, NOTHING, read_only, NOTHING)?;
    Ok(())
}
