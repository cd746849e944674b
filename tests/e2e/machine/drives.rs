//! Drives: what the guest wrote is what the host's file has, by every way of doing it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use inlay_tests::harness::standalone::{Rig, Vm, md5};

crate::on_a_rig!(keep_what_was_written_by_every_engine, keep_to_their_limits);

/// Bytes of each disk.
const SIZE: u64 = 16 << 20;

/// Random writes of different sizes all over the disk, several at once, each read back and compared.
fn verified_writes(disk: &str) -> String {
    format!(
        "fio --name=v --thread --filename=/dev/{disk} --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite \
         --bsrange=4k-64k --size={SIZE} --verify=crc32c --verify_fatal=1 --fsync=32 --minimal"
    )
}

/// The disk's digest is the same in the guest, which has to ask the device, and on the host.
#[track_caller]
fn assert_same(vm: &Vm, disk: &str, file: &Path) {
    let guest = vm.sh(&format!("echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/{disk}"));
    assert_eq!(guest.split_whitespace().next(), Some(md5(file).as_str()), "{disk}");
}

fn keep_what_was_written_by_every_engine(rig: &Rig) {
    let scratch = rig.scratch(96);
    let names = ["threads", "uring", "off", "direct"];
    let files = names.map(|name| rig.file_in(&scratch, name, SIZE));
    let options = ["direct=off,aio=threads", "direct=on,aio=io_uring", "direct=off,aio=off", "direct=on,aio=native"];
    let mut order = rig.vm().cpus(2);
    for ((name, file), options) in names.iter().zip(&files).zip(options) {
        order = order
            .option("-drive", format!("id={name},file={},{options}", file.display()))
            .option("-device", format!("virtio-blk-device,id={name},drive={name},serial=SN-{name},num-queues=2"));
    }
    let vm = order.boot();
    for ((disk, name), file) in ["vda", "vdb", "vdc", "vdd"].iter().zip(names).zip(&files) {
        let facts = vm.sh(&format!(
            "cat /sys/block/{disk}/serial; echo; cat /sys/block/{disk}/size; ls /sys/block/{disk}/mq | wc -l"
        ));
        assert_eq!(facts.split_whitespace().collect::<Vec<_>>(), [&format!("SN-{name}"), "32768", "2"], "{facts}");
        let started = Instant::now();
        vm.sh(&verified_writes(disk));
        println!("{name}: {SIZE} bytes written and verified in {:.1} s", started.elapsed().as_secs_f64());
        assert_same(&vm, disk, file);

        // What is discarded takes no room on the host and reads as zeros.
        let before = file.metadata().unwrap().blocks();
        vm.sh(&format!("blkdiscard -o 4194304 -l 8388608 /dev/{disk} && sync"));
        let after = file.metadata().unwrap().blocks();
        assert!(after + (7 << 11) < before, "{name}: {before} blocks, then {after}");
        let zeros =
            vm.sh(&format!("dd if=/dev/{disk} bs=1M skip=4 count=8 iflag=direct 2>/dev/null | tr -d '\\0' | wc -c"));
        assert_eq!(zeros.trim(), "0", "{name}");
        assert_same(&vm, disk, file);
    }
    assert!(vm.power_off().success());
}

fn keep_to_their_limits(rig: &Rig) {
    let free = rig.file("limited", SIZE);
    let fixed = rig.file("fixed", SIZE);
    let vm = rig
        .vm()
        .option("-drive", format!("id=l,file={},direct=off,throttling.iops-total=40", free.display()))
        .option("-device", "virtio-blk-device,id=l,drive=l")
        .option("-drive", format!("id=f,file={},direct=off,readonly=on", fixed.display()))
        .option("-device", "virtio-blk-device,id=f,drive=f")
        .boot();
    // Two seconds' worth beyond what a second may take at once.
    let started = Instant::now();
    vm.sh("dd if=/dev/vda of=/dev/null bs=4k count=120 iflag=direct");
    let took = started.elapsed();
    assert!(took > Duration::from_millis(1900), "{took:?}");

    assert_eq!(vm.sh("cat /sys/block/vdb/ro").trim(), "1");
    assert_ne!(vm.try_sh("dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct").code, 0);
    assert_ne!(vm.try_sh("blkdiscard /dev/vdb").code, 0);
    assert!(std::fs::read(&fixed).unwrap().iter().all(|byte| *byte == 0));
    assert!(vm.quit().success());
}
