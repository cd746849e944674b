//! A container's figures in the form that containerd and `ctr task metrics` know: control groups of version 2, as the
//! guest has them.

// A guest chooses the numbers.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use agent_proto::agent::{BlkioStats, CgroupStats, StatsContainerResponse};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageFull};

const NANOSECONDS_PER_MICROSECOND: u64 = 1000;

/// The agent's figures as containerd's message.
pub fn to_any(stats: &StatsContainerResponse) -> Any {
    let metrics = metrics(stats);
    // Writing to memory fails for messages over 2 GiB only.
    let value = metrics.write_to_bytes().unwrap_or_default();
    Any { type_url: Metrics::descriptor().full_name().to_owned(), value, ..Any::default() }
}

fn metrics(stats: &StatsContainerResponse) -> Metrics {
    let empty = CgroupStats::default();
    let cgroup = stats.cgroup_stats.as_ref().unwrap_or(&empty);
    let network = stats.network_stats.iter().map(|interface| NetworkStat {
        name: interface.name.clone(),
        rx_bytes: interface.rx_bytes,
        rx_packets: interface.rx_packets,
        rx_errors: interface.rx_errors,
        rx_dropped: interface.rx_dropped,
        tx_bytes: interface.tx_bytes,
        tx_packets: interface.tx_packets,
        tx_errors: interface.tx_errors,
        tx_dropped: interface.tx_dropped,
        ..NetworkStat::default()
    });
    let hugetlb = cgroup.hugetlb_stats.iter().map(|(size, stats)| HugeTlbStat {
        current: stats.usage,
        max: stats.max_usage,
        pagesize: size.clone(),
        failcnt: stats.failcnt,
        ..HugeTlbStat::default()
    });
    let pids = PidsStat { current: cgroup.pids_stats.current, limit: cgroup.pids_stats.limit, ..PidsStat::default() };
    Metrics {
        pids: Some(pids).into(),
        cpu: Some(cpu(cgroup)).into(),
        memory: Some(memory(cgroup)).into(),
        memory_events: Some(memory_events(cgroup)).into(),
        io: Some(io(&cgroup.blkio_stats)).into(),
        hugetlb: hugetlb.collect(),
        network: network.collect(),
        ..Metrics::default()
    }
}

fn cpu(cgroup: &CgroupStats) -> CPUStat {
    let (usage, throttling) = (&cgroup.cpu_stats.cpu_usage, &cgroup.cpu_stats.throttling_data);
    CPUStat {
        usage_usec: usage.total_usage / NANOSECONDS_PER_MICROSECOND,
        user_usec: usage.usage_in_usermode / NANOSECONDS_PER_MICROSECOND,
        system_usec: usage.usage_in_kernelmode / NANOSECONDS_PER_MICROSECOND,
        nr_periods: throttling.periods,
        nr_throttled: throttling.throttled_periods,
        throttled_usec: throttling.throttled_time / NANOSECONDS_PER_MICROSECOND,
        ..CPUStat::default()
    }
}

fn memory(cgroup: &CgroupStats) -> MemoryStat {
    let memory = &cgroup.memory_stats;
    let stat = |key: &str| memory.stats.get(key).copied().unwrap_or_default();
    MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        usage: memory.usage.usage,
        usage_limit: memory.usage.limit,
        max_usage: memory.usage.max_usage,
        swap_usage: memory.swap_usage.usage,
        swap_limit: memory.swap_usage.limit,
        swap_max_usage: memory.swap_usage.max_usage,
        ..MemoryStat::default()
    }
}

fn memory_events(cgroup: &CgroupStats) -> MemoryEvents {
    MemoryEvents { max: cgroup.memory_stats.usage.failcnt, ..MemoryEvents::default() }
}

/// The agent has a list for bytes and one for operations, with an entry for each direction; containerd wants one entry
/// for each device.
fn io(blkio: &BlkioStats) -> IOStat {
    let mut entries: Vec<IOEntry> = Vec::new();
    let lists = [(&blkio.io_service_bytes_recursive, true), (&blkio.io_serviced_recursive, false)];
    for (list, is_bytes) in lists {
        for item in list {
            let known = entries.iter().position(|entry| (entry.major, entry.minor) == (item.major, item.minor));
            let index = known.unwrap_or_else(|| {
                entries.push(IOEntry { major: item.major, minor: item.minor, ..IOEntry::default() });
                entries.len().saturating_sub(1)
            });
            let Some(entry) = entries.get_mut(index) else { continue };
            match (item.op.to_ascii_lowercase().as_str(), is_bytes) {
                ("read", true) => entry.rbytes = item.value,
                ("write", true) => entry.wbytes = item.value,
                ("read", false) => entry.rios = item.value,
                ("write", false) => entry.wios = item.value,
                _ => {}
            }
        }
    }
    IOStat { usage: entries, ..IOStat::default() }
}

#[cfg(test)]
mod tests {
    use agent_proto::agent::{BlkioStatsEntry, CpuStats, CpuUsage};

    use super::*;

    #[test]
    fn figures_arrive_under_the_name_that_containerd_knows() {
        let entry = |op: &str, value| BlkioStatsEntry { major: 8, op: op.into(), value, ..BlkioStatsEntry::default() };
        let usage = CpuUsage { total_usage: 5000, ..CpuUsage::default() };
        let cgroup = CgroupStats {
            cpu_stats: Some(CpuStats { cpu_usage: Some(usage).into(), ..CpuStats::default() }).into(),
            blkio_stats: Some(BlkioStats {
                io_service_bytes_recursive: vec![entry("Read", 10), entry("Write", 20)],
                io_serviced_recursive: vec![entry("read", 1)],
                ..BlkioStats::default()
            })
            .into(),
            ..CgroupStats::default()
        };
        let stats = StatsContainerResponse { cgroup_stats: Some(cgroup).into(), ..StatsContainerResponse::default() };
        let any = to_any(&stats);
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage_usec, 5);
        let [disk] = metrics.io.usage.as_slice() else { panic!("{:?}", metrics.io) };
        assert_eq!((disk.rbytes, disk.wbytes, disk.rios, disk.wios), (10, 20, 1, 0));
    }
}
