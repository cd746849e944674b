//! What a sandbox's processes may do: the helper what mounting takes, the shim what files take, and no thread more than
//! its role.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use inlay_tests::harness::{HOME, Output, Processes, Scene, Thread};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use serde_json::{Value, json};

crate::for_inlay!(
    leaves_no_thread_a_privilege,
    adds_a_container_while_the_guest_runs,
    lives_on_without_its_helper,
    ends_when_a_thread_leaves_its_role,
);

/// Bits of capabilities (linux/capability.h) that the threads of the file system have: CHOWN, DAC_OVERRIDE,
/// DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
const FILES: u64 = 0b1_1111 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31;
const SYS_ADMIN: u64 = 1 << 21;
/// As proc_pid_status(5) has it.
const FILTERED: &str = "2";

fn leaves_no_thread_a_privilege(scene: &Scene) {
    let id = scene.start(&["sleep", "1000"]);
    let Processes { shim, helper } = Processes::of(&id);
    let threads = Thread::all(shim);
    for name in ["vcpu0", "io", "fs", "api"] {
        assert!(threads.iter().any(|thread| thread.name == name), "no thread {name} in {threads:?}");
    }
    for thread in &threads {
        assert_eq!((thread.status("Seccomp"), thread.status("NoNewPrivs")), (FILTERED, "1"), "{thread:?}");
        // The kernel's own worker in the process, from 6.9 on, is a copy of the thread that makes machines.
        let files = thread.id == shim || thread.name.starts_with("fs") || thread.name.starts_with("kvm-nx");
        let allowed = if files { FILES } else { 0 };
        assert_eq!(thread.capabilities() & !allowed, 0, "{thread:?}");
    }
    let helper = Thread::all(helper);
    assert_eq!(helper.len(), 1, "{helper:?}");
    assert_ne!(helper[0].capabilities() & SYS_ADMIN, 0, "{helper:?}");
    assert_eq!(helper[0].status("Seccomp"), FILTERED);
    println!(
        "the shim has {} threads; its helper's own memory is {} KiB",
        threads.len(),
        own_memory(helper[0].id.as_raw())
    );
    scene.remove(&id);
}

fn own_memory(pid: i32) -> u64 {
    let process = u32::try_from(pid).unwrap();
    inlay_tests::harness::Pss::of(process).unwrap().own
}

/// A root file system of a program alone, for a container without a snapshot.
fn directory_with_busybox() -> PathBuf {
    let root = Path::new(HOME).join("member");
    let bin = root.join("bin");
    fs::create_dir_all(&bin).unwrap();
    for name in ["proc", "sys", "dev", "etc", "run", "tmp"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    for name in ["cat", "echo", "sh", "sleep"] {
        fs::copy("/bin/busybox", bin.join(name)).unwrap();
        fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    root
}

/// Runs a container in the sandbox of another, as a pod has them, to its end. Its specification is the other's but for what
/// `adapt` does to it.
pub fn run_member(scene: &Scene, sandbox: &str, args: &[&str], adapt: impl FnOnce(&mut Value)) -> Output {
    let information = scene.ctr(&["container", "info", sandbox]).ok().stdout;
    let mut specification = serde_json::from_str::<Value>(&information).unwrap()["Spec"].take();
    let id = scene.id("member");
    specification["annotations"] = json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": sandbox,
    });
    specification["process"]["args"] = json!(args);
    specification["root"]["path"] = json!(directory_with_busybox());
    specification["linux"]["cgroupsPath"] = json!(format!("/default/{id}"));
    adapt(&mut specification);
    let path = Path::new(HOME).join("member.json");
    fs::write(&path, specification.to_string()).unwrap();
    let output =
        scene.ctr(&["run", "--rm", "--runtime", "io.containerd.inlay.v2", "--config", path.to_str().unwrap(), &id]);
    fs::remove_dir_all(Path::new(HOME).join("member")).unwrap();
    output
}

fn adds_a_container_while_the_guest_runs(scene: &Scene) {
    let id = scene.start(&["sleep", "1000"]);
    let data = Path::new(HOME).join("volume");
    fs::write(&data, "from the host\n").unwrap();
    let volume = json!({"destination": "/etc/data", "type": "bind", "source": data, "options": ["rbind", "ro"]});
    let with_volume = |spec: &mut Value| spec["mounts"].as_array_mut().unwrap().push(volume);
    let output = run_member(scene, &id, &["/bin/echo", "member"], with_volume).ok();
    assert_eq!(output.stdout, "member\n");
    assert!(scene.state_of(&id).contains("RUNNING"));
    scene.remove(&id);
    fs::remove_file(data).unwrap();
}

fn lives_on_without_its_helper(scene: &Scene) {
    let id = scene.start(&["sleep", "1000"]);
    kill(Processes::of(&id).helper, Signal::SIGKILL).unwrap();
    scene.wait_for("the shim to notice", || scene.log().contains("The helper process has ended"));
    let output = run_member(scene, &id, &["/bin/echo", "member"], |_| {}).failed();
    assert!(output.stderr.contains("helper process has ended"), "{output:?}");
    assert_eq!(scene.exec(&id, &["echo", "alive"]).ok().stdout, "alive\n");
    scene.remove(&id);
}

/// As if the guest had taken over a processor's thread: it makes a call that its role does not have.
fn ends_when_a_thread_leaves_its_role(scene: &Scene) {
    /// Bytes of the instruction `syscall`.
    const SYSCALL: u64 = 2;
    let id = scene.start(&["sleep", "1000"]);
    let Processes { shim, .. } = Processes::of(&id);
    let processor = Thread::all(shim).into_iter().find(|thread| thread.name == "vcpu0").unwrap().id;
    ptrace::seize(processor, ptrace::Options::empty()).unwrap();
    ptrace::interrupt(processor).unwrap();
    waitpid(processor, Some(nix::sys::wait::WaitPidFlag::__WALL)).unwrap();
    // It stands behind the call that enters the guest.
    let mut registers = ptrace::getregs(processor).unwrap();
    registers.rip -= SYSCALL;
    registers.rax = u64::try_from(libc::SYS_umount2).unwrap();
    registers.orig_rax = u64::MAX;
    (registers.rdi, registers.rsi) = (0x10, 0x20);
    ptrace::setregs(processor, registers).unwrap();
    ptrace::detach(processor, None).unwrap();
    scene.wait_for("containerd to notice", || !scene.state_of(&id).contains("RUNNING"));
    let log = scene.log();
    assert!(log.contains("seccomp: the thread role vcpu may not call umount2(0x10, 0x20"), "{log}");
    scene.ctr(&["task", "delete", "--force", &id]).ok_or_missing();
    scene.ctr(&["container", "delete", &id]).ok();
    crate::faults::remove_fifos(&id);
}
