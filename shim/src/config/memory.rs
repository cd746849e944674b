//! How much memory a sandbox can have beyond what it starts with.

use nix::sys::sysinfo::sysinfo;

use super::ConfigError;
use super::section::{self, Section};

/// What no machine has more of: the largest `default_memory`.
const MOST_MIB: u64 = 512 << 10;

/// MiB between `memory_mib` and `default_maxmemory`, which is at most what the host has, and all of that where the key is 0
/// or missing; 0 unless `enable_virtio_mem` is set.
pub fn more(section: &mut Section, memory_mib: u64) -> Result<u64, ConfigError> {
    const KEY: &str = "default_maxmemory";
    let most = section.integer(KEY, 0..=i64::MAX, "a number of MiB, or 0 for the host's memory")?;
    let most = most.and_then(|mib| u64::try_from(mib).ok()).filter(|&mib| mib > 0);
    let mut enabled = false;
    section.flag("enable_virtio_mem", &mut enabled)?;
    if !enabled {
        return Ok(0);
    }
    if let Some(most) = most.filter(|&most| most < memory_mib) {
        let found = toml::Value::Integer(i64::try_from(most).unwrap_or(i64::MAX));
        return Err(section::wrong(section.full(KEY), "at least default_memory, or 0 for the host's memory", &found));
    }
    Ok(between(memory_mib, most, host_mib()))
}

fn between(memory_mib: u64, most: Option<u64>, host_mib: u64) -> u64 {
    most.unwrap_or(u64::MAX).min(host_mib).min(MOST_MIB).saturating_sub(memory_mib)
}

fn host_mib() -> u64 {
    let read = sysinfo().inspect_err(|error| tracing::warn!(%error, "The host does not say how much memory it has"));
    read.map_or(0, |host| host.ram_total() >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_is_the_hosts_memory_and_no_more_than_the_key_says() {
        let host = 16 << 10;
        for (memory, most, more) in [
            (256, None, host - 256),
            (256, Some(1024), 768),
            (256, Some(256), 0),
            (256, Some(host), host - 256),
            (256, Some(host + 1), host - 256),
            (host, None, 0),
            (host + 1, None, 0),
        ] {
            assert_eq!(between(memory, most, host), more, "{memory} {most:?}");
        }
        assert_eq!(between(256, None, u64::MAX), MOST_MIB - 256);
        assert!(host_mib() > 64);
    }
}
