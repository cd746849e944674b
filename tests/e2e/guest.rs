//! The guest: a kernel of its own, its memory, the times of its start.

use std::fs;
use std::thread;
use std::time::Duration;

use inlay_tests::harness::{HOME, Scene, configure, statistic};
use serde_json::Value;

crate::for_inlay!(
    has_a_kernel_of_its_own,
    has_the_memory_and_the_cpus_of_the_configuration,
    uses_little_memory,
    traces_the_seven_times_of_a_start,
    denies_a_system_call_that_the_profile_denies,
    sleeps_while_there_is_nothing_to_do,
);

/// The issue's budget for what the guest itself uses of 256 MB, in KiB.
const GUEST_BUDGET: u64 = 25_000;

/// What a start has left to do is done by then.
const REST: Duration = Duration::from_secs(5);
/// How long a guest is watched that does nothing, and how often it may wake meanwhile: a kernel whose timers nobody looked
/// after does so ten times a second. A slow host makes it less, not more.
const LOOK: Duration = Duration::from_secs(8);
const NAPS: u64 = 16;

fn has_a_kernel_of_its_own(scene: &Scene) {
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let guest = scene.run(&["uname", "-r"]).ok().stdout;
    assert_ne!(guest, host);
    let command_line = scene.run(&["cat", "/proc/cmdline"]).ok().stdout;
    assert!(command_line.contains("virtio_mmio.device="), "{command_line}");
}

fn has_the_memory_and_the_cpus_of_the_configuration(scene: &Scene) {
    configure(&scene.parts.configuration("default_vcpus = 2\ndefault_memory = 512")).unwrap();
    let output = scene.run(&["sh", "-c", "nproc; sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"]).ok();
    let numbers: Vec<u64> = output.stdout.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(numbers[0], 2);
    assert!((460 << 10..=512 << 10).contains(&numbers[1]), "{} KiB", numbers[1]);
}

fn uses_little_memory(scene: &Scene) {
    let output = scene.run(&["free", "-k"]).ok().stdout;
    let line = output.lines().find(|line| line.starts_with("Mem:")).unwrap();
    let used: u64 = line.split_whitespace().nth(2).unwrap().parse().unwrap();
    println!("{output}");
    assert!(used <= GUEST_BUDGET, "{output}");
}

/// `trace_file` gets one JSON object a start, with nanoseconds of the monotonic clock.
fn traces_the_seven_times_of_a_start(scene: &Scene) {
    let path = format!("{HOME}/trace.jsonl");
    let _ = fs::remove_file(&path);
    scene.run(&["echo", "."]).ok();
    let text = fs::read_to_string(&path).unwrap();
    println!("{text}");
    let line: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let times: Vec<u64> =
        (0..7).map(|n| line[format!("t{n}")].as_u64().unwrap_or_else(|| panic!("no t{n} in {line}"))).collect();
    assert!(times.is_sorted(), "{times:?}");
}

/// A node has hundreds of sandboxes that do nothing: what wakes each of them takes time from the others.
fn sleeps_while_there_is_nothing_to_do(scene: &Scene) {
    let id = scene.start(&["sleep", "1000"]);
    let pid = scene.pid_of(&id);
    thread::sleep(REST);
    let naps = || statistic(pid, "halt_exits").unwrap();
    let before = naps();
    thread::sleep(LOOK);
    let naps = naps() - before;
    println!("the guest slept {naps} times in {} s", LOOK.as_secs());
    assert!(naps <= NAPS, "the guest was woken {naps} times");
    // It slept, and was not dead.
    assert_eq!(scene.exec(&id, &["echo", "well"]).ok().stdout, "well\n");
    scene.remove(&id);
}

/// containerd's default profile denies `unshare` and the like to a container without privileges; a
/// runtime that skips the profile in silence allows them.
fn denies_a_system_call_that_the_profile_denies(scene: &Scene) {
    let script = "grep Seccomp: /proc/self/status; unshare -U true";
    let output = scene.run_with(&["--seccomp"], inlay_tests::images::BUSYBOX, &["sh", "-c", script]).failed();
    assert!(output.stdout.contains("Seccomp:\t2"), "{output:?}");
    assert!(output.stderr.contains("Operation not permitted"), "{output:?}");
}
