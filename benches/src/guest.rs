//! The smallest guests: they say on the debug port that they run, and triple-fault; one says so on the console, and sleeps.

use std::io::{self, Write};

use tempfile::NamedTempFile;

/// `mov al, 0x41; out 0x80, al; ud2`. Means the same in 32-bit and 64-bit mode.
const CODE: [u8; 6] = [0xb0, 0x41, 0xe6, 0x80, 0x0f, 0x0b];

/// Waits for 1 in the byte at [`RELEASE`], after it has said `w` on the console. For 64-bit mode:
/// `mov al, 'w'; mov dx, 0x3f8; out dx, al; cmp byte [RELEASE], 1; jne -10`
const WAIT: [u8; 17] =
    [0xb0, b'w', 0x66, 0xba, 0xf8, 0x03, 0xee, 0x80, 0x3c, 0x25, 0x00, 0x00, 0x20, 0x00, 0x01, 0x75, 0xf6];

/// Where a guest that waits looks.
pub const RELEASE: u64 = 0x20_0000;

/// Where a guest that touches memory has its data.
pub const DATA: u32 = 0x40_0000;

/// `mov dx, 0x3f8; mov al, 0x41; out dx, al; cli; hlt; jmp -4`, likewise.
const SLEEPER: [u8; 11] = [0x66, 0xba, 0xf8, 0x03, 0xb0, 0x41, 0xee, 0xfa, 0xf4, 0xeb, 0xfc];

/// Where it is loaded: the start of memory above the legacy hole.
const ADDRESS: u64 = 0x10_0000;

/// Writes the guest as an ELF kernel with one segment and no PVH note, which every VMM enters by
/// the Linux 64-bit boot protocol.
pub fn write() -> io::Result<NamedTempFile> {
    file(&CODE)
}

/// The same, which waits first: to be saved there, and released where it is restored.
pub fn write_waiting() -> io::Result<NamedTempFile> {
    file(&[&WAIT[..], &CODE].concat())
}

/// The same, with something in each page of so many MiB from [`DATA`] on before it waits, which it reads after it has said that it runs.
pub fn write_touching(mib: u32) -> io::Result<NamedTempFile> {
    let end = (DATA + (mib << 20)).to_le_bytes();
    // mov ebx, DATA; ACCESS; add ebx, 4096; cmp ebx, end; jb -16
    let each_page = |access: [u8; 2]| {
        let code =
            [&[0xbb][..], &DATA.to_le_bytes(), &access, &[0x81, 0xc3, 0, 0x10, 0, 0, 0x81, 0xfb], &end, &[0x72, 0xf0]];
        code.concat()
    };
    let (write, read) = (each_page([0x89, 0x1b]), each_page([0x8b, 0x03]));
    let (says, fault) = CODE.split_at(4);
    file(&[&write, &WAIT[..], says, &read, fault].concat())
}

fn file(code: &[u8]) -> io::Result<NamedTempFile> {
    let mut file = NamedTempFile::new()?;
    file.write_all(&elf(code))?;
    Ok(file)
}

/// Writes a guest that says on the console that it runs, and sleeps.
pub fn write_sleeper() -> io::Result<NamedTempFile> {
    file(&SLEEPER)
}

fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER_SIZE: u16 = 64;
    const PROGRAM_HEADER_SIZE: u16 = 56;
    const EXECUTABLE: u16 = 2;
    const X86_64: u16 = 62;
    const CURRENT: u32 = 1;
    const LOAD: u32 = 1;
    const READ_WRITE_EXECUTE: u32 = 7;
    const OFFSET: u64 = 0x1000;

    // 64 bits, little endian, version 1.
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([EXECUTABLE, X86_64].map(u16::to_le_bytes).concat());
    elf.extend(CURRENT.to_le_bytes());
    // Entry point, program headers, no section headers.
    elf.extend([ADDRESS, u64::from(HEADER_SIZE), 0].map(u64::to_le_bytes).concat());
    elf.extend(0u32.to_le_bytes());
    elf.extend([HEADER_SIZE, PROGRAM_HEADER_SIZE, 1, 0, 0, 0].map(u16::to_le_bytes).concat());

    elf.extend([LOAD, READ_WRITE_EXECUTE].map(u32::to_le_bytes).concat());
    let size = code.len() as u64;
    elf.extend([OFFSET, ADDRESS, ADDRESS, size, size, OFFSET].map(u64::to_le_bytes).concat());
    elf.resize(0x1000, 0);
    elf.extend(code);
    elf
}
