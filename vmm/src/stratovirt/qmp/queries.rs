//! What is told about the machine.

use serde::Serialize;
use serde_json::{Value, json};

use super::message::Version;
use crate::machine::Machine;

/// Where a processor is: one socket, one thread a core, as its CPUID tells the guest.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Place {
    socket_id: usize,
    core_id: usize,
    thread_id: usize,
}

impl Place {
    fn of(core_id: usize) -> Self {
        Self { socket_id: 0, core_id, thread_id: 0 }
    }
}

#[derive(Debug, Serialize)]
struct Cpu {
    current: bool,
    qom_path: String,
    halted: bool,
    props: Place,
    #[serde(rename = "CPU")]
    index: usize,
    thread_id: i32,
    arch: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct HotpluggableCpu {
    #[serde(rename = "type")]
    kind: &'static str,
    vcpus_count: usize,
    props: Place,
    qom_path: String,
}

fn qom_path(index: usize) -> String {
    format!("/machine/unattached/device[{index}]")
}

/// `query-cpus`: kata reads the threads from here to put them into cgroups.
pub fn cpus(machine: &Machine) -> Value {
    let threads = machine.vcpu_thread_ids();
    let cpus = threads.into_iter().enumerate().map(|(index, thread_id)| Cpu {
        current: true,
        qom_path: qom_path(index),
        halted: false,
        props: Place::of(index),
        index,
        thread_id,
        arch: "x86",
    });
    cpus.map(|cpu| json!(cpu)).collect()
}

/// `query-hotpluggable-cpus`: those that there are.
pub fn hotpluggable_cpus(machine: &Machine) -> Value {
    let places = (0..machine.vcpu_thread_ids().len()).map(|index| HotpluggableCpu {
        kind: "host-x86-cpu",
        vcpus_count: 1,
        props: Place::of(index),
        qom_path: qom_path(index),
    });
    places.map(|place| json!(place)).collect()
}

/// `query-version`
pub fn version() -> Value {
    json!(Version::default())
}

/// `query-events`
pub fn events() -> Value {
    ["SHUTDOWN", "RESET", "STOP", "RESUME", "DEVICE_DELETED", "BALLOON_CHANGED"]
        .iter()
        .map(|name| json!({"name": name}))
        .collect()
}

/// `query-target`
pub fn target() -> Value {
    json!({"arch": "x86_64"})
}

/// `query-kvm`
pub fn kvm() -> Value {
    json!({"enabled": true, "present": true})
}

/// `query-machines`
pub fn machines() -> Value {
    json!([{
        "name": "microvm",
        "cpu-max": crate::arch::x86_64::layout::MAX_VCPUS,
        "hotpluggable-cpus": false,
        "numa-mem-supported": false,
        "deprecated": false,
    }])
}

/// `qom-list-types`
pub fn types() -> Value {
    ["virtio-blk-device", "virtio-net-device"]
        .iter()
        .map(|name| json!({"name": name, "parent": "virtio-device"}))
        .collect()
}
