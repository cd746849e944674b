//! The Linux part of the specification.

use std::collections::BTreeMap;
use std::path::Path;

use agent_proto::oci;
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use super::{Error, Placement, put_list, put_number, put_text};

/// Translates the section for a container in this place.
pub(super) fn linux(
    linux: &oci::Linux,
    sysctls: &BTreeMap<String, String>,
    placement: Placement<'_>,
) -> Result<Value, Error> {
    if !linux.MountLabel.is_empty() {
        return Err(Error::Refused(format!("The mount label {:?}", linux.MountLabel)));
    }
    if linux.IntelRdt.as_ref().is_some_and(|rdt| !rdt.L3CacheSchema.is_empty()) {
        return Err(Error::Refused("Intel RDT".into()));
    }
    let mut value = Map::new();
    value.insert("namespaces".into(), namespaces(linux, placement.pid_namespace_of)?);
    value.insert("cgroupsPath".into(), json!(placement.cgroup));
    if !sysctls.is_empty() {
        value.insert("sysctl".into(), json!(sysctls));
    }
    if let Some(given) = linux.Resources.as_ref() {
        value.insert("resources".into(), resources_value(given));
    }
    if !linux.Devices.is_empty() {
        value.insert("devices".into(), linux.Devices.iter().map(device).collect());
    }
    if let Some(profile) = linux.Seccomp.as_ref().filter(|profile| !profile.DefaultAction.is_empty()) {
        value.insert("seccomp".into(), seccomp(profile));
    }
    put_text(&mut value, "rootfsPropagation", &linux.RootfsPropagation);
    put_list(&mut value, "maskedPaths", &linux.MaskedPaths);
    put_list(&mut value, "readonlyPaths", &linux.ReadonlyPaths);
    Ok(Value::Object(value))
}

fn namespaces(linux: &oci::Linux, pid_namespace_of: Option<i32>) -> Result<Value, Error> {
    let mut list = vec![json!({ "type": "mount" })];
    list.push(match pid_namespace_of {
        Some(pid) => json!({ "type": "pid", "path": format!("/proc/{pid}/ns/pid") }),
        None => json!({ "type": "pid" }),
    });
    for namespace in &linux.Namespaces {
        match namespace.Type.as_str() {
            // Always the container's own, respectively decided above; and the guest's, which is the sandbox's.
            "mount" | "pid" | "network" | "ipc" => {}
            kind @ ("uts" | "cgroup") => list.push(json!({ "type": kind })),
            kind => return Err(Error::Refused(format!("A {kind} namespace"))),
        }
    }
    Ok(Value::Array(list))
}

fn device(device: &oci::LinuxDevice) -> Value {
    let mut value = Map::new();
    value.insert("path".into(), json!(device.Path));
    value.insert("type".into(), json!(device.Type));
    value.insert("major".into(), device.Major.into());
    value.insert("minor".into(), device.Minor.into());
    put_number(&mut value, "fileMode", device.FileMode);
    put_number(&mut value, "uid", device.UID);
    put_number(&mut value, "gid", device.GID);
    Value::Object(value)
}

fn seccomp(profile: &oci::LinuxSeccomp) -> Value {
    let mut value = Map::new();
    value.insert("defaultAction".into(), json!(profile.DefaultAction));
    put_list(&mut value, "architectures", &profile.Architectures);
    put_list(&mut value, "flags", &profile.Flags);
    let calls: Vec<Value> = profile.Syscalls.iter().map(seccomp_rule).collect();
    value.insert("syscalls".into(), Value::Array(calls));
    Value::Object(value)
}

fn seccomp_rule(rule: &oci::LinuxSyscall) -> Value {
    let mut value = Map::new();
    value.insert("names".into(), json!(rule.Names));
    value.insert("action".into(), json!(rule.Action));
    if rule.has_errnoret() {
        value.insert("errnoRet".into(), rule.errnoret().into());
    }
    let argument = |arg: &oci::LinuxSeccompArg| json!({ "index": arg.Index, "value": arg.Value, "valueTwo": arg.ValueTwo, "op": arg.Op });
    if !rule.Args.is_empty() {
        value.insert("args".into(), rule.Args.iter().map(argument).collect());
    }
    Value::Object(value)
}

/// Translates limits, for a new container and for UpdateContainer.
pub fn resources(resources: &oci::LinuxResources) -> Result<LinuxResources, Error> {
    serde_json::from_value(resources_value(resources)).map_err(|error| Error::Invalid(error.to_string()))
}

fn resources_value(resources: &oci::LinuxResources) -> Value {
    let mut value = Map::new();
    if let Some(memory) = resources.Memory.as_ref() {
        value.insert("memory".into(), self::memory(memory));
    }
    if let Some(cpu) = resources.CPU.as_ref() {
        value.insert("cpu".into(), self::cpu(cpu));
    }
    if let Some(pids) = resources.Pids.as_ref().filter(|pids| pids.Limit != 0) {
        value.insert("pids".into(), json!({ "limit": pids.Limit }));
    }
    if let Some(block) = resources.BlockIO.as_ref() {
        value.insert("blockIO".into(), block_io(block));
    }
    // Kubernetes states a limit of 0 for every page size there is; a guest without huge pages has none to give.
    let huge = resources.HugepageLimits.iter().filter(|limit| limit.Limit != 0);
    let huge: Vec<Value> = huge.map(|limit| json!({ "pageSize": limit.Pagesize, "limit": limit.Limit })).collect();
    if !huge.is_empty() {
        value.insert("hugepageLimits".into(), Value::Array(huge));
    }
    Value::Object(value)
}

fn memory(memory: &oci::LinuxMemory) -> Value {
    let mut value = Map::new();
    put_number(&mut value, "limit", memory.Limit);
    put_number(&mut value, "reservation", memory.Reservation);
    // Without swap in the guest there is no memory.swap.max to write, and nothing that it would limit.
    if Path::new("/proc/swaps").exists() {
        put_number(&mut value, "swap", memory.Swap);
    }
    Value::Object(value)
}

fn cpu(cpu: &oci::LinuxCPU) -> Value {
    let mut value = Map::new();
    put_number(&mut value, "shares", cpu.Shares);
    put_number(&mut value, "quota", cpu.Quota);
    put_number(&mut value, "period", cpu.Period);
    // `Cpus` and `Mems` are numbers of the host's CPUs and nodes; the guest's vCPUs are where the host pins them.
    Value::Object(value)
}

fn block_io(block: &oci::LinuxBlockIO) -> Value {
    let mut value = Map::new();
    put_number(&mut value, "weight", block.Weight);
    let lists = [
        ("throttleReadBpsDevice", &block.ThrottleReadBpsDevice),
        ("throttleWriteBpsDevice", &block.ThrottleWriteBpsDevice),
        ("throttleReadIOPSDevice", &block.ThrottleReadIOPSDevice),
        ("throttleWriteIOPSDevice", &block.ThrottleWriteIOPSDevice),
    ];
    let rate = |device: &oci::LinuxThrottleDevice| json!({ "major": device.Major, "minor": device.Minor, "rate": device.Rate });
    for (key, list) in lists {
        if !list.is_empty() {
            value.insert(key.into(), list.iter().map(rate).collect());
        }
    }
    Value::Object(value)
}

/// Kernel parameters by where they are set.
#[derive(Debug, Default)]
pub(super) struct Sysctls {
    /// In the container.
    pub container: BTreeMap<String, String>,
    /// In the guest, (name, value).
    pub guest: Vec<(String, String)>,
}

/// Kernel parameters of the network and IPC namespaces concern the guest, whose namespaces those are.
pub(super) fn split_sysctls(linux: &oci::Linux) -> Result<Sysctls, Error> {
    let mut sysctls = Sysctls::default();
    for (name, value) in &linux.Sysctl {
        let name = name.replace('/', ".");
        let sound = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        if !sound || name.split('.').any(str::is_empty) {
            return Err(Error::Invalid(format!("sysctl {name:?}")));
        }
        if is_of_the_sandbox(&name) {
            sysctls.guest.push((name, value.clone()));
        } else {
            sysctls.container.insert(name, value.clone());
        }
    }
    Ok(sysctls)
}

/// The parameters that network_namespaces(7) and ipc_namespaces(7) name.
fn is_of_the_sandbox(name: &str) -> bool {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    name.starts_with("net.") || name.starts_with("fs.mqueue.") || IPC.contains(&name)
}
