//! Drivers of a few instructions for guests in 64-bit mode, with addresses below 4 GiB.

use super::Code;

/// The window of the first virtio device.
pub const WINDOW: u32 = 0xd000_0000;

/// What a guest in 64-bit mode does, with addresses below 4 GiB.
pub trait LongMode {
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
pub fn window(device: u32) -> u32 {
    WINDOW + device * 0x1000
}
/// Where the guest keeps what it shares with a device.
pub const RINGS: u32 = 0x20_0000;
pub const REQUEST: u32 = 0x28_0000;
pub const RESPONSE: u32 = 0x29_0000;
pub const PAGE: u32 = 0x30_0000;

/// A buffer of a request: address, length, whether the device writes it.
pub type Buffer = (u64, u32, bool);

pub fn rings(device: u32, queue: u32) -> (u32, u32, u32) {
    let base = RINGS + device * 0x2_0000 + queue * 0x1_0000;
    (base, base + 0x1000, base + 0x2000)
}

/// The driver's way to DRIVER_OK (virtio 1.2 section 3.1.1) with VERSION_1 and the given features.
pub fn bring_up(code: Code, device: u32, features: u32, queues: &[u32]) -> Code {
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
pub fn request(mut code: Code, device: u32, queue: u32, turn: u16, chain: &[Buffer]) -> Code {
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

/// Where the first region above guest memory is, and where the guest sees its first 2 MiB.
pub const ABOVE: u64 = 1 << 32;
pub const SEEN: u32 = 0x4000_0000;

/// Adds to the page tables that a kernel starts with: the devices' windows where they are, the region at `SEEN`.
pub fn see_above() -> Code {
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

/// Bytes of a block of pluggable memory, and what can be asked for the first one.
pub const BLOCK: u64 = 2 << 20;
pub const PLUG: u32 = 0;
pub const UNPLUG: u32 = 1;

/// Asks the memory device for its first block, or to take it back.
pub fn first_block(code: Code, device: u32, turn: u16, kind: u32) -> Code {
    let code = code.put(REQUEST, kind).put(REQUEST + 8, 0).put(REQUEST + 12, 1).put(REQUEST + 16, 1);
    request(code, device, 0, turn, &[(REQUEST.into(), 24, false), (RESPONSE.into(), 10, true)])
}
