//! What is told about the machine.

use serde::Serialize;
use serde_json::{Value, json};

use super::front::Front;
use super::message::Version;
use crate::machine::Machine;

/// Where a processor is: one socket, one thread a core, as its CPUID tells the guest.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Place {
    socket_id: usize,
    #[serde(rename = "die_id")]
    die_id: usize,
    core_id: usize,
    thread_id: usize,
}

impl Place {
    fn of(core_id: usize) -> Self {
        Self { socket_id: 0, die_id: 0, core_id, thread_id: 0 }
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

/// `query-chardev`
pub fn chardevs(front: &Front) -> Value {
    let streams = front.streams().iter();
    streams.map(|stream| json!({"label": stream.label, "filename": stream.filename, "open": true})).collect()
}

/// `query-iothreads`: by whatever name, it is the one event loop.
pub fn iothreads(front: &Front) -> Value {
    let thread_id = front.machine().io_thread_id().unwrap_or_default();
    let threads = front.iothreads().iter().map(|id| {
        json!({"id": id, "thread-id": thread_id, "poll-max-ns": 0, "poll-grow": 0, "poll-shrink": 0, "aio-max-batch": 0})
    });
    threads.collect()
}

/// `query-version`
pub fn version() -> Value {
    json!(Version::default())
}

/// `query-events`
pub fn events() -> Value {
    ["SHUTDOWN", "RESET", "STOP", "RESUME", "POWERDOWN", "DEVICE_DELETED", "BALLOON_CHANGED"]
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
