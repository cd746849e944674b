//! How much memory a process costs the host, guest memory apart.

use std::fs;

use anyhow::{Context, Result};

/// Proportional set size of a process, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pss {
    /// Everything but guest memory: what the shim and the machine cost by themselves.
    pub own: u64,
    /// Guest memory, known by being left out of core dumps (`MADV_DONTDUMP`).
    pub guest: u64,
    /// As much of it as is in no file: what the host has for this guest alone.
    pub guest_private: u64,
}

impl Pss {
    /// Reads `/proc/<pid>/smaps`.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        Self::parse(&fs::read_to_string(&path).with_context(|| format!("Cannot read {path}"))?)
    }

    /// The same of a program that may not leave guest memory out of core dumps: the mappings of at least `guest_kib`
    /// KiB are the guest's.
    pub fn of_monitor(pid: u32, guest_kib: u64) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        let smaps = fs::read_to_string(&path).with_context(|| format!("Cannot read {path}"))?;
        Self::sum(&smaps, |size, _| size >= guest_kib)
    }

    fn parse(smaps: &str) -> Result<Self> {
        Self::sum(smaps, |_, flags| flags.split_whitespace().any(|flag| flag == "dd"))
    }

    /// proc(5): each mapping's lines begin with its `Size`, in KiB, and end with its `VmFlags`.
    fn sum(smaps: &str, is_guest: impl Fn(u64, &str) -> bool) -> Result<Self> {
        let kib = |value: &str| value.trim().trim_end_matches(" kB").parse::<u64>();
        let mut total = Self::default();
        let (mut size, mut pss, mut private) = (0, 0, 0);
        for line in smaps.lines() {
            if let Some(value) = line.strip_prefix("Size:") {
                size = kib(value).context("Size is not a number")?;
            } else if let Some(value) = line.strip_prefix("Pss:") {
                pss = kib(value).context("Pss is not a number")?;
            } else if let Some(value) = line.strip_prefix("Anonymous:") {
                private = kib(value).context("Anonymous is not a number")?;
            } else if let Some(flags) = line.strip_prefix("VmFlags:") {
                let guest = is_guest(size, flags);
                *if guest { &mut total.guest } else { &mut total.own } += pss;
                total.guest_private += if guest { private } else { 0 };
            }
        }
        Ok(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_rest() {
        let smaps = "7f00-7f10 rw-p 00000000 00:00 0\nPss:                1000 kB\nAnonymous:     300 kB\nVmFlags: rd wr mr mw me nr dd \n\
                     5500-5600 r-xp 00000000 fe:00 1 /usr/bin/inlay\nPss:                  20 kB\nVmFlags: rd ex mr\n";
        assert_eq!(Pss::parse(smaps).unwrap(), Pss { own: 20, guest: 1000, guest_private: 300 });
    }

    #[test]
    fn a_process_can_be_read() {
        assert!(Pss::of(std::process::id()).unwrap().own > 0);
    }
}
