//! Memory that comes and goes, entropy, and consoles.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use inlay_tests::harness::standalone::{Rig, Vm};
use serde_json::json;

crate::on_a_rig!(gives_back_and_takes, is_plugged_at_the_start, has_entropy_and_a_second_console);

const MIB: u64 = 1 << 20;

/// How much a guest keeps free, in KiB.
fn free(vm: &Vm) -> u64 {
    number(&vm.sh("sed -n 's/MemFree: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"))
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

/// Waits for something that has no event of its own.
#[track_caller]
fn wait_for(what: &str, mut happened: impl FnMut() -> bool) {
    let started = Instant::now();
    while !happened() {
        assert!(started.elapsed() < Duration::from_secs(60), "Waited in vain for {what}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// What the machine holds of the host's memory, in KiB.
fn held(vm: &Vm) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    number(line.trim_end_matches(" kB"))
}

/// The balloon, and the reporting of free pages without anybody asking.
fn gives_back_and_takes(rig: &Rig) {
    let balloon = "virtio-balloon-device,id=b,deflate-on-oom=true,free-page-reporting=true";
    let vm = rig.vm().memory(256).option("-device", balloon).boot();
    assert_eq!(vm.qmp("query-balloon", json!({}))["actual"], 256 * MIB);

    // Reported: what was used and is free again goes back by itself.
    let idle = held(&vm);
    vm.sh("head -c 50000000 /dev/zero >/tmp/zeros");
    let full = held(&vm);
    // What the guest freed meanwhile is reported meanwhile.
    assert!(full > idle + 25_000, "{idle} KiB, then {full}");
    vm.sh("rm /tmp/zeros");
    wait_for("free pages to be reported", || held(&vm) + 25_000 < full);
    println!("{full} KiB held with 50 MB in use, {} after", held(&vm));

    // Asked for.
    let before = free(&vm);
    vm.qmp("balloon", json!({"value": 224 * MIB}));
    wait_for("the balloon to be inflated", || vm.qmp("query-balloon", json!({}))["actual"] == 224 * MIB);
    assert!(vm.event("BALLOON_CHANGED")["data"]["actual"].as_u64().unwrap() < 256 * MIB);
    let inflated = free(&vm);
    assert!(inflated + 30_000 < before, "{before} KiB free, then {inflated}");
    vm.qmp("balloon", json!({"value": 256 * MIB}));
    wait_for("the balloon to be deflated", || vm.qmp("query-balloon", json!({}))["actual"] == 256 * MIB);
    assert!(free(&vm) + 5_000 > before);
    vm.sh("head -c 50000000 /dev/zero >/tmp/zeros && rm /tmp/zeros");
    assert!(vm.quit().success());
}

fn is_plugged_at_the_start(rig: &Rig) {
    let vm = rig
        .vm()
        .memory(96)
        .option("-object", "memory-backend-ram,id=more,size=256M")
        .option("-device", "virtio-mem-device,id=m,memdev=more,requested-size=128M")
        .boot();
    let total = || number(&vm.sh("sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"));
    wait_for("memory to be plugged", || total() > 180_000);
    assert!(total() < 230_000, "{} KiB", total());
    // It is there: more than the machine began with has free fits.
    vm.sh("mount -o remount,size=200m /tmp && head -c 75000000 /dev/zero >/tmp/zeros && test $(wc -c </tmp/zeros) = 75000000");
    assert!(vm.quit().success());
}

fn has_entropy_and_a_second_console(rig: &Rig) {
    let vm = rig
        .vm()
        .option("-object", "rng-random,id=r,filename=/dev/urandom")
        .option("-device", "virtio-rng-device,id=r,rng=r")
        .option("-device", "virtio-serial-device,id=s")
        .option("-chardev", "socket,id=c,path=hvc,server,nowait")
        .option("-device", "virtconsole,id=p,chardev=c,nr=0")
        .boot();
    assert_eq!(vm.sh("cat /sys/class/misc/hw_random/rng_current").trim(), "virtio_rng.0");
    let drawn = |count| vm.sh(&format!("dd if=/dev/hwrng bs=4096 count={count} iflag=fullblock 2>/dev/null | md5sum"));
    assert_ne!(drawn(1), drawn(1));
    drawn(4);

    let mut stream = UnixStream::connect(vm.dir().join("hvc")).unwrap();
    // Whoever closes the terminal last sets it back.
    let reader =
        vm.spawn("exec 3<>/dev/hvc0; stty -echo raw <&3; echo ready >&3; read line <&3; echo \"$line\"; seq 5000 >&3");
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    stream.write_all(b"from the host\n").unwrap();
    for number in 1..=5000 {
        assert_eq!(lines.next().unwrap().unwrap(), number.to_string());
    }
    assert_eq!(vm.join(reader).trim(), "from the host");
    assert!(vm.power_off().success());
}
