//! Machines that cannot be built say why, in a sentence that names what is wrong.

mod support;

use std::path::Path;

use devices::virtio::vhost_user::{Patience, VhostUserKind};
use support::{Code, chain, config};
use vmm::{Machine, MachineConfig, MemoryBacking, MemoryConfig, RngConfig, VhostUserConfig, VsockConfig};

fn refusal(config: MachineConfig) -> String {
    chain(&Machine::build(config).expect_err("refused"))
}

#[test]
fn a_missing_kernel_or_initrd_is_named() {
    need_kvm!();
    let text = refusal(config(Path::new("/nonexistent/vmlinux")));
    assert_eq!(
        text,
        "The machine cannot boot: The kernel image cannot be loaded: \
         Cannot open /nonexistent/vmlinux: No such file or directory (os error 2)"
    );
    let kernel = Code::new().spin().flat();
    let mut config = config(kernel.path());
    config.boot.initrd = Some("/nonexistent/initrd".into());
    let text = refusal(config);
    assert!(text.contains("The initrd cannot be loaded: Cannot open /nonexistent/initrd"), "{text}");
}

#[test]
fn a_corrupt_kernel_is_named_with_its_fault() {
    need_kvm!();
    let kernel = support::file(b"\x7fELF and then nothing of the kind");
    let text = refusal(config(kernel.path()));
    let path = kernel.path().display();
    assert_eq!(
        text,
        format!(
            "The machine cannot boot: The kernel image {path} cannot be booted: \
             Its ELF header ends at byte 64 but the file has only 33"
        )
    );
}

#[test]
fn impossible_numbers_are_refused() {
    let kernel = Code::new().spin().flat();
    for vcpus in [0, 255] {
        let text = refusal(MachineConfig { vcpus, ..config(kernel.path()) });
        assert_eq!(text, format!("A machine has 1 to 254 vCPUs, not {vcpus}"));
    }
    need_kvm!();
    for size in [0, 4097, 1 << 50] {
        let text = refusal(MachineConfig { memory: MemoryConfig::from_size(size), ..config(kernel.path()) });
        assert!(text.contains(&format!("A memory of {size} bytes is not possible")), "{text}");
    }
}

#[test]
fn a_command_line_has_a_limit() {
    need_kvm!();
    let kernel = Code::new().spin().flat();
    let with_length = |length| {
        let mut config = config(kernel.path());
        config.boot.cmdline = "x".repeat(length);
        config
    };
    Machine::build(with_length(2047)).expect("the longest command line");
    let text = refusal(with_length(2048));
    assert!(text.contains("2047 printable ASCII characters"), "{text}");
    let mut crowded = with_length(2040);
    crowded.rng = Some(RngConfig::default());
    let text = refusal(crowded);
    assert!(text.contains("no room for the address of a device"), "{text}");
}

#[test]
fn a_device_that_cannot_be_made_says_why() {
    need_kvm!();
    let kernel = Code::new().spin().flat();
    let mut config = config(kernel.path());
    config.vsock = Some(VsockConfig { guest_cid: 2, uds_path: None });
    let text = refusal(config);
    assert!(text.contains("A device cannot be attached: Context id 2"), "{text}");
}

#[test]
fn more_devices_than_interrupt_lines_are_refused() {
    need_kvm!();
    let kernel = Code::new().spin().flat();
    let with_drives = |count| {
        let mut config = config(kernel.path());
        for index in 0..count {
            let file = tempfile::tempfile().expect("file");
            file.set_len(4096).expect("size");
            let id = format!("drive{index}");
            config.blk.push(vmm::BlkConfig::new(id, file));
        }
        config
    };
    Machine::build(with_drives(16)).expect("as many as there are lines");
    let text = refusal(with_drives(17));
    assert!(text.contains("more devices than the 16 interrupt lines"), "{text}");
}

#[test]
fn a_vhost_user_device_needs_shared_memory_and_a_backend() {
    need_kvm!();
    let kernel = Code::new().spin().flat();
    let with = |backing| {
        let mut config = config(kernel.path());
        config.memory.backing = backing;
        config.vhost_user = vec![VhostUserConfig {
            id: "disk".into(),
            socket: "/nonexistent/socket".into(),
            kind: VhostUserKind::Blk,
            num_queues: 1,
            queue_size: 128,
            patience: Patience::default(),
        }];
        refusal(config)
    };
    let text = with(MemoryBacking::Private);
    assert_eq!(
        text,
        "A device cannot be attached: Device disk cannot be served by a vhost-user backend: \
         Guest memory at 0x0 is not shared: a vhost-user backend cannot see it"
    );
    let text = with(MemoryBacking::Shared);
    assert!(text.contains("Cannot connect to the vhost-user backend at /nonexistent/socket: No such file"), "{text}");
}
