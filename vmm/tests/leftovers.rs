//! What a machine leaves behind: nothing. By themselves, because a process's other tests hold things too.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;

use support::{Code, EXIT_PORT, config, wait};
use vmm::{ExitReason, Machine, Placement, RngConfig, VsockConfig};

const SHUTDOWN: u8 = 4;

static ALONE: Mutex<()> = Mutex::new(());

/// What a process holds: descriptors by what they are, threads, lines of its memory map.
fn holdings() -> (BTreeMap<String, usize>, usize, usize) {
    let mut descriptors = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fd").expect("fd") {
        let target = fs::read_link(entry.expect("entry").path());
        let kind = target.map_or_else(|_| "gone".into(), |path| path.display().to_string());
        *descriptors.entry(kind).or_default() += 1;
    }
    let threads = fs::read_dir("/proc/self/task").expect("task").count();
    let maps = fs::read_to_string("/proc/self/maps").expect("maps");
    let machines = maps.lines().filter(|line| line.contains("kvm") || line.contains("/tmp/")).count();
    (descriptors, threads, machines)
}

#[test]
fn a_stopped_machine_gives_its_memory_back_before_it_is_dropped() {
    need_kvm!();
    let _alone = ALONE.lock();
    let address_space = || {
        let status = fs::read_to_string("/proc/self/statm").expect("statm");
        status.split(' ').next().and_then(|pages| pages.parse::<u64>().ok()).expect("pages") * 4096
    };
    let kernel = Code::new().spin().flat();
    let mut config = config(kernel.path());
    config.memory.size = 16 << 30;
    let before = address_space();
    let machine = Machine::build(config).expect("build");
    assert!(address_space() > before + (16 << 30));
    machine.start().expect("start");
    machine.stop();
    assert!(address_space() < before + (1 << 30));
    assert_eq!(machine.exit_reason(), Some(ExitReason::Stopped));
}

#[test]
fn nothing_is_left_of_a_machine() {
    need_kvm!();
    let _alone = ALONE.lock();
    // Long enough to be mapped, not copied.
    let mut image = Code::new().print("x").out(EXIT_PORT, SHUTDOWN).spin().as_bytes().to_vec();
    image.resize(1 << 20, 0);
    let kernel = support::file(&image);
    let share = tempfile::tempdir().expect("directory");
    let run = |end: fn(&Machine)| {
        let mut config = config(kernel.path());
        config.vcpus = 2;
        config.images = Placement::Mapped;
        config.boot.initrd = Some(kernel.path().to_owned());
        config.vsock = Some(VsockConfig { guest_cid: 3, uds_path: Some(share.path().join("vsock")) });
        config.rng = Some(RngConfig::default());
        let machine = Machine::build(config).expect("build");
        machine.start().expect("start");
        end(&machine);
    };
    // The first machine makes what a process makes once.
    run(|machine| assert_eq!(wait(machine), ExitReason::Shutdown));
    let before = holdings();
    for _ in 0..5 {
        run(|machine| assert_eq!(wait(machine), ExitReason::Shutdown));
        run(Machine::stop);
        run(|_| ());
    }
    assert_eq!(holdings(), before);
    assert_eq!(fs::read_dir(share.path()).expect("directory").count(), 0, "a socket is left");
}

#[test]
fn nothing_is_left_of_a_snapshot_of_a_machine_that_runs() {
    need_kvm!();
    let _alone = ALONE.lock();
    let kernel = Code::new().spin().flat();
    let machine = Machine::build(config(kernel.path())).expect("build");
    machine.start().expect("start");
    let place = tempfile::tempdir().expect("directory");
    let file = support::file(b"no directory");
    machine.snapshot_live(place.path()).expect("snapshot");
    let before = holdings();
    for _ in 0..5 {
        machine.snapshot_live(place.path()).expect("snapshot");
        machine.snapshot_live(file.path()).expect_err("no directory");
    }
    assert_eq!(holdings(), before);
    let mut names: Vec<_> =
        fs::read_dir(place.path()).expect("directory").map(|entry| entry.expect("entry").file_name()).collect();
    names.sort();
    assert_eq!(names, ["manifest", "memory", "state"]);
}
