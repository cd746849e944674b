//! Devices that give memory and take it, and a console, with guests of a few bytes.

mod support;

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use support::virtio::{
    ABOVE, BLOCK, LongMode, PAGE, PLUG, REQUEST, RESPONSE, SEEN, UNPLUG, WINDOW, bring_up, first_block, request,
    see_above,
};
use support::{Code, EXIT_PORT, config, wait};
use vmm::{
    BalloonConfig, ConsoleConfig, ExitReason, Machine, MachineConfig, MemConfig, PmemConfig, PortConfig, PortEnd,
    RngConfig,
};

const SHUTDOWN: u8 = 4;

fn run(code: Code, configure: impl FnOnce(&mut MachineConfig)) -> (Machine, ExitReason) {
    let kernel = code.out(EXIT_PORT, SHUTDOWN).halt().flat();
    let mut config = config(kernel.path());
    configure(&mut config);
    let machine = Machine::build(config).expect("build");
    machine.start().expect("start");
    let reason = wait(&machine);
    (machine, reason)
}

#[test]
fn a_page_in_the_balloon_is_gone_and_comes_back_empty() {
    need_kvm!();
    let number = PAGE >> 12;
    // The page, its neighbour, a window of a device, and what no machine has.
    let pages = [number, number, WINDOW >> 12, u32::MAX];
    let mut code = bring_up(see_above(), 0, 0, &[0, 1]).put(PAGE, 0x6567_6170).put(PAGE + 0x1000, 0x6567_6170);
    for (index, page) in (0..).zip(pages) {
        code = code.put(REQUEST + 4 * index, page);
    }
    code = request(code, 0, 0, 0, &[(REQUEST.into(), 16, false)]).print_memory(PAGE, 4).print_memory(PAGE + 0x1000, 4);
    // It tells the host how large the balloon is, takes the page back and uses it.
    code = code.put(WINDOW + 0x104, 1).put(PAGE, 0x6b63_6162).print_memory(PAGE, 4);
    let (machine, reason) = run(code, |config| {
        config.balloon = Some(BalloonConfig { target: 4096, ..Default::default() });
    });
    assert_eq!(reason, ExitReason::Shutdown);
    assert_eq!(machine.console_tail(), b"\0\0\0\0pageback");
    let balloon = machine.balloon().expect("a balloon");
    assert_eq!((balloon.target(), balloon.actual(), balloon.memory()), (4096, 4096, 128 << 20));
}

#[test]
fn a_console_carries_text_both_ways() {
    need_kvm!();
    let (mut ours, theirs) = UnixStream::pair().expect("pair");
    std::io::Write::write_all(&mut ours, b"input").expect("write");
    let code = bring_up(see_above(), 0, 0, &[0, 1]).put(REQUEST, u32::from_le_bytes(*b"text"));
    let code = request(code, 0, 1, 0, &[(REQUEST.into(), 4, false)]);
    let code = request(code, 0, 0, 0, &[(RESPONSE.into(), 64, true)]).print_memory(RESPONSE, 5);
    let (machine, reason) = run(code, |config| {
        let input = std::fs::File::from(OwnedFd::from(theirs));
        let output = input.try_clone().expect("clone");
        let host = PortEnd::Streams { input: Some(input), output: Some(output) };
        let port = PortConfig { number: 0, console: true, name: None, host };
        config.console = Some(ConsoleConfig { ports: vec![port] });
    });
    assert_eq!(reason, ExitReason::Shutdown);
    assert_eq!(machine.console_tail(), b"input");
    let mut text = [0; 4];
    ours.read_exact(&mut text).expect("read");
    assert_eq!(&text, b"text");
}

fn pluggable(config: &mut MachineConfig) {
    config.pluggable = Some(MemConfig { size: 64 * BLOCK, block_size: BLOCK, requested: BLOCK, node: 0 });
}

#[test]
fn a_plugged_block_is_memory_and_comes_back_empty() {
    need_kvm!();
    let code = bring_up(see_above(), 0, 2, &[0]);
    let code = first_block(code, 0, 0, PLUG).put(SEEN, 0x6b63_6f6c).print_memory(SEEN, 4);
    let code = first_block(code, 0, 1, UNPLUG);
    let code = first_block(code, 0, 2, PLUG).print_memory(SEEN, 4);
    let (machine, reason) = run(code, pluggable);
    assert_eq!(reason, ExitReason::Shutdown);
    assert_eq!(machine.console_tail(), b"lock\0\0\0\0");
    let memory = machine.pluggable_memory().expect("memory to be plugged");
    assert_eq!((memory.plugged(), memory.requested(), memory.address()), (BLOCK, BLOCK, ABOVE));
}

#[test]
fn a_block_that_is_not_plugged_cannot_be_read() {
    need_kvm!();
    // mov ebx, SEEN; mov eax, [rbx]; then four times mov dx, 0x3f8; out dx, al; shr eax, 8
    let look = |code: Code| {
        let code = code.bytes(&[0xbb]).bytes(&SEEN.to_le_bytes()).bytes(&[0x8b, 0x03]);
        (0..4).fold(code, |code, _| code.bytes(&[0x66, 0xba, 0xf8, 0x03, 0xee, 0xc1, 0xe8, 0x08]))
    };
    let never = look(bring_up(see_above(), 0, 2, &[0]));
    let code = first_block(bring_up(see_above(), 0, 2, &[0]), 0, 0, PLUG).put(SEEN, 0x6b63_6f6c).print("plugged ");
    let no_more = look(first_block(code, 0, 1, UNPLUG));
    for (code, console) in [(never, &b""[..]), (no_more, b"plugged ")] {
        let (machine, reason) = run(code, pluggable);
        // KVM gives up on the processor, or, where it runs without hardware support, takes the address for a device's.
        let floating = [console, &[0xff; 4]].concat();
        match reason {
            ExitReason::VcpuError { vcpu: 0, .. } => assert_eq!(machine.console_tail(), console),
            reason => assert_eq!((reason, machine.console_tail()), (ExitReason::Shutdown, floating)),
        }
    }
}

#[test]
fn what_a_device_wrote_to_a_block_before_it_was_plugged_is_gone() {
    need_kvm!();
    let code = bring_up(see_above(), 0, 0, &[0]);
    // Entropy into memory that the guest does not have.
    let code = request(code, 0, 0, 0, &[(ABOVE, 64, true)]);
    let code = first_block(bring_up(code, 1, 2, &[0]), 1, 0, PLUG).print_memory(SEEN, 64);
    let (machine, reason) = run(code, |config| {
        config.rng = Some(RngConfig::default());
        pluggable(config);
    });
    assert_eq!(reason, ExitReason::Shutdown);
    assert_eq!(machine.console_tail(), [0; 64]);
}

fn pmem(text: &str, read_only: bool) -> (PmemConfig, tempfile::NamedTempFile) {
    let named = support::file(text.as_bytes());
    let file = std::fs::File::options().read(true).write(!read_only).open(named.path()).expect("open");
    (PmemConfig { id: "pmem".into(), file, read_only }, named)
}

#[test]
fn a_write_to_read_only_persistent_memory_changes_nothing() {
    need_kvm!();
    let (config, file) = pmem("image of a root", true);
    let code = bring_up(see_above(), 0, 0, &[0]).put(SEEN, 0x6b63_6168).print_memory(SEEN, 5);
    // A flush of nothing is done; past the end of the file there are zeros, which cannot be written either.
    let code = request(code.put(REQUEST, 0), 0, 0, 0, &[(REQUEST.into(), 4, false), (RESPONSE.into(), 4, true)]);
    let code = code.print_memory(RESPONSE, 4).put(SEEN + 0x1000, 1).print_memory(SEEN + 0x1000, 4);
    let (machine, reason) = run(code, |machine| machine.pmem.push(config));
    assert_eq!(reason, ExitReason::Shutdown);
    assert_eq!(machine.console_tail(), b"image\0\0\0\0\0\0\0\0");
    assert_eq!(std::fs::read(file.path()).expect("read"), b"image of a root");
}

#[test]
fn persistent_memory_is_its_file() {
    need_kvm!();
    let (config, file) = pmem("text of a file", false);
    let code = bring_up(see_above(), 0, 0, &[0]).print_memory(SEEN, 4).put(SEEN, 0x6b6f_6f62);
    let code = request(code.put(REQUEST, 0), 0, 0, 0, &[(REQUEST.into(), 4, false), (RESPONSE.into(), 4, true)]);
    let (machine, reason) = run(code.print_memory(RESPONSE, 4), |machine| machine.pmem.push(config));
    assert_eq!(reason, ExitReason::Shutdown);
    assert_eq!(machine.console_tail(), b"text\0\0\0\0");
    assert_eq!(std::fs::read(file.path()).expect("read"), b"book of a file");
}

#[test]
fn an_empty_file_is_no_persistent_memory() {
    need_kvm!();
    let kernel = Code::new().halt().flat();
    let mut config = config(kernel.path());
    config.pmem.push(pmem("", true).0);
    let error = Machine::build(config).expect_err("no memory");
    assert_eq!(
        support::chain(&error),
        "A device cannot be attached: Persistent memory pmem has a file of 0 bytes, which cannot be mapped"
    );
}
