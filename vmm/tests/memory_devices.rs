//! Devices that give memory and take it, and a console, with guests of a few bytes.

mod support;

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use support::{Code, EXIT_PORT, config, wait};
use vmm::{
    BalloonConfig, ConsoleConfig, ExitReason, Machine, MachineConfig, MemConfig, PmemConfig, PortConfig, PortEnd,
    RngConfig,
};

const SHUTDOWN: u8 = 4;

/// The window of the first virtio device.
const WINDOW: u32 = 0xd000_0000;

/// What a guest in 64-bit mode does, with addresses below 4 GiB.
trait LongMode {
    /// `mov ebx, address; mov dword [rbx], value`
    fn put(self, address: u32, value: u32) -> Self;
    /// `mov ebx, address; cmp word [rbx], value; jne -7`
    fn await_word(self, address: u32, value: u16) -> Self;
}

impl LongMode for Code {
    fn put(self, address: u32, value: u32) -> Self {
        self.bytes(&[0xbb]).bytes(&address.to_le_bytes()).bytes(&[0xc7, 0x03]).bytes(&value.to_le_bytes())
    }

    fn await_word(self, address: u32, value: u16) -> Self {
        let code = self.bytes(&[0xbb]).bytes(&address.to_le_bytes()).bytes(&[0x66, 0x81, 0x3b]);
        code.bytes(&value.to_le_bytes()).bytes(&[0x75, 0xf9])
    }
}

/// The window of a virtio device by its place.
fn window(device: u32) -> u32 {
    WINDOW + device * 0x1000
}
/// Where the guest keeps what it shares with a device.
const RINGS: u32 = 0x20_0000;
const REQUEST: u32 = 0x28_0000;
const RESPONSE: u32 = 0x29_0000;
const PAGE: u32 = 0x30_0000;

/// A buffer of a request: address, length, whether the device writes it.
type Buffer = (u64, u32, bool);

fn rings(device: u32, queue: u32) -> (u32, u32, u32) {
    let base = RINGS + device * 0x2_0000 + queue * 0x1_0000;
    (base, base + 0x1000, base + 0x2000)
}

/// The driver's way to DRIVER_OK (virtio 1.2 section 3.1.1) with VERSION_1 and the given features.
fn bring_up(code: Code, device: u32, features: u32, queues: &[u32]) -> Code {
    let mut registers = vec![(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 0), (0x20, features), (0x24, 1), (0x20, 1)];
    registers.push((0x70, 0xb));
    for queue in queues {
        let (descriptors, available, used) = rings(device, *queue);
        let queue_registers = [(0x30, *queue), (0x38, 8), (0x80, descriptors), (0x90, available), (0xa0, used)];
        registers.extend(queue_registers.into_iter().chain([(0x44, 1)]));
    }
    registers.push((0x70, 0xf));
    registers.into_iter().fold(code, |code, (register, value)| code.put(window(device) + register, value))
}

/// Offers one chain as the `turn`th of a queue (from 0), kicks, and waits until it is used.
fn request(mut code: Code, device: u32, queue: u32, turn: u16, chain: &[Buffer]) -> Code {
    let (descriptors, available, used) = rings(device, queue);
    let last = chain.len() - 1;
    for (index, (position, (address, length, writable))) in (0..).zip(chain.iter().enumerate()) {
        let at = descriptors + 16 * index;
        let next = position < last;
        let flags = u32::from(next) | u32::from(*writable) << 1 | (index + 1) << 16;
        let word = |value: u64| u32::try_from(value & 0xffff_ffff).expect("32 bits");
        let (low, high) = (word(*address), word(address >> 32));
        code = code.put(at, low).put(at + 4, high).put(at + 8, *length).put(at + 12, flags);
    }
    // The flags, 0, and the index; the entries stay zero, descriptor 0.
    code.put(available, u32::from(turn + 1) << 16).put(window(device) + 0x50, queue).await_word(used + 2, turn + 1)
}

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

/// Where the first region above guest memory is, and where the guest sees its first 2 MiB.
const ABOVE: u64 = 1 << 32;
const SEEN: u32 = 0x4000_0000;

/// Adds to the page tables that a kernel starts with: the devices' windows where they are, the region at `SEEN`.
fn see_above() -> Code {
    /// Where the machine has the table of page directories, and where the guest puts two more of them.
    const DIRECTORIES: u32 = 0xa000;
    const REGION: u32 = 0x40_0000;
    const WINDOWS: u32 = 0x40_1000;
    const TABLE: u32 = 0x3;
    const LARGE_PAGE: u32 = 0x83;
    let code = Code::new().put(DIRECTORIES + 8, REGION | TABLE).put(DIRECTORIES + 24, WINDOWS | TABLE);
    let code = code.put(REGION, LARGE_PAGE).put(REGION + 4, 1);
    // The window of the 2 MiB at 0xd0000000 in the gigabyte from 0xc0000000.
    code.put(WINDOWS + 8 * 128, WINDOW | LARGE_PAGE)
}

const BLOCK: u64 = 2 << 20;
const PLUG: u32 = 0;
const UNPLUG: u32 = 1;

/// Asks the memory device for its first block, or to take it back.
fn first_block(code: Code, device: u32, turn: u16, kind: u32) -> Code {
    let code = code.put(REQUEST, kind).put(REQUEST + 8, 0).put(REQUEST + 12, 1).put(REQUEST + 16, 1);
    request(code, device, 0, turn, &[(REQUEST.into(), 24, false), (RESPONSE.into(), 10, true)])
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
