//! What a guest's accesses lead to.

mod support;

use std::io::{Read, Write};

use support::{Code, EXIT_PORT, config, console, run, wait};
use vmm::{ExitReason, Machine, RngConfig, SerialConfig};

const SHUTDOWN: u8 = 4;

/// `shr eax, 8`
const NEXT_BYTE: [u8; 3] = [0xc1, 0xe8, 0x08];
/// `mov dx, 0x3f8; out dx, al`
const PRINT_AL: [u8; 5] = [0x66, 0xba, 0xf8, 0x03, 0xee];

/// `mov ebx, address; mov eax, [ebx]`, then prints the four bytes.
fn print_word_at(code: Code, address: u32) -> Code {
    let code = code.bytes(&[0xbb]).bytes(&address.to_le_bytes()).bytes(&[0x8b, 0x03]);
    (0..4).fold(code, |code, _| code.bytes(&PRINT_AL).bytes(&NEXT_BYTE))
}

#[test]
fn virtio_devices_answer_in_their_windows() {
    need_kvm!();
    // Magic of the first device and of the second, and where no device is.
    let code = [0xd000_0000, 0xd000_1000, 0xd000_2000].into_iter().fold(Code::new(), print_word_at);
    let kernel = code.out(EXIT_PORT, SHUTDOWN).halt().pvh();
    let mut config = config(kernel.path());
    let file = tempfile::tempfile().expect("file");
    file.set_len(4096).expect("size");
    config.blk.push(vmm::BlkConfig { read_only: true, ..vmm::BlkConfig::new("drive", file) });
    config.rng = Some(RngConfig::default());
    let machine = Machine::build(config).expect("build");
    machine.start().expect("start");
    assert_eq!(wait(&machine), ExitReason::Shutdown);
    assert_eq!(machine.console_tail(), b"virtvirt\xff\xff\xff\xff");
}

#[test]
fn a_drive_is_read_through_its_queue() {
    need_kvm!();
    // Where the driver keeps its rings, its request and its data.
    const DESCRIPTORS: u32 = 0x20_0000;
    const AVAILABLE: u32 = 0x20_1000;
    const USED: u32 = 0x20_2000;
    const HEADER: u32 = 0x20_3000;
    const DATA: u32 = 0x20_4000;
    const STATUS: u32 = 0x20_5000;
    // A descriptor is an address, a length, and flags (1 next, 2 written by the device) with the next one's index.
    let chain = [(HEADER, 16, 1 | 1 << 16), (DATA, 512, 3 | 2 << 16), (STATUS, 1, 2)];
    let mut code = Code::new();
    for (at, (address, length, flags)) in (DESCRIPTORS..).step_by(16).zip(chain) {
        code = code.store(at, address).store(at + 8, length).store(at + 12, flags);
    }
    // One entry: descriptor 0. The header stays zero: read, from sector 0.
    code = code.store(AVAILABLE, 1 << 16).store(STATUS, 0xee);
    // The driver's way to DRIVER_OK (virtio 1.2 section 3.1.1), by register and value; then the notification.
    let registers = [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 0xb),
        (0x30, 0),
        (0x38, 8),
        (0x80, DESCRIPTORS),
        (0x90, AVAILABLE),
        (0xa0, USED),
        (0x44, 1),
        (0x70, 0xf),
        (0x50, 0),
    ];
    code = registers.into_iter().fold(code, |code, (register, value)| code.store(0xd000_0000 + register, value));
    code = code.wait_for(USED + 2, 1).print_memory(DATA, 5).print_memory(STATUS, 1);
    let kernel = code.out(EXIT_PORT, SHUTDOWN).halt().pvh();

    let mut file = tempfile::tempfile().expect("file");
    file.write_all(b"disks").expect("write");
    file.set_len(4096).expect("size");
    let mut config = config(kernel.path());
    config.blk.push(vmm::BlkConfig { read_only: true, ..vmm::BlkConfig::new("drive", file) });
    let machine = Machine::build(config).expect("build");
    machine.start().expect("start");
    assert_eq!(wait(&machine), ExitReason::Shutdown);
    assert_eq!(machine.console_tail(), b"disks\0");
}

#[test]
fn string_output_arrives_byte_by_byte() {
    need_kvm!();
    let code = Code::new().print_memory(0x10_1000, 5).out(EXIT_PORT, SHUTDOWN).halt();
    let mut image = code.as_bytes().to_vec();
    image.resize(0x1000, 0);
    image.extend(b"bytes");
    let kernel = support::file(&support::elf(&image, true));
    let (machine, reason) = run(kernel.path());
    assert_eq!(reason, ExitReason::Shutdown);
    assert_eq!(console(&machine), "bytes");
}

#[test]
fn ports_without_a_device_float() {
    need_kvm!();
    // mov dx, 0x1234; in al, dx
    let code = Code::new().bytes(&[0x66, 0xba, 0x34, 0x12, 0xec]).bytes(&PRINT_AL);
    let (machine, _) = run(code.out(0x1234, 1).out(EXIT_PORT, SHUTDOWN).halt().flat().path());
    assert_eq!(machine.console_tail(), [0xff]);
}

#[test]
fn what_kvm_cannot_run_ends_the_machine_with_its_reason() {
    need_kvm!();
    // mov eax, 0xc0000000; jmp eax: there is no memory to run.
    let kernel = Code::new().bytes(&[0xb8, 0, 0, 0, 0xc0, 0xff, 0xe0]).pvh();
    let (_, reason) = run(kernel.path());
    assert!(matches!(reason, ExitReason::VcpuError { vcpu: 0, .. }), "{reason:?}");
    assert!(reason.to_string().starts_with("vCPU 0 has stopped: "), "{reason}");
}

#[test]
fn the_console_goes_to_a_file_as_well() {
    need_kvm!();
    let kernel = Code::new().print("a line\nand more").out(EXIT_PORT, SHUTDOWN).halt().flat();
    let output = tempfile::NamedTempFile::new().expect("file");
    let mut config = config(kernel.path());
    config.serial = SerialConfig::File(output.reopen().expect("open"));
    let machine = Machine::build(config).expect("build");
    machine.start().expect("start");
    wait(&machine);
    drop(machine);
    let mut text = String::new();
    output.reopen().expect("open").read_to_string(&mut text).expect("read");
    assert_eq!(text, "a line\nand more");
}
