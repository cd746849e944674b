//! A guest that does what a script says: reads and writes of every width, to memory, registers and ports, each as often
//! as is wanted. The machine code is a hundred bytes; what is hostile is made up in Rust.

use tempfile::NamedTempFile;

use super::{ELF_BASE, EXIT_PORT, SERIAL_PORT, elf, file};

/// Where the code ends and the script begins in the guest's image.
const SCRIPT_OFFSET: usize = 0x200;
/// Bytes of the code before the table of operations.
const TABLE_OFFSET: usize = 0x40;
/// Bytes that the code of an operation may have.
const SLOT: usize = 16;
/// Memory of the driver: page tables, then rings and buffers. Zero at the start.
const PAGE_DIRECTORY: u32 = 0x700_0000;
/// `layout::PDPT`, the page tables' second level.
const PDPT: u32 = 0xa000;
/// Present, writable, a large page of 2 MiB.
const LARGE_PAGE: u32 = 0x83;
const GIB_SHIFT: u32 = 30;
const LARGE_PAGE_SHIFT: u32 = 21;

/// How wide an access is.
#[derive(Clone, Copy, Debug)]
pub enum Width {
    Byte,
    Word,
    Long,
    /// Not for ports.
    Quad,
}

pub const WIDTHS: [Width; 4] = [Width::Byte, Width::Word, Width::Long, Width::Quad];
pub const PORT_WIDTHS: [Width; 3] = [Width::Byte, Width::Word, Width::Long];

/// The operations, by the index of their code. `rdi` and `dx` have the address, `rbx` the value, `ecx` the count.
const OPERATIONS: [&[u8]; 14] = [
    &[0x88, 0x1f],             // mov [rdi], bl
    &[0x66, 0x89, 0x1f],       // mov [rdi], bx
    &[0x89, 0x1f],             // mov [rdi], ebx
    &[0x48, 0x89, 0x1f],       // mov [rdi], rbx
    &[0x8a, 0x07],             // mov al, [rdi]
    &[0x66, 0x8b, 0x07],       // mov ax, [rdi]
    &[0x8b, 0x07],             // mov eax, [rdi]
    &[0x48, 0x8b, 0x07],       // mov rax, [rdi]
    &[0x89, 0xd8, 0xee],       // mov eax, ebx; out dx, al
    &[0x89, 0xd8, 0x66, 0xef], // mov eax, ebx; out dx, ax
    &[0x89, 0xd8, 0xef],       // mov eax, ebx; out dx, eax
    &[0xec],                   // in al, dx
    &[0x66, 0xed],             // in ax, dx
    &[0xed],                   // in eax, dx
];
const STORES: u32 = 0;
const LOADS: u32 = 4;
const OUTS: u32 = 8;
const INS: u32 = 11;

/// What the guest is to do, in order.
#[derive(Default, Clone)]
pub struct Script(Vec<u8>);

impl Script {
    /// Begins with the mapping of the devices' windows, which the page tables of a fresh guest do not have.
    pub fn new() -> Self {
        let top = 3;
        let script = Self::default().store(PDPT + 8 * top, PAGE_DIRECTORY | 3);
        [0xd000_0000u32, 0xfec0_0000, 0xfee0_0000].into_iter().fold(script, |script, window| {
            let index = (window - (top << GIB_SHIFT)) >> LARGE_PAGE_SHIFT;
            script.store(PAGE_DIRECTORY + 8 * index, window | LARGE_PAGE)
        })
    }

    fn step(mut self, operation: u32, count: u32, address: u32, value: u32) -> Self {
        for word in [operation, count, address, value] {
            self.0.extend(word.to_le_bytes());
        }
        self
    }

    /// Writes 32 bits once.
    pub fn store(self, address: u32, value: u32) -> Self {
        self.write(Width::Long, address, value, 1)
    }

    /// Writes `count` times. The upper half of a quad is the lower one.
    pub fn write(self, width: Width, address: u32, value: u32, count: u32) -> Self {
        self.step(STORES + width as u32, count, address, value)
    }

    /// Reads `count` times.
    pub fn read(self, width: Width, address: u32, count: u32) -> Self {
        self.step(LOADS + width as u32, count, address, 0)
    }

    /// Writes to a port `count` times.
    pub fn out(self, width: Width, port: u16, value: u32, count: u32) -> Self {
        self.step(OUTS + width as u32, count, port.into(), value)
    }

    /// Reads a port `count` times.
    pub fn input(self, width: Width, port: u16, count: u32) -> Self {
        self.step(INS + width as u32, count, port.into(), 0)
    }

    /// Prints on the console.
    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |script, byte| script.out(Width::Byte, SERIAL_PORT, byte.into(), 1))
    }

    /// Ends the machine in order, which shows that the guest got to its script's end.
    pub fn shut_down(self) -> Self {
        const SHUTDOWN: u32 = 4;
        self.out(Width::Byte, EXIT_PORT, SHUTDOWN, 1)
    }

    /// As a kernel that is entered in 64-bit mode.
    pub fn kernel(&self) -> NamedTempFile {
        let base = u32::try_from(ELF_BASE).expect("low");
        let offset = |offset: usize| base + u32::try_from(offset).expect("small");
        let mut code = vec![0xbe]; // mov esi, script
        code.extend(offset(SCRIPT_OFFSET).to_le_bytes());
        let next = code.len();
        code.extend([0x8b, 0x06, 0x8b, 0x4e, 0x04, 0x8b, 0x7e, 0x08, 0x8b, 0x5e, 0x0c]); // eax, ecx, edi, ebx
        code.extend([0x48, 0x89, 0xd8, 0x48, 0xc1, 0xe0, 0x20, 0x48, 0x09, 0xc3]); // rbx |= rbx << 32
        code.extend([0x8b, 0x06, 0x89, 0xfa, 0x48, 0x83, 0xc6, 0x10]); // eax again; edx = edi; rsi += 16
        code.extend([0xc1, 0xe0, 0x04, 0x05]); // eax = eax * 16 + table
        code.extend(offset(TABLE_OFFSET).to_le_bytes());
        code.extend([0xff, 0xe0]); // jmp rax
        assert!(code.len() <= TABLE_OFFSET);
        for (index, operation) in OPERATIONS.into_iter().enumerate() {
            let slot = TABLE_OFFSET + SLOT * index;
            code.resize(slot, 0xcc);
            code.extend(operation);
            let back = i8::try_from(operation.len() + 4).expect("short");
            code.extend([0xff, 0xc9, 0x75, (-back).cast_unsigned()]); // dec ecx; jnz operation
            let from = i32::try_from(code.len() + 5).expect("small");
            code.push(0xe9); // jmp next
            code.extend((i32::try_from(next).expect("small") - from).to_le_bytes());
            assert!(code.len() <= slot + SLOT);
        }
        code.resize(SCRIPT_OFFSET, 0xcc);
        code.extend(&self.0);
        file(&elf(&code, false))
    }
}

/// Numbers without a pattern, the same in each run (xorshift32, Marsaglia 2003).
pub struct Numbers(u32);

impl Numbers {
    pub fn new(seed: u32) -> Self {
        Self(seed | 1)
    }

    pub fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }

    /// One of `choices`.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::try_from(self.next()).expect("64 bits") % choices.len()]
    }
}
