//! Resource limits: those that mean the same in a guest.

use agent_proto::oci;
use oci_spec::runtime::{LinuxCpu, LinuxDeviceCgroup, LinuxMemory, LinuxResources};

use super::word;

/// The limits that the guest applies to the container's cgroup.
///
/// What counts the host's own things stays behind: CPU and memory node numbers, block device numbers, huge page sizes,
/// network classes.
pub fn resources(resources: &LinuxResources) -> oci::LinuxResources {
    let pids =
        resources.pids().as_ref().map(|pids| oci::LinuxPids { Limit: pids.limit(), ..oci::LinuxPids::default() });
    oci::LinuxResources {
        Devices: resources.devices().iter().flatten().map(device_rule).collect(),
        Memory: resources.memory().as_ref().map(memory).into(),
        CPU: resources.cpu().as_ref().map(cpu).into(),
        Pids: pids.into(),
        ..oci::LinuxResources::default()
    }
}

/// How a container's memory limit is, or is to be changed; `None` where nothing is said of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLimit(
    /// In bytes; `None` for no limit.
    pub Option<u64>,
);

/// What `resources` say of a container's memory limit. Negative is no limit, and 0 says nothing.
pub fn memory_limit(resources: &LinuxResources) -> Option<MemoryLimit> {
    let limit = resources.memory().as_ref()?.limit()?;
    (limit != 0).then(|| MemoryLimit(u64::try_from(limit).ok()))
}

fn device_rule(rule: &LinuxDeviceCgroup) -> oci::LinuxDeviceCgroup {
    /// In the agent's message every number is there, and a negative one stands for "any".
    const ANY: i64 = -1;
    oci::LinuxDeviceCgroup {
        Allow: rule.allow(),
        Type: rule.typ().map_or_else(|| "a".to_owned(), |kind| word(&kind)),
        Major: rule.major().unwrap_or(ANY),
        Minor: rule.minor().unwrap_or(ANY),
        Access: rule.access().clone().unwrap_or_else(|| "rwm".to_owned()),
        ..oci::LinuxDeviceCgroup::default()
    }
}

fn memory(memory: &LinuxMemory) -> oci::LinuxMemory {
    oci::LinuxMemory {
        Limit: memory.limit().unwrap_or(0),
        Reservation: memory.reservation().unwrap_or(0),
        Swap: memory.swap().unwrap_or(0),
        Kernel: memory.kernel().unwrap_or(0),
        KernelTCP: memory.kernel_tcp().unwrap_or(0),
        Swappiness: memory.swappiness().unwrap_or(0),
        DisableOOMKiller: memory.disable_oom_killer().unwrap_or(false),
        ..oci::LinuxMemory::default()
    }
}

fn cpu(cpu: &LinuxCpu) -> oci::LinuxCPU {
    oci::LinuxCPU {
        Shares: cpu.shares().unwrap_or(0),
        Quota: cpu.quota().unwrap_or(0),
        Period: cpu.period().unwrap_or(0),
        RealtimeRuntime: cpu.realtime_runtime().unwrap_or(0),
        RealtimePeriod: cpu.realtime_period().unwrap_or(0),
        ..oci::LinuxCPU::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_limit_is_a_positive_number() {
        let said = |json: &str| memory_limit(&serde_json::from_str(json).unwrap());
        assert_eq!(said("{}"), None);
        assert_eq!(said(r#"{"memory": {"swap": 7}}"#), None);
        assert_eq!(said(r#"{"memory": {"limit": 0}}"#), None);
        assert_eq!(said(r#"{"memory": {"limit": -1}}"#), Some(MemoryLimit(None)));
        assert_eq!(said(r#"{"memory": {"limit": 1}}"#), Some(MemoryLimit(Some(1))));
        assert_eq!(said(r#"{"memory": {"limit": 9223372036854775807}}"#), Some(MemoryLimit(Some(i64::MAX as u64))));
    }
}
