//! What goes wrong: broken parts, a host without KVM, a killed shim. Each test ends with nothing left on the host, which `play` sees to.

use std::fs;
use std::path::{Path, PathBuf};

use guest_image::archive;
use guest_image::manifest::Compression;
use guest_image::tree::{Node, Tree};
use inlay_tests::harness::{HOME, Output, Parts, Processes, Scene, configure};
use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

crate::for_inlay!(
    names_a_missing_kernel,
    names_a_missing_initrd,
    names_a_corrupt_kernel,
    shows_the_console_of_a_kernel_that_panics,
    shows_the_console_when_a_corrupt_initrd_ends_in_a_panic,
    gives_up_on_an_agent_that_never_answers,
    names_a_missing_kvm,
    names_a_kvm_that_may_not_be_opened,
    cleans_up_after_a_killed_shim,
);

/// Major and minor number of /dev/kvm: misc devices are 10, KVM's minor is fixed (devices.txt).
const KVM: (u64, u64) = (10, 232);

/// How a start that ends in a panic of the guest's kernel is told: the kernel's own words, and the console.
const PANICKED: &[&str] = &["The guest's kernel has panicked: VFS: Unable to mount root fs", "Its console ends with:"];

/// A start that fails for the reason `why`: not in silence, and not by a deadline.
#[track_caller]
fn fails(scene: &Scene, why: &[&str]) -> Output {
    let output = scene.run(&["true"]).failed();
    for part in why {
        assert!(output.stderr.contains(part), "no {part:?} in {output:#?}");
    }
    output
}

/// A file for the test, away from where leftovers are looked for.
fn file(name: &str, content: &[u8]) -> PathBuf {
    let path = Path::new(HOME).join(name);
    fs::write(&path, content).unwrap();
    path
}

fn with_kernel(scene: &Scene, kernel: PathBuf) {
    configure(&Parts { kernel, ..scene.parts.clone() }.configuration("")).unwrap();
}

fn with_initrd(scene: &Scene, initrd: PathBuf, agent: &str) {
    let text = Parts { initrd, ..scene.parts.clone() }.configuration("");
    configure(&format!("{text}\n[agent.kata]\n{agent}\n")).unwrap();
}

fn names_a_missing_kernel(scene: &Scene) {
    with_kernel(scene, "/no/such/vmlinux".into());
    fails(scene, &["/no/such/vmlinux", "No such file or directory"]);
}

fn names_a_missing_initrd(scene: &Scene) {
    with_initrd(scene, "/no/such/initrd".into(), "");
    fails(scene, &["/no/such/initrd", "No such file or directory"]);
}

fn names_a_corrupt_kernel(scene: &Scene) {
    with_kernel(scene, file("vmlinux.corrupt", &[0x5a; 8192]));
    fails(scene, &["vmlinux.corrupt"]);
}

fn shows_the_console_of_a_kernel_that_panics(scene: &Scene) {
    // An archive without /init, and no root file system to go on with.
    with_initrd(scene, file("empty.initrd", &archive::build(&Tree::default(), Compression::None).unwrap()), "");
    fails(scene, PANICKED);
}

fn shows_the_console_when_a_corrupt_initrd_ends_in_a_panic(scene: &Scene) {
    with_initrd(scene, file("corrupt.initrd", &[0x5a; 8192]), "");
    fails(scene, PANICKED);
}

fn gives_up_on_an_agent_that_never_answers(scene: &Scene) {
    let script = "#!/bin/busybox sh\n/bin/busybox mount -t devtmpfs dev /dev\necho asleep > /dev/ttyS0\nexec /bin/busybox sleep 1000\n";
    let mut tree = Tree::default();
    tree.insert(Path::new("/dev"), Node::Directory, "test").unwrap();
    let contents = fs::read("/bin/busybox").unwrap();
    tree.insert(Path::new("/bin/busybox"), Node::File { mode: 0o755, contents }, "test").unwrap();
    tree.insert(Path::new("/init"), Node::File { mode: 0o755, contents: script.into() }, "test").unwrap();
    let initrd = archive::build(&tree, Compression::None).unwrap();
    with_initrd(scene, file("asleep.initrd", &initrd), "reconnect_timeout_ms = 15000");
    let output = fails(scene, &["asleep"]);
    assert!(output.wall.as_secs() >= 15, "{output:?}");
}

fn names_a_missing_kvm(scene: &Scene) {
    fs::rename("/dev/kvm", "/dev/kvm.away").unwrap();
    let output = scene.run(&["true"]);
    fs::rename("/dev/kvm.away", "/dev/kvm").unwrap();
    let output = output.failed();
    assert!(output.stderr.contains("/dev/kvm") && output.stderr.contains("No such file or directory"), "{output:?}");
}

/// A device on a file system mounted `nodev` may not be opened even by root.
fn names_a_kvm_that_may_not_be_opened(scene: &Scene) {
    let dir = Path::new(HOME).join("nodev");
    fs::create_dir(&dir).unwrap();
    mount(Some("tmpfs"), &dir, Some("tmpfs"), MsFlags::MS_NODEV, None::<&str>).unwrap();
    let node = dir.join("kvm");
    mknod(&node, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(KVM.0, KVM.1)).unwrap();
    mount(Some(&node), "/dev/kvm", None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    let output = scene.run(&["true"]);
    umount("/dev/kvm").unwrap();
    umount(&dir).unwrap();
    fs::remove_dir(&dir).unwrap();
    let output = output.failed();
    assert!(output.stderr.contains("/dev/kvm") && output.stderr.contains("Permission denied"), "{output:?}");
}

/// containerd calls `delete` when a shim's connection breaks.
fn cleans_up_after_a_killed_shim(scene: &Scene) {
    let id = scene.start(&["sleep", "1000"]);
    let Processes { shim, .. } = Processes::of(&id);
    kill(shim, Signal::SIGKILL).unwrap();
    scene.wait_for("containerd to notice", || !scene.state_of(&id).contains("RUNNING"));
    scene.ctr(&["task", "delete", "--force", &id]).ok_or_missing();
    scene.ctr(&["container", "delete", &id]).ok();
    remove_fifos(&id);
}

/// The FIFOs of a task belong to the client that made them, `ctr`, which removes them when it deletes a task. Here
/// containerd has deleted it: they stay. (So they do with runc, whose killed shim leaves its socket besides.)
pub fn remove_fifos(id: &str) {
    for dir in fs::read_dir("/run/containerd/fifo").unwrap().flatten() {
        if dir.path().join(format!("{id}-stdout")).exists() {
            fs::remove_dir_all(dir.path()).unwrap();
        }
    }
}
