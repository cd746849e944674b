//! Devices that give memory and take it, and a console, with guests of a few bytes.

mod support;

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use support::{Code, EXIT_PORT, config, wait};
use vmm::{BalloonConfig, ConsoleConfig, ExitReason, Machine, MachineConfig, PortConfig, PortEnd};

const SHUTDOWN: u8 = 4;

/// The window of the first virtio device.
const WINDOW: u32 = 0xd000_0000;
/// Where the guest keeps what it shares with a device.
const RINGS: u32 = 0x20_0000;
const REQUEST: u32 = 0x28_0000;
const RESPONSE: u32 = 0x29_0000;
const PAGE: u32 = 0x30_0000;

/// A buffer of a request: address, length, whether the device writes it.
type Buffer = (u32, u32, bool);

fn rings(queue: u32) -> (u32, u32, u32) {
    let base = RINGS + queue * 0x1_0000;
    (base, base + 0x1000, base + 0x2000)
}

/// The driver's way to DRIVER_OK (virtio 1.2 section 3.1.1) with VERSION_1 and the given features.
fn bring_up(code: Code, features: u32, queues: &[u32]) -> Code {
    let mut registers = vec![(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 0), (0x20, features), (0x24, 1), (0x20, 1)];
    registers.push((0x70, 0xb));
    for queue in queues {
        let (descriptors, available, used) = rings(*queue);
        let queue_registers = [(0x30, *queue), (0x38, 8), (0x80, descriptors), (0x90, available), (0xa0, used)];
        registers.extend(queue_registers.into_iter().chain([(0x44, 1)]));
    }
    registers.push((0x70, 0xf));
    registers.into_iter().fold(code, |code, (register, value)| code.store(WINDOW + register, value))
}

/// Offers one chain as the `turn`th of a queue (from 0), kicks, and waits until it is used.
fn request(mut code: Code, queue: u32, turn: u16, chain: &[Buffer]) -> Code {
    let (descriptors, available, used) = rings(queue);
    let last = chain.len() - 1;
    for (index, (position, (address, length, writable))) in (0..).zip(chain.iter().enumerate()) {
        let at = descriptors + 16 * index;
        let next = position < last;
        let flags = u32::from(next) | u32::from(*writable) << 1 | (index + 1) << 16;
        code = code.store(at, *address).store(at + 8, *length).store(at + 12, flags);
    }
    // The flags, 0, and the index; the entries stay zero, descriptor 0.
    code.store(available, u32::from(turn + 1) << 16).store(WINDOW + 0x50, queue).wait_for(used + 2, turn + 1)
}

fn run(code: Code, configure: impl FnOnce(&mut MachineConfig)) -> (Machine, ExitReason) {
    let kernel = code.out(EXIT_PORT, SHUTDOWN).halt().pvh();
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
    let mut code = bring_up(Code::new(), 0, &[0, 1]).store(PAGE, 0x6567_6170).store(PAGE + 0x1000, 0x6567_6170);
    for (index, page) in (0..).zip(pages) {
        code = code.store(REQUEST + 4 * index, page);
    }
    code = request(code, 0, 0, &[(REQUEST, 16, false)]).print_memory(PAGE, 4).print_memory(PAGE + 0x1000, 4);
    // It tells the host how large the balloon is, takes the page back and uses it.
    code = code.store(WINDOW + 0x104, 1).store(PAGE, 0x6b63_6162).print_memory(PAGE, 4);
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
    let code = bring_up(Code::new(), 0, &[0, 1]).store(REQUEST, u32::from_le_bytes(*b"text"));
    let code = request(code, 1, 0, &[(REQUEST, 4, false)]);
    let code = request(code, 0, 0, &[(RESPONSE, 64, true)]).print_memory(RESPONSE, 5);
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
