//! Memory beyond the template's, for containers whose limits say that they may use it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::UpdateTaskRequest;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::context::with_duration;
use containerd_shim_protos::{Client, TaskClient};
use inlay_tests::harness::{HOME, Scene, configure};
use inlay_tests::images;
use serde_json::{Value, json};

use super::{make, remove, set_factory, take_starts, with_factory};
use crate::privileges::run_member;

crate::for_inlay!(
    is_there_for_a_container_that_uses_it,
    comes_and_goes_with_the_containers_of_a_sandbox,
    follows_a_limit_that_is_changed,
    is_what_is_configured_at_most,
    comes_to_a_spare_whose_pages_are_lazy,
    is_missing_in_the_end_where_the_guest_takes_none,
);

/// MiB at first, and 896 more.
const FIRST: u64 = 128;
const MACHINE: &str = "default_memory = 128\nenable_virtio_mem = true\ndefault_maxmemory = 1024";
const MIB: u64 = 1 << 20;
/// Of what is plugged the kernel needs a 64th for itself, which it takes from what it has.
const SLACK: u64 = 16 * MIB;

/// What `/proc/meminfo` says of all memory, in bytes.
#[track_caller]
fn total(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_else(|| panic!("{meminfo}"));
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[track_caller]
fn total_inside(scene: &Scene, id: &str) -> u64 {
    total(&scene.exec(id, &["cat", "/proc/meminfo"]).ok().stdout)
}

/// Waits until a guest has so much more memory than it began with, and not more.
#[track_caller]
fn grows(scene: &Scene, id: &str, without: u64, by: u64) {
    scene.wait_for("the memory", || total_inside(scene, id) + SLACK > without + by);
    let with = total_inside(scene, id);
    println!("{} KiB, then {} KiB", without >> 10, with >> 10);
    assert!(with <= without + by + SLACK, "{without} {with}");
}

/// Starts a container with a limit of its memory, and a file system for files in memory.
#[track_caller]
fn start_limited(scene: &Scene, limit: u64) -> String {
    let id = scene.id("limited");
    let limit = limit.to_string();
    let mount = "type=tmpfs,src=tmpfs,dst=/big,options=rw:size=400m";
    let options = ["run", "--detach", "--runtime", scene.runtime.name(), "--memory-limit", &limit, "--mount", mount];
    scene.ctr(&[&options[..], &[images::BUSYBOX, &id, "sleep", "1000"]].concat()).ok();
    id
}

/// What a guest has whose container has no limit.
#[track_caller]
fn total_without(scene: &Scene) -> u64 {
    let total = total(&scene.run(&["cat", "/proc/meminfo"]).ok().stdout);
    assert!(total < FIRST * MIB, "{total}");
    total
}

fn is_there_for_a_container_that_uses_it(scene: &Scene) {
    with_factory(scene, MACHINE, "");
    make(scene);
    take_starts();
    let without = total_without(scene);
    let id = start_limited(scene, 256 * MIB);
    grows(scene, &id, without, 256 * MIB);
    // More than all that the template has, each page another.
    let pieces = "for i in $(seq 40); do echo $i; cat /big/seed; done";
    let script = format!(
        "head -c {} /dev/urandom > /big/seed; {pieces} > /big/file; {pieces} | md5sum; md5sum < /big/file; stat -c %s /big/file",
        4 * MIB
    );
    let output = scene.exec(&id, &["sh", "-c", &script]).ok().stdout;
    let [streamed, kept, size] = output.lines().collect::<Vec<_>>().try_into().expect("three lines");
    assert_eq!(streamed, kept);
    assert!(size.parse::<u64>().unwrap() > 160 * MIB && 160 > FIRST, "{size}");
    scene.remove(&id);
    let starts = take_starts();
    assert!(!starts.is_empty() && starts.iter().all(|start| start.restored), "{starts:?}");
    remove(scene);
}

fn comes_and_goes_with_the_containers_of_a_sandbox(scene: &Scene) {
    with_factory(scene, MACHINE, "");
    make(scene);
    let id = scene.start(&["sleep", "1000"]);
    let without = total_inside(scene, &id);
    let limited = |limit: u64| {
        let args = ["/bin/sh", "-c", "sleep 2; cat /proc/meminfo"];
        let adapt = |spec: &mut serde_json::Value| spec["linux"]["resources"]["memory"] = json!({ "limit": limit });
        total(&run_member(scene, &id, &args, adapt).ok().stdout)
    };
    for limit in [256 * MIB, 130 * MIB] {
        let with = limited(limit);
        println!("{} KiB, then {} KiB", without >> 10, with >> 10);
        assert!(with.abs_diff(without + limit) < SLACK, "{without} {with}");
        // It was told to give it back, and nothing of it is in use.
        scene.wait_for("the memory to go", || total_inside(scene, &id) < without + SLACK);
    }
    scene.remove(&id);
    remove(scene);
}

/// Changes a container's resources by containerd's call `Update`, for which `ctr` has no command: by the shim's own socket.
#[track_caller]
fn update(id: &str, resources: &Value) {
    let bundle = Path::new(HOME).join("state/io.containerd.runtime.v2.task/default").join(id);
    let address = fs::read_to_string(bundle.join("address")).unwrap();
    let shim = TaskClient::new(Client::connect(&address).unwrap());
    let resources = Any { value: resources.to_string().into_bytes(), ..Any::default() };
    let request =
        UpdateTaskRequest { id: id.to_owned(), resources: Some(resources).into(), ..UpdateTaskRequest::default() };
    shim.update(with_duration(Duration::from_secs(60)), &request).unwrap();
}

fn follows_a_limit_that_is_changed(scene: &Scene) {
    with_factory(scene, MACHINE, "");
    make(scene);
    let without = total_without(scene);
    let id = start_limited(scene, 64 * MIB);
    grows(scene, &id, without, 64 * MIB);
    let limit_is = |limit: u64| {
        let metrics = scene.ctr(&["task", "metrics", &id]).ok().stdout;
        assert!(metrics.contains(&limit.to_string()), "{limit}: {metrics}");
    };
    limit_is(64 * MIB);
    update(&id, &json!({ "memory": { "limit": 256 * MIB } }));
    // It is there before the container may use it.
    assert!(total_inside(scene, &id) + SLACK > without + 256 * MIB);
    limit_is(256 * MIB);
    update(&id, &json!({ "cpu": { "shares": 512 } }));
    limit_is(256 * MIB);
    update(&id, &json!({ "memory": { "limit": 32 * MIB } }));
    limit_is(32 * MIB);
    scene.wait_for("the memory to go", || total_inside(scene, &id) < without + 32 * MIB + SLACK);
    assert_eq!(scene.exec(&id, &["echo", "well"]).ok().stdout, "well\n");
    scene.remove(&id);
    remove(scene);
}

fn is_what_is_configured_at_most(scene: &Scene) {
    with_factory(scene, "default_memory = 128\nenable_virtio_mem = true\ndefault_maxmemory = 272", "");
    make(scene);
    let without = total_without(scene);
    let id = start_limited(scene, 4096 * MIB);
    grows(scene, &id, without, 144 * MIB);
    let log = scene.log();
    assert!(log.contains("do not fit below default_maxmemory"), "{log}");
    scene.remove(&id);
    // The template of a machine without is not this one's.
    set_factory(scene, "default_memory = 128", "");
    let list = scene.inlay(&["template", "list"]).ok().stdout;
    assert!(list.contains("mem of 256 MiB in blocks of 2 MiB, and fs"), "{list}");
    remove(scene);
}

fn comes_to_a_spare_whose_pages_are_lazy(scene: &Scene) {
    with_factory(scene, MACHINE, "template_memory = \"lazy\"\npool_size = 1");
    make(scene);
    scene.inlay(&["pool", "fill"]).ok();
    take_starts();
    let id = start_limited(scene, 256 * MIB);
    scene.wait_for("the memory", || total_inside(scene, &id) > 2 * FIRST * MIB);
    let script = "head -c 160000000 /dev/zero > /big/file && stat -c %s /big/file";
    assert_eq!(scene.exec(&id, &["sh", "-c", script]).ok().stdout, "160000000\n");
    scene.remove(&id);
    assert!(take_starts().iter().all(|start| start.restored));
    scene.inlay(&["pool", "drain"]).ok();
    remove(scene);
}

/// As one would whose kernel lacks the driver, or that does not want to.
fn is_missing_in_the_end_where_the_guest_takes_none(scene: &Scene) {
    let blind = "kernel_params = \"initcall_blacklist=virtio_mem_driver_init\"";
    configure(&scene.parts.configuration(&format!("{MACHINE}\n{blind}"))).unwrap();
    let failed = scene.run_with(&["--memory-limit", "134217728"], images::BUSYBOX, &["true"]).failed();
    assert!(failed.stderr.contains("does not get the memory that the container may use"), "{failed:?}");
    assert!(failed.stderr.contains("has plugged 0 of 128 MiB of memory for its containers within 30 s"), "{failed:?}");
    assert_eq!(scene.run(&["echo", "well"]).ok().stdout, "well\n");
}
