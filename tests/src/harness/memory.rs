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
}

impl Pss {
    /// Reads `/proc/<pid>/smaps`.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        Self::parse(&fs::read_to_string(&path).with_context(|| format!("Cannot read {path}"))?)
    }

    /// proc(5): each mapping's lines end with its `VmFlags`.
    fn parse(smaps: &str) -> Result<Self> {
        let mut total = Self::default();
        let mut pss = 0;
        for line in smaps.lines() {
            if let Some(value) = line.strip_prefix("Pss:") {
                pss = value.trim().trim_end_matches(" kB").parse().context("Pss is not a number")?;
            } else if let Some(flags) = line.strip_prefix("VmFlags:") {
                let guest = flags.split_whitespace().any(|flag| flag == "dd");
                *if guest { &mut total.guest } else { &mut total.own } += pss;
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
        let smaps = "7f00-7f10 rw-p 00000000 00:00 0\nPss:                1000 kB\nVmFlags: rd wr mr mw me nr dd \n\
                     5500-5600 r-xp 00000000 fe:00 1 /usr/bin/inlay\nPss:                  20 kB\nVmFlags: rd ex mr\n";
        assert_eq!(Pss::parse(smaps).unwrap(), Pss { own: 20, guest: 1000 });
    }

    #[test]
    fn a_process_can_be_read() {
        assert!(Pss::of(std::process::id()).unwrap().own > 0);
    }
}
