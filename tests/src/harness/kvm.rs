//! KVM's counters of a machine (`kvm_stat`).

use std::ffi::OsStr;
use std::fs;

use anyhow::{Context, Result};

const STATISTICS: &str = "/sys/kernel/debug/kvm";

/// One counter of the machine of a process.
pub fn statistic(pid: u32, name: &str) -> Result<u64> {
    let entries =
        fs::read_dir(STATISTICS).with_context(|| format!("{STATISTICS} is not there: is debugfs mounted?"))?;
    let prefix = format!("{pid}-");
    let machine = entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(&prefix)));
    let path = machine.context("KVM does not count this machine's exits")?.join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))?;
    text.trim().parse().with_context(|| format!("{} has no number", path.display()))
}
