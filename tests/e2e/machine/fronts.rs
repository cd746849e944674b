//! The command line as others write it, and as our own documents do.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use inlay_tests::harness::standalone::{Rig, host};
use serde_json::json;

use super::directories::Backend;

crate::on_a_rig!(starts_with_the_command_line_of_kata, leads_through_the_tour);

/// `TUNSETIFF`, and a tap without packet information, with virtio-net's headers (linux/if_tun.h).
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_TAP: libc::c_short = 0x0002;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;

/// A queue of the interface `name`, as kata's runtime opens it for the machine.
fn open_tap(name: &str) -> File {
    let tap = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: zeros are a valid structure of names and numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    // SAFETY: the kernel reads and writes one `ifreq`, which is what `request` is.
    let made = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) };
    assert_eq!(made, 0, "{}", io::Error::last_os_error());
    tap
}

/// What kata's Go runtime runs in its debug mode, with descriptor 3 of vhost-vsock and 4 of a tap.
fn starts_with_the_command_line_of_kata(rig: &Rig) {
    let share = rig.path("share");
    fs::create_dir(&share).unwrap();
    fs::write(share.join("file"), "shared").unwrap();
    let socket = rig.path("virtiofsd");
    let _backend = Backend::virtiofsd(&socket, &share);
    let image = rig.file("image", 1 << 20);
    let parts = rig.parts();

    let mut command = Command::new(&parts.shim);
    command.arg0("/usr/bin/stratovirt").env("STRATOVIRT_LOG_LEVEL", "info");
    command.args(["-name", "sandbox-0", "-uuid", "7d8f3a52-64f0-4d2b-8c1a-3f27ab9d3c11", "-smp", "1", "-m", "256"]);
    command.arg("-kernel").arg(&parts.kernel).args(["-append", KERNEL_PARAMETERS]);
    command.args(["-qmp", "unix:qmp.socket,server,nowait", "-D", "-disable-seccomp"]);
    command.args(["-machine", "type=microvm,dump-guest-core=off,mem-share=on"]);
    command.arg("-initrd").arg(&parts.tools);
    for (option, value) in [
        ("-object", "rng-random,id=objrng0,filename=/dev/urandom"),
        ("-device", "virtio-rng-device,rng=objrng0,id=virtio-rng0"),
        ("-device", "virtio-serial-device,id=virtio-serial0"),
        ("-chardev", "socket,id=charconsole0,path=console.socket,server,nowait"),
        ("-device", "virtconsole,chardev=charconsole0,id=virtio-console0,nr=0"),
        ("-drive", &format!("id=rootfs,file={},readonly=on,direct=off", image.display())),
        ("-device", "virtio-blk-device,drive=rootfs,id=virtio-blk0"),
        ("-device", "vhost-vsock-device,id=vsock-id,guest-cid=78,vhostfd=3"),
        ("-netdev", "tap,id=tap0_kata,fds=4"),
        ("-device", "virtio-net-device,netdev=tap0_kata,id=tap0_kata,mac=02:00:ca:fe:00:04"),
        ("-chardev", &format!("socket,id=virtio_fs,path={},server,nowait", socket.display())),
        ("-device", "vhost-user-fs-device,chardev=virtio_fs,tag=kataShared,id=virtio-fs0"),
    ] {
        command.args([option, value]);
    }
    let vsock = File::options().read(true).write(true).open("/dev/vhost-vsock").unwrap();
    let given = [(vsock.into_raw_fd(), 3), (open_tap("tap0_kata").into_raw_fd(), 4)];
    // SAFETY: dup2 and fcntl may be called between fork and exec; the descriptors are open, and neither is the other's place:
    // they were moved above both first.
    unsafe {
        command.pre_exec(move || {
            let high = given.map(|(fd, place)| (libc::fcntl(fd, libc::F_DUPFD, 64), place));
            for (fd, place) in high {
                if libc::dup2(fd, place) < 0 || libc::close(fd) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let vm = rig.boot(command, "console.socket", "qmp.socket");
    for (fd, _) in given {
        nix::unistd::close(fd).unwrap();
    }

    vm.sh("mkdir /mnt && mount -t virtiofs kataShared /mnt");
    assert_eq!(vm.sh("cat /mnt/file"), "shared");
    assert_eq!(vm.sh("cat /sys/class/net/eth0/address").trim(), "02:00:ca:fe:00:04");
    host(&["ip", "address", "add", "10.77.0.1/24", "dev", "tap0_kata"]);
    host(&["ip", "link", "set", "tap0_kata", "up"]);
    vm.sh("ip address add 10.77.0.2/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 10 10.77.0.1");
    let echo = vm.spawn("socat -u VSOCK-LISTEN:1024 STDOUT");
    let mut agent = inlay_tests::harness::standalone::vsock::connect(78, 1024, std::time::Duration::from_secs(30));
    io::Write::write_all(&mut agent, b"hello").unwrap();
    drop(agent);
    assert_eq!(vm.join(echo), "hello");

    // What the runtime says over QMP to add a container's block device and to take it away.
    let disk = rig.file("disk", 4 << 20);
    let file = json!({"driver": "file", "filename": disk.to_string_lossy(), "aio": "native"});
    vm.qmp("blockdev-add", json!({"node-name": "drive-1", "driver": "raw", "read-only": false, "file": file}));
    let device = json!({"id": "virtio-1", "driver": "virtio-blk-mmio", "drive": "drive-1", "addr": "1", "romfile": ""});
    vm.qmp("device_add", device);
    vm.sh("until [ $(cat /sys/block/vdb/size) = 8192 ]; do sleep 0.05; done");
    vm.qmp("device_del", json!({"id": "virtio-1"}));
    assert_eq!(vm.event("DEVICE_DELETED")["data"]["device"], "virtio-1");
    assert_eq!(vm.qmp("query-cpus", json!({})).as_array().unwrap().len(), 1);
    // Kata ends it by a signal.
    drop(vm);
}

/// Kata's parameters in debug mode; the guest's shell is on the console that they name.
const KERNEL_PARAMETERS: &str = "console=hvc0 reboot=k panic=1 net.ifnames=0 ramdom.trust_cpu=on pci=off iommu=off acpi=off \
                                 8250.nr_uarts=0 agent.log_vport=1025 agent.debug_console";

fn leads_through_the_tour(rig: &Rig) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("docs").join("tour.sh");
    let parts = rig.parts();
    let output = Command::new(script)
        .env("STRATOVIRT", format!("{} vm", parts.shim.display()))
        .env("KERNEL", &parts.kernel)
        .env("INITRD", &parts.tools)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    for words in ["written by the clone\n", "The clone counts on.", r#""status":"completed""#, "== The tour is over"] {
        assert!(said.contains(words), "{said}");
    }
    // What the clone wrote is not in the first machine's note.
    let first = said.split("== 5.").nth(1).unwrap();
    assert!(first.contains("written before the snapshot") && !first.contains("written by the clone"), "{said}");
}
