//! The host itself, and the harness: what a failure of other tests would be mistaken for.

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::thread;

use inlay_tests::harness::HostState;

/// `KVM_GET_API_VERSION`, which has answered 12 since Linux 2.6.22 (api.rst, 4.1).
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;

#[test]
fn kvm_answers() {
    let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
    // SAFETY: the request takes no argument and touches no memory.
    let version = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&kvm), KVM_GET_API_VERSION, 0) };
    assert_eq!(version, 12);
}

#[test]
fn cgroup_controllers_are_delegated() {
    let control = fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control").unwrap();
    for controller in ["cpu", "memory", "pids"] {
        assert!(control.split_whitespace().any(|name| name == controller), "{control}");
    }
}

#[test]
fn the_comparer_sees_what_is_left_behind() {
    let before = HostState::take();
    let mut sleeper = Command::new("sleep").arg("987").stdin(Stdio::null()).spawn().unwrap();
    // The parent goes on when exec has replaced the memory, a moment before the arguments are in it.
    while fs::read(format!("/proc/{}/cmdline", sleeper.id())).unwrap().is_empty() {
        thread::yield_now();
    }
    fs::create_dir_all("/run/inlay/sandboxes/left").unwrap();
    fs::create_dir("/sys/fs/cgroup/left").unwrap();
    let left = HostState::take().left_since(&before);
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    fs::remove_dir_all("/run/inlay").unwrap();
    fs::remove_dir("/sys/fs/cgroup/left").unwrap();
    for thing in ["process: sleep 987", "directory: /run/inlay/sandboxes/left", "cgroup: /sys/fs/cgroup/left"] {
        assert!(left.contains(thing), "{left}");
    }
    HostState::assert_settles(&before);
}
