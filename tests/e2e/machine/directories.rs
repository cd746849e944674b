//! Directories and drives that come from a directory of the host, from this process or from another one.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use inlay_tests::harness::standalone::{Rig, Vm, host, md5, noise};

crate::on_a_rig!(hold_files_of_both_sides);

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
        "cd /mnt/{tag} && mkdir -p a/b && ln -s b a/link && echo x >a/b/c && chmod 640 a/b/c && mv a/b/c a/b/d"
    ));
    assert_eq!(fs::read_link(dir.join("a/link")).unwrap(), Path::new("b"));
    assert_eq!(host(&["stat", "-c", "%a", &dir.join("a/b/d").to_string_lossy()]).trim(), "640");
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
