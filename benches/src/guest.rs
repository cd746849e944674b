//! The smallest guests: one says on the debug port that it runs, and triple-faults; one says so on the console, and sleeps.

use std::io::{self, Write};

use tempfile::NamedTempFile;

/// `mov al, 0x41; out 0x80, al; ud2`. Means the same in 32-bit and 64-bit mode.
const CODE: [u8; 6] = [0xb0, 0x41, 0xe6, 0x80, 0x0f, 0x0b];

/// `mov dx, 0x3f8; mov al, 0x41; out dx, al; cli; hlt; jmp -4`, likewise.
const SLEEPER: [u8; 11] = [0x66, 0xba, 0xf8, 0x03, 0xb0, 0x41, 0xee, 0xfa, 0xf4, 0xeb, 0xfc];

/// Where it is loaded: the start of memory above the legacy hole.
const ADDRESS: u64 = 0x10_0000;

/// Writes the guest as an ELF kernel with one segment and no PVH note, which every VMM enters by
/// the Linux 64-bit boot protocol.
pub fn write() -> io::Result<NamedTempFile> {
    let mut file = NamedTempFile::new()?;
    file.write_all(&elf(&CODE))?;
    Ok(file)
}

/// Writes the guest that sleeps, in the same way.
pub fn write_sleeper() -> io::Result<NamedTempFile> {
    let mut file = NamedTempFile::new()?;
    file.write_all(&elf(&SLEEPER))?;
    Ok(file)
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
