//! Machines that are stopped, saved and restored while they work, and whose devices are replaced.

use std::fs;
use std::io::Write;
use std::net::Shutdown;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use inlay_tests::harness::standalone::{Order, Rig, Vm, host, md5, noise};
use serde_json::{Value, json};

use super::network;

crate::on_a_rig!(
    loses_nothing_while_it_is_stopped,
    goes_on_from_a_snapshot_under_load,
    swaps_a_drive_ten_times,
    swaps_an_interface_ten_times,
);

const SIZE: u64 = 4 << 20;

/// Writes all of the disk at random and in order, and verifies it.
fn load() -> String {
    format!(
        "fio --name=v --thread --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bs=4k \
         --size={SIZE} --verify=crc32c --verify_fatal=1 --minimal && md5sum </dev/vda"
    )
}

/// A tap interface that outlives the machines that use it.
struct Tap(&'static str);

impl Tap {
    fn new(name: &'static str, address: &str) -> Self {
        host(&["tunctl", "-t", name]);
        host(&["ip", "address", "add", address, "dev", name]);
        host(&["ip", "link", "set", name, "up"]);
        Self(name)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("/bin/busybox").args(["tunctl", "-d", self.0]).stdout(Stdio::null()).status();
    }
}

fn loses_nothing_while_it_is_stopped(rig: &Rig) {
    let disk = rig.file("disk", SIZE);
    let vm = rig
        .vm()
        .cpus(2)
        .option("-drive", format!("id=d,file={},direct=off,aio=threads", disk.display()))
        .option("-device", "virtio-blk-device,id=d,drive=d")
        .boot();
    let load = vm.spawn(&load());
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(200));
        vm.qmp("stop", json!({}));
        vm.event("STOP");
        assert_eq!(vm.qmp("query-status", json!({}))["status"], "paused");
        let before = md5(&disk);
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(md5(&disk), before, "A machine that is stopped has written");
        vm.qmp("cont", json!({}));
        vm.event("RESUME");
    }
    let said = vm.join(load);
    assert!(said.contains(&md5(&disk)), "{said}");
    assert!(vm.quit().success());
}

/// What a restored machine is made of: the same as the one that was saved.
fn saved(order: Order, disk: &std::path::Path) -> Order {
    order
        .cpus(2)
        .option("-drive", format!("id=d,file={},direct=off,aio=threads", disk.display()))
        .option("-device", "virtio-blk-device,id=d,drive=d")
        .option("-netdev", "tap,id=n,ifname=inlay0")
        .option("-device", "virtio-net-device,id=n,netdev=n,mac=02:00:00:00:00:07")
        .option("-object", "rng-random,id=r,filename=/dev/urandom")
        .option("-device", "virtio-rng-device,id=r,rng=r")
        .option("-device", "virtio-balloon-device,id=b,deflate-on-oom=true")
}

/// Load on a drive and on a connection; both go on in the restored machine, the connection with the same program at its
/// other end.
fn goes_on_from_a_snapshot_under_load(rig: &Rig) {
    let tap = Tap::new("inlay0", "10.77.0.1/24");
    let disk = rig.file("disk", SIZE);
    let vm = saved(rig.vm(), &disk).boot();
    vm.sh("ip address add 10.77.0.2/24 dev eth0 && ip link set eth0 up && iperf3 --server --daemon && ping -c 1 -W 10 10.77.0.1");
    let load = vm.spawn(&load());
    let traffic = traffic();
    std::thread::sleep(Duration::from_secs(1));
    vm.assert_running(&load);

    let snapshot = rig.path("snapshot");
    vm.qmp("migrate", json!({"uri": format!("file:{}", snapshot.display())}));
    assert_eq!(vm.qmp("query-migrate", json!({}))["status"], "completed");
    assert_eq!(vm.qmp("query-status", json!({}))["running"], false);
    assert!(vm.quit().success());

    let vm = saved(rig.vm(), &disk).incoming(&snapshot);
    // It is there before its load has ended.
    vm.sh("uptime");
    let said = vm.join(load);
    assert!(said.contains(&md5(&disk)), "{said}");
    let report = traffic.wait_with_output().unwrap();
    assert!(report.status.success(), "{report:?}");
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    let rate = &report["end"]["sum_received"]["bits_per_second"];
    println!("{} of {} bit/s through save and restore", tap.0, rate);
    assert!(rate.as_f64().unwrap() > 0.0);
    assert!(vm.quit().success());
}

fn traffic() -> Child {
    let args = ["--client", "10.77.0.2", "--time", "15", "--bitrate", "20M", "--json"];
    Command::new("iperf3").args(args).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
}

/// The first slot that is left is `disk`'s: it gets a drive, the guest copies it, and it goes again.
fn swaps_a_drive_ten_times(rig: &Rig) {
    let first = rig.file("first", SIZE);
    let vm = rig
        .vm()
        .option("-drive", format!("id=first,file={},direct=off", first.display()))
        .option("-device", "virtio-blk-device,id=first,drive=first")
        .boot();
    for round in 0..10_usize {
        // Another size and another content each time.
        let size = (256 << 10) + round * 4096;
        let path = rig.path(&format!("disk-{round}"));
        fs::write(&path, noise(size + round).split_off(round)).unwrap();
        plug_drive(&vm, &path.to_string_lossy());
        let seen = vm.sh("until [ $(cat /sys/block/vdb/size) -gt 0 ]; do sleep 0.02; done; cat /sys/block/vdb/size; md5sum </dev/vdb");
        assert!(seen.starts_with(&(size / 512).to_string()), "{round}: {seen}");
        assert!(seen.contains(&md5(&path)), "{round}: {seen}");
        // The same is written back, and is on the host when the drive is gone.
        vm.sh("head -c 65536 /dev/urandom >/tmp/block && dd if=/tmp/block of=/dev/vdb bs=64k oflag=direct && blockdev --flushbufs /dev/vdb");
        let written = vm.sh("md5sum </dev/vdb");
        vm.qmp("device_del", json!({"id": "disk"}));
        assert_eq!(vm.event("DEVICE_DELETED")["data"]["device"], "disk");
        assert!(written.contains(&md5(&path)), "{round}: {written}");
        vm.sh("until [ $(cat /sys/block/vdb/size) = 0 ]; do sleep 0.02; done");
        assert_eq!(vm.sh("dd if=/dev/vdb bs=4k count=1 2>/dev/null | wc -c").trim(), "0");
    }
    // The drive that stayed was not disturbed.
    let seen = vm.sh("md5sum </dev/vda");
    assert!(seen.contains(&md5(&first)));
    assert!(vm.quit().success());
}

fn plug_drive(vm: &Vm, path: &str) {
    let file = json!({"driver": "file", "filename": path, "aio": "native"});
    vm.qmp("blockdev-add", json!({"node-name": "disk", "driver": "raw", "read-only": false, "file": file}));
    vm.qmp("device_add", json!({"id": "disk", "driver": "virtio-blk-mmio", "drive": "disk", "addr": "0x1"}));
}

fn swaps_an_interface_ten_times(rig: &Rig) {
    let taps = [Tap::new("inlay0", "10.77.0.1/24"), Tap::new("inlay1", "10.78.0.1/24")];
    let vm = rig.vm().boot();
    let sent = noise(200_000);
    fs::write(rig.path("sent"), &sent).unwrap();
    for round in 0..10_usize {
        let (tap, network) = (taps[round % 2].0, 77 + round % 2);
        vm.qmp("netdev_add", json!({"id": "net", "type": "tap", "ifname": tap}));
        let mac = format!("02:00:00:00:00:{round:02x}");
        vm.qmp(
            "device_add",
            json!({"id": "net", "driver": "virtio-net-mmio", "netdev": "net", "mac": mac, "addr": "0x0"}),
        );
        vm.sh(&format!(
            "ip address add 10.{network}.0.2/24 dev eth0 && ip link set eth0 up && \
             until [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.02; done"
        ));
        let listener = vm.spawn("nc -l -p 9 | md5sum");
        let mut stream = network::connect(&format!("10.{network}.0.2:9"));
        stream.write_all(&sent).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let received = vm.join(listener);
        assert!(received.contains(&md5(&rig.path("sent"))), "{round}: {received}");
        vm.qmp("device_del", json!({"id": "net"}));
        assert_eq!(vm.event("DEVICE_DELETED")["data"]["device"], "net");
        vm.sh("until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.02; done; ip address flush dev eth0");
    }
    assert!(vm.quit().success());
}
