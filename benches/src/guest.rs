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
    file.write_all(&elf(code, None))?;
    Ok(file)
}

/// What a guest of another monitor does.
#[derive(Debug, Clone, Copy)]
pub enum Guest {
    /// Says on the debug port that it runs, and triple-faults.
    Ending,
    /// Says on the console that it runs, and sleeps.
    Sleeping,
}

/// A guest in the forms in which monitors take kernels.
pub struct Images {
    /// An ELF image, entered by the Linux 64-bit boot protocol.
    pub elf: NamedTempFile,
    /// The same with a PVH note, which is what QEMU's microvm machine takes.
    pub pvh: NamedTempFile,
    /// Nothing but code, loaded at 16 MiB and entered there.
    pub flat: NamedTempFile,
}

impl Guest {
    /// Writes it in each form.
    pub fn images(self) -> io::Result<Images> {
        let code: &[u8] = match self {
            Self::Ending => &CODE,
            Self::Sleeping => &SLEEPER,
        };
        let mut flat = NamedTempFile::new()?;
        flat.write_all(code)?;
        let mut pvh = NamedTempFile::new()?;
        pvh.write_all(&elf(code, Some(&pvh_note())))?;
        Ok(Images { elf: file(code)?, pvh, flat })
    }
}

/// The entry point for PVH: an ELF note by Xen of type `XEN_ELFNOTE_PHYS32_ENTRY`.
fn pvh_note() -> Vec<u8> {
    const PHYS32_ENTRY: u32 = 18;
    let mut note = [4_u32, 8, PHYS32_ENTRY].map(u32::to_le_bytes).concat();
    note.extend(b"Xen\0");
    note.extend(ADDRESS.to_le_bytes());
    note
}

fn elf(code: &[u8], note: Option<&[u8]>) -> Vec<u8> {
    const HEADER_SIZE: u16 = 64;
    const PROGRAM_HEADER_SIZE: u16 = 56;
    const EXECUTABLE: u16 = 2;
    const X86_64: u16 = 62;
    const CURRENT: u32 = 1;
    const LOAD: u32 = 1;
    const NOTE: u32 = 4;
    const READABLE: u32 = 4;
    const READ_WRITE_EXECUTE: u32 = 7;
    const NOTE_OFFSET: u16 = 0x800;
    const OFFSET: u16 = 0x1000;

    // 64 bits, little endian, version 1.
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([EXECUTABLE, X86_64].map(u16::to_le_bytes).concat());
    elf.extend(CURRENT.to_le_bytes());
    // Entry point, program headers, no section headers.
    elf.extend([ADDRESS, u64::from(HEADER_SIZE), 0].map(u64::to_le_bytes).concat());
    elf.extend(0u32.to_le_bytes());
    let headers = 1 + u16::from(note.is_some());
    elf.extend([HEADER_SIZE, PROGRAM_HEADER_SIZE, headers, 0, 0, 0].map(u16::to_le_bytes).concat());

    elf.extend([LOAD, READ_WRITE_EXECUTE].map(u32::to_le_bytes).concat());
    let size = code.len() as u64;
    let offset = u64::from(OFFSET);
    elf.extend([offset, ADDRESS, ADDRESS, size, size, offset].map(u64::to_le_bytes).concat());
    if let Some(note) = note {
        elf.extend([NOTE, READABLE].map(u32::to_le_bytes).concat());
        let size = note.len() as u64;
        elf.extend([NOTE_OFFSET.into(), 0, 0, size, size, 4].map(u64::to_le_bytes).concat());
        elf.resize(NOTE_OFFSET.into(), 0);
        elf.extend(note);
    }
    elf.resize(OFFSET.into(), 0);
    elf.extend(code);
    elf
}
