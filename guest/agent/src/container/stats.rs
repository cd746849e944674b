//! StatsContainer: the files of a version 2 cgroup in the messages that were made for version 1.
//!
//! A file that is not there, because the kernel lacks the controller, leaves its figures at zero.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use agent_proto::agent::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, HugetlbStats, MemoryData, MemoryStats, NetworkStats,
    PidsStats, ThrottlingData,
};
use protobuf::MessageField;

/// Microseconds in cpu.stat, nanoseconds in the message.
const NANOS_PER_MICRO: u64 = 1000;

/// Reads the figures of the cgroup in `directory`.
pub fn cgroup(directory: &Path) -> CgroupStats {
    CgroupStats {
        cpu_stats: MessageField::some(cpu(directory)),
        memory_stats: MessageField::some(memory(directory)),
        pids_stats: MessageField::some(PidsStats {
            current: number(directory, "pids.current"),
            // "max" is no number and becomes 0, which for pids means no limit.
            limit: number(directory, "pids.max"),
            ..Default::default()
        }),
        blkio_stats: MessageField::some(block_io(&read(directory, "io.stat"))),
        hugetlb_stats: hugetlb(directory),
        ..Default::default()
    }
}

fn read(directory: &Path, file: &str) -> String {
    fs::read_to_string(directory.join(file)).unwrap_or_default()
}

fn number(directory: &Path, file: &str) -> u64 {
    read(directory, file).trim().parse().unwrap_or(0)
}

/// Lines of `key value`.
fn flat(text: &str) -> HashMap<&str, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key, value.parse().ok()?)))
        .collect()
}

fn cpu(directory: &Path) -> CpuStats {
    let text = read(directory, "cpu.stat");
    let stat = flat(&text);
    let get = |key| stat.get(key).copied().unwrap_or(0);
    let nanos = |key| get(key).saturating_mul(NANOS_PER_MICRO);
    CpuStats {
        cpu_usage: MessageField::some(CpuUsage {
            total_usage: nanos("usage_usec"),
            usage_in_kernelmode: nanos("system_usec"),
            usage_in_usermode: nanos("user_usec"),
            ..Default::default()
        }),
        throttling_data: MessageField::some(ThrottlingData {
            periods: get("nr_periods"),
            throttled_periods: get("nr_throttled"),
            throttled_time: nanos("throttled_usec"),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn memory(directory: &Path) -> MemoryStats {
    let text = read(directory, "memory.stat");
    let stat = flat(&text);
    let events = read(directory, "memory.events");
    let data = |usage: &str, peak: &str, max: &str, failcnt| MemoryData {
        usage: number(directory, usage),
        max_usage: number(directory, peak),
        limit: match read(directory, max).trim() {
            "" => 0,
            text => text.parse().unwrap_or(u64::MAX),
        },
        failcnt,
        ..Default::default()
    };
    let failures = flat(&events).get("max").copied().unwrap_or(0);
    MemoryStats {
        cache: stat.get("file").copied().unwrap_or(0),
        usage: MessageField::some(data("memory.current", "memory.peak", "memory.max", failures)),
        swap_usage: MessageField::some(data("memory.swap.current", "memory.swap.peak", "memory.swap.max", 0)),
        kernel_usage: MessageField::some(MemoryData {
            usage: stat.get("kernel").copied().unwrap_or(0),
            ..Default::default()
        }),
        // Version 2 has no other way.
        use_hierarchy: true,
        stats: stat.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        ..Default::default()
    }
}

/// Lines of `major:minor rbytes=N wbytes=N rios=N wios=N ...`.
fn block_io(text: &str) -> BlkioStats {
    let mut stats = BlkioStats::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some((major, minor)) = words.next().and_then(|device| device.split_once(':')) else { continue };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { continue };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let (list, op) = match key {
                "rbytes" => (&mut stats.io_service_bytes_recursive, "Read"),
                "wbytes" => (&mut stats.io_service_bytes_recursive, "Write"),
                "rios" => (&mut stats.io_serviced_recursive, "Read"),
                "wios" => (&mut stats.io_serviced_recursive, "Write"),
                _ => continue,
            };
            let value = value.parse().unwrap_or(0);
            list.push(BlkioStatsEntry { major, minor, op: op.to_owned(), value, ..Default::default() });
        }
    }
    stats
}

/// Files of `hugetlb.SIZE.current`, one set a page size.
fn hugetlb(directory: &Path) -> HashMap<String, HugetlbStats> {
    let Ok(entries) = fs::read_dir(directory) else { return HashMap::new() };
    let size_of = |name: &str| Some(name.strip_prefix("hugetlb.")?.strip_suffix(".current")?.to_owned());
    let sizes = entries.flatten().filter_map(|entry| size_of(entry.file_name().to_str()?));
    sizes
        .filter(|size| !size.ends_with(".rsvd"))
        .map(|size| {
            let events = read(directory, &format!("hugetlb.{size}.events"));
            let stats = HugetlbStats {
                usage: number(directory, &format!("hugetlb.{size}.current")),
                failcnt: flat(&events).get("max").copied().unwrap_or(0),
                ..Default::default()
            };
            (size, stats)
        })
        .collect()
}

/// The guest's interfaces, from `/proc/net/dev` (proc(5)).
pub fn network() -> Vec<NetworkStats> {
    parse_network(&fs::read_to_string("/proc/net/dev").unwrap_or_default())
}

fn parse_network(text: &str) -> Vec<NetworkStats> {
    let interface = |line: &str| {
        let (name, figures) = line.split_once(':')?;
        let figures: Vec<u64> = figures.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let [rx_bytes, rx_packets, rx_errors, rx_dropped, _, _, _, _, tx_bytes, tx_packets, tx_errors, tx_dropped, ..] =
            figures[..]
        else {
            return None;
        };
        Some(NetworkStats {
            name: name.trim().to_owned(),
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
            ..Default::default()
        })
    };
    text.lines().filter_map(interface).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("A directory");
        for (name, content) in files {
            fs::write(directory.path().join(name), content).expect("Writable");
        }
        directory
    }

    #[test]
    fn figures_come_from_their_files() {
        let directory = directory(&[
            ("cpu.stat", "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 7\nnr_throttled 1\nthrottled_usec 9\n"),
            ("memory.current", "4096\n"),
            ("memory.peak", "8192\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1\nfile 2\nkernel 3\n"),
            ("memory.events", "max 6\noom_kill 0\n"),
            ("pids.current", "4\n"),
            ("pids.max", "100\n"),
            ("io.stat", "254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\nbroken\n"),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
        ]);
        let stats = cgroup(directory.path());
        assert_eq!(stats.cpu_stats.cpu_usage.total_usage, 5000);
        assert_eq!(stats.cpu_stats.throttling_data.throttled_time, 9000);
        let memory = &stats.memory_stats;
        assert_eq!((memory.usage.usage, memory.usage.max_usage, memory.usage.limit), (4096, 8192, u64::MAX));
        assert_eq!((memory.usage.failcnt, memory.cache, memory.kernel_usage.usage), (6, 2, 3));
        assert_eq!(memory.stats["anon"], 1);
        assert_eq!((stats.pids_stats.current, stats.pids_stats.limit), (4, 100));
        let bytes = &stats.blkio_stats.io_service_bytes_recursive;
        assert_eq!(
            bytes.iter().map(|entry| (entry.op.as_str(), entry.value)).collect::<Vec<_>>(),
            [("Read", 10), ("Write", 20)]
        );
        assert_eq!(stats.hugetlb_stats.keys().collect::<Vec<_>>(), ["2MB"]);
    }

    #[test]
    fn without_controllers_the_figures_are_zero() {
        let stats = cgroup(directory(&[("pids.max", "max\n")]).path());
        assert_eq!((stats.pids_stats.limit, stats.memory_stats.usage.limit, stats.memory_stats.usage.usage), (0, 0, 0));
    }

    #[test]
    fn interfaces_are_read_past_the_headings() {
        let text =
            "Inter-|   Receive  |  Transmit\n face |bytes packets\n  lo: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\neth0:9\n";
        let stats = parse_network(text);
        assert_eq!(stats.len(), 1);
        assert_eq!(
            (stats[0].name.as_str(), stats[0].rx_dropped, stats[0].tx_bytes, stats[0].tx_dropped),
            ("lo", 4, 5, 8)
        );
    }
}
