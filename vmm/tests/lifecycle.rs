//! Pausing, and several processors.

mod support;

use std::fs;
use std::path::Path;

use devices::virtio::fs::CachePolicy;
use support::{Code, SERIAL_PORT, config, console, wait};
use vmm::{ExitReason, FsConfig, Machine};

const SHUTDOWN: u8 = 4;

/// `mov dx, 0x3f8; mov al, '.'; out dx, al; jmp -1`: prints without end.
fn chatter() -> Code {
    Code::new().out(SERIAL_PORT, b'.').bytes(&[0xeb, 0xfd])
}

/// Waits until the guest has printed something more than `before`.
fn printed_more_than(machine: &Machine, before: usize) -> bool {
    (0..1000).any(|_| {
        std::thread::yield_now();
        machine.console_tail().len() > before || {
            std::thread::sleep(std::time::Duration::from_millis(5));
            false
        }
    })
}

#[test]
fn a_paused_guest_does_nothing_and_goes_on_after() {
    need_kvm!();
    let kernel = chatter().flat();
    let machine = Machine::build(config(kernel.path())).expect("build");
    machine.start().expect("start");
    for _ in 0..5 {
        let before = machine.console_tail().len();
        assert!(printed_more_than(&machine, before));
        machine.pause().expect("pause");
        machine.pause().expect("pause again");
        let paused = machine.console_tail();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(machine.console_tail().len(), paused.len());
        machine.resume().expect("resume");
    }
    machine.pause().expect("pause");
    machine.stop();
    assert_eq!(machine.wait(), ExitReason::Stopped);
}

#[test]
fn processors_have_threads_from_the_build_on() {
    need_kvm!();
    let kernel = Code::new().halt().flat();
    let mut config = config(kernel.path());
    config.vcpus = 3;
    let machine = Machine::build(config).expect("build");
    let ids = machine.vcpu_thread_ids();
    assert_eq!(ids.len(), 3);
    for (index, id) in ids.iter().enumerate() {
        let name = fs::read_to_string(format!("/proc/self/task/{id}/comm")).expect("thread");
        assert_eq!(name.trim_end(), format!("vcpu{index}"));
    }
    machine.start().expect("start");
    assert_eq!(machine.vcpu_thread_ids(), ids);
    machine.pause().expect("pause");
    machine.resume().expect("resume");
    machine.stop();
}

#[test]
fn a_second_processor_is_woken_by_the_first() {
    need_kvm!();
    // What the second one runs, in 16-bit mode: mov al, 'A'; mov dx, 0x3f8; out dx, al;
    // mov al, 4; mov dx, 0x505; out dx, al; cli; hlt.
    let trampoline = [0xb0, b'A', 0xba, 0xf8, 0x03, 0xee, 0xb0, SHUTDOWN, 0xba, 0x05, 0x05, 0xee, 0xfa, 0xf4];
    let mut code = Code::new();
    for (address, word) in (0x8000..).step_by(4).zip(trampoline.chunks(4)) {
        let mut bytes = [0; 4];
        bytes[..word.len()].copy_from_slice(word);
        code = code.store(address, u32::from_le_bytes(bytes));
    }
    // Software-enable the local APIC, then INIT and SIPI (vector 8: 0x8000) to APIC 1.
    code = code.store(0xfee0_00f0, 0x1ff);
    for command in [0x4500, 0x4608] {
        code = code.store(0xfee0_0310, 1 << 24);
        code = code.store(0xfee0_0300, command);
    }
    let kernel = code.halt().pvh();
    let mut config = config(kernel.path());
    config.vcpus = 2;
    let machine = Machine::build(config).expect("build");
    machine.start().expect("start");
    assert_eq!(wait(&machine), ExitReason::Shutdown);
    assert_eq!(console(&machine), "A");
}

#[test]
fn shared_directories_let_go_of_mounts_but_not_of_themselves() {
    need_kvm!();
    let kernel = Code::new().halt().flat();
    let dir = tempfile::tempdir().expect("directory");
    let mut config = config(kernel.path());
    config.fs = vec![FsConfig {
        tag: "shared".into(),
        shared_dir: dir.path().into(),
        cache: CachePolicy::Auto,
        num_request_queues: 2,
        queue_size: 128,
        writeback: false,
        workers: 2,
        xattr: true,
        posix_locks: false,
    }];
    let machine = Machine::build(config).expect("build");
    machine.start().expect("start");
    let errno = |path: &Path| machine.release_mount(path).err().and_then(|error| error.raw_os_error());
    assert_eq!(errno(Path::new("/proc")), None);
    assert_eq!(errno(dir.path()), Some(libc::EINVAL));
    assert_eq!(errno(&dir.path().join("missing")), Some(libc::ENOENT));
    machine.stop();
}

#[test]
fn a_machine_can_be_shared_between_threads() {
    fn shareable<T: Send + Sync>() {}
    shareable::<Machine>();
}
