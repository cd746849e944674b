//! Directories and drives that come from a directory of the host, from this process or from another one.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use inlay_tests::harness::standalone::{Rig, Vm, host, md5, noise};

crate::on_a_rig!(hold_files_of_both_sides, go_on_when_their_process_is_killed);

/// Bytes of a file that goes through a directory, and of a drive.
const AMOUNT: u64 = 4 << 20;

/// A process that serves a device, ended with this value.
pub struct Backend(Child);

impl Backend {
    /// Starts it and waits until it listens.
    fn start(program: &str, args: &[&str], socket: &Path) -> Self {
        let mut command = Command::new(program);
        let process = command.args(args).stdin(Stdio::null()).spawn();
        let backend = Self(process.unwrap_or_else(|error| panic!("{program}: {error}")));
        // Not by a connection: that would be its first, and virtiofsd's last.
        let listening = |line: &str| line.ends_with(&*socket.to_string_lossy()) && line.contains(" 00010000 ");
        let started = Instant::now();
        while !fs::read_to_string("/proc/net/unix").unwrap().lines().any(listening) {
            assert!(started.elapsed() < Duration::from_secs(30), "{program} does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        backend
    }

    /// Debian's virtiofsd; it serves one machine.
    pub fn virtiofsd(socket: &Path, source: &Path) -> Self {
        let path = format!("--socket-path={}", socket.display());
        let source = format!("source={}", source.display());
        let options = ["-o", "sandbox=chroot", "-o", "log_level=err", "--rlimit-nofile=1024"];
        let args = [&[path.as_str(), "-o", &source][..], &options].concat();
        Self::start("/usr/lib/qemu/virtiofsd", &args, socket)
    }

    /// QEMU's storage daemon with one drive.
    fn storage(socket: &Path, file: &Path) -> Self {
        let file = format!("driver=file,node-name=disk,filename={}", file.display());
        let socket_address = format!("addr.type=unix,addr.path={}", socket.display());
        let export = format!("type=vhost-user-blk,id=e,node-name=disk,{socket_address},writable=on");
        Self::start("/usr/bin/qemu-storage-daemon", &["--blockdev", &file, "--export", &export], socket)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Files of either side are the other's, with their modes, links and attributes.
fn exchange(vm: &Vm, tag: &str, dir: &Path) {
    fs::write(dir.join("from-host"), noise(AMOUNT as usize)).unwrap();
    vm.sh(&format!(
        "mkdir /mnt/{tag} -p && mount -t virtiofs {tag} /mnt/{tag} && cd /mnt/{tag} && cp from-host from-guest"
    ));
    let digests = vm.sh(&format!(
        "cd /mnt/{tag} && sync && echo 3 >/proc/sys/vm/drop_caches && md5sum <from-host && md5sum <from-guest"
    ));
    let expected = md5(&dir.join("from-host"));
    assert!(digests.lines().all(|line| line.starts_with(&expected)), "{tag}: {expected}, in the guest {digests}");
    assert_eq!(md5(&dir.join("from-guest")), expected, "{tag}");

    vm.sh(&format!(
        "cd /mnt/{tag} && mkdir -p a/b && ln -s b a/link && echo x >a/b/c && chmod 640 a/b/c && mv a/b/c a/b/d && \
         mkdir a/e && ln a/b/d a/e/hard && mv -T a/e a/b/e"
    ));
    assert_eq!(fs::read_link(dir.join("a/link")).unwrap(), Path::new("b"));
    assert_eq!(host(&["stat", "-c", "%a", &dir.join("a/b/d").to_string_lossy()]).trim(), "640");
    // By a second name: `mv` copies what it cannot move, and says nothing.
    assert_eq!(host(&["stat", "-c", "%h", &dir.join("a/b/e/hard").to_string_lossy()]).trim(), "2");
    vm.sh(&format!("rm -r /mnt/{tag}/a"));
    assert!(!dir.join("a").exists());
    // A map of a file is shared with who reads it.
    vm.sh(&format!("fio --name=m --thread --directory=/mnt/{tag} --ioengine=mmap --rw=randwrite --bs=4k --size=1m --verify=crc32c --minimal"));
    vm.sh(&format!("umount /mnt/{tag}"));
}

fn hold_files_of_both_sides(rig: &Rig) {
    let [own, remote] = ["own", "remote"].map(|name| {
        let dir = rig.path(name);
        fs::create_dir(&dir).unwrap();
        dir
    });
    let socket = rig.path("virtiofsd");
    let _backend = Backend::virtiofsd(&socket, &remote);
    let vm = rig
        .vm()
        .shared()
        .option("-device", format!("virtio-fs-device,id=own,source={},tag=own", own.display()))
        .option("-chardev", format!("socket,id=remote,path={}", socket.display()))
        .option("-device", "vhost-user-fs-device,id=remote,chardev=remote,tag=remote")
        .boot();
    exchange(&vm, "own", &own);
    exchange(&vm, "remote", &remote);
    assert!(vm.quit().success());
}

/// A drive of another process, which is killed twice while the guest writes, and comes again. One request at a time: this backend
/// does not tell its successor which of several it had done, and then there is no going on.
fn go_on_when_their_process_is_killed(rig: &Rig) {
    let file = rig.file("disk", AMOUNT);
    let socket = rig.path("storage");
    let mut backend = Backend::storage(&socket, &file);
    let vm = rig
        .vm()
        .cpus(2)
        .shared()
        .option("-chardev", format!("socket,id=c,path={}", socket.display()))
        .option("-device", "vhost-user-blk-device,id=d,chardev=c")
        .boot();
    // Behind the slots, which are empty.
    let disk = vm.sh(&format!("grep -lx {} /sys/block/vd*/size | cut -d / -f 4", AMOUNT / 512));
    let disk = disk.trim();
    vm.sh("head -c 262144 /dev/urandom >/tmp/data && echo 0 >/tmp/passes");
    let load = vm.spawn(&format!(
        "n=0; until test -e /tmp/stop; do \
         dd if=/tmp/data of=/dev/{disk} bs=4k seek=$((n % 16 * 64)) oflag=direct 2>/tmp/dd || {{ cat /tmp/dd; exit 1; }}; \
         n=$((n + 1)); echo $n >/tmp/passes.new; mv /tmp/passes.new /tmp/passes; done"
    ));
    let passes = || vm.sh("cat /tmp/passes").trim().parse::<u32>().unwrap();
    // Whole ones: what was there when the backend ended may be half written.
    let goes_on = || {
        let (before, started) = (passes(), Instant::now());
        while passes() < before + 2 {
            assert!(started.elapsed() < Duration::from_secs(60), "nothing is written any more");
        }
    };
    goes_on();
    for _ in 0..2 {
        drop(backend);
        // It leaves its socket behind.
        let _ = fs::remove_file(&socket);
        // The guest has a request under way that nobody serves, and the device has looked for its backend in vain.
        std::thread::sleep(Duration::from_millis(300));
        vm.assert_running(&load);
        backend = Backend::storage(&socket, &file);
        goes_on();
    }
    vm.sh("touch /tmp/stop");
    vm.join(load);
    // What each pass wrote, before the first end and after the last, is on the disk.
    let written = passes().min(16) as usize;
    assert!(written >= 6, "{written}");
    let data = vm.sh("md5sum </tmp/data");
    let pieces = fs::read(&file).unwrap();
    let mut pieces = pieces.chunks(256 << 10).take(written);
    let (first, copy) = (pieces.next().unwrap(), rig.path("piece"));
    fs::write(&copy, first).unwrap();
    assert!(data.starts_with(&md5(&copy)), "{data}");
    assert!(pieces.all(|piece| piece == first));
    let guest = vm.sh(&format!("echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/{disk}"));
    assert!(guest.starts_with(&md5(&file)), "{guest}");
    assert!(vm.quit().success());
}
