//! Images that are what they should be, and the many ways in which they are not.

use std::error::Error;
use std::fs::OpenOptions;
use std::io::Write;

use tempfile::NamedTempFile;
use vm_memory::Bytes;

use super::*;
use crate::config::MemoryConfig;
use crate::memory;

const CODE: &[u8] = b"\xb0\x41\xe6\x80 and so on";
const LOAD_ADDRESS: u64 = 0x100_0000;
const LOAD_OFFSET: u64 = 0x1000;
const LOAD: u32 = 1;
const NOTE: u32 = 4;

/// An ELF file that tests bend.
struct ElfFile {
    machine: u16,
    entry: u64,
    header_count: u16,
    header_offset: u64,
    /// Type, offset, address, size in file, size in memory.
    segments: Vec<(u32, u64, u64, u64, u64)>,
}

impl ElfFile {
    fn good() -> Self {
        Self {
            machine: 62,
            entry: LOAD_ADDRESS,
            header_count: 1,
            header_offset: 64,
            segments: vec![(LOAD, LOAD_OFFSET, LOAD_ADDRESS, CODE.len() as u64, 0x3000)],
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(16, 0);
        bytes.extend([2, self.machine].map(u16::to_le_bytes).concat());
        bytes.extend(1u32.to_le_bytes());
        bytes.extend([self.entry, self.header_offset, 0].map(u64::to_le_bytes).concat());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend([64, 56, self.header_count, 0, 0, 0].map(u16::to_le_bytes).concat());
        for (kind, offset, address, file_size, memory_size) in &self.segments {
            bytes.extend([*kind, 7].map(u32::to_le_bytes).concat());
            let fields = [*offset, *address, *address, *file_size, *memory_size, 0x1000];
            bytes.extend(fields.map(u64::to_le_bytes).concat());
        }
        bytes.resize(0x1000, 0);
        bytes.extend(CODE);
        bytes
    }
}

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("file");
    file.write_all(bytes).expect("write");
    file
}

fn memory() -> GuestMemory {
    memory::reserve(&MemoryConfig::from_mib(64)).expect("memory")
}

fn load_bytes(bytes: &[u8]) -> Result<LoadedKernel, String> {
    let file = file(bytes);
    load(&memory(), file.path(), Placement::Copied).map_err(|error| {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        assert!(text.contains(&*file.path().to_string_lossy()), "no path in {text:?}");
        text
    })
}

/// That the image is refused, with a text that says `what`.
fn refused(bytes: &[u8], what: &str) {
    let text = load_bytes(bytes).expect_err(what);
    assert!(text.contains(what), "{text:?} does not say {what:?}");
}

#[test]
fn an_elf_kernel_is_entered_where_it_says() {
    let memory = memory();
    let image = file(&ElfFile::good().bytes());
    let kernel = load(&memory, image.path(), Placement::Copied).expect("load");
    assert_eq!(kernel.entry, Entry::Linux64(LOAD_ADDRESS));
    assert_eq!(kernel.end, LOAD_ADDRESS + 0x3000);
    let mut loaded = vec![0xee; CODE.len() + 1];
    memory.read_slice(&mut loaded, GuestAddress(LOAD_ADDRESS)).expect("read");
    assert_eq!(loaded, [CODE, &[0]].concat());
}

#[test]
fn a_flat_kernel_is_entered_at_its_start() {
    let memory = memory();
    let kernel = load(&memory, file(CODE).path(), Placement::Mapped).expect("load");
    assert_eq!(kernel.entry, Entry::Linux64(LOAD_ADDRESS));
    let first: u8 = memory.read_obj(GuestAddress(LOAD_ADDRESS)).expect("read");
    assert_eq!(first, 0xb0);
}

#[test]
fn what_is_no_kernel_is_named() {
    refused(b"\x1f\x8b\x08\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "It is gzip-compressed, not a kernel");
    refused(b"#!/bin/sh\nexit 0\n and so on", "It is a script");
    refused(b"This is a text of some length.\n", "It is a text");
    refused(&[0; 5000], "It is zeros at its start");
    refused(b"070701 a cpio archive, so an initrd", "It is a cpio archive");
}

#[test]
fn elf_files_for_others_are_refused() {
    refused(&ElfFile { machine: 183, ..ElfFile::good() }.bytes(), "not a 64-bit little-endian x86-64");
    let mut bits_32 = ElfFile::good().bytes();
    bits_32[4] = 1;
    refused(&bits_32, "not a 64-bit little-endian x86-64");
}

#[test]
fn an_elf_file_cut_short_anywhere_is_refused() {
    let whole = ElfFile::good().bytes();
    refused(&whole[..20], "Its ELF header ends at byte 64 but the file has only 20");
    refused(&whole[..100], "Its program header table ends at byte 120");
    refused(&whole[..whole.len() - 1], "Its segment ends at byte");
    for length in (4..whole.len()).step_by(97) {
        assert!(load_bytes(&whole[..length]).is_err(), "{length}");
    }
}

#[test]
fn impossible_elf_headers_are_refused() {
    let segment = |segment| ElfFile { segments: vec![segment], ..ElfFile::good() }.bytes();
    let size = CODE.len() as u64;
    refused(&ElfFile { header_count: 65, ..ElfFile::good() }.bytes(), "more than 64");
    refused(&ElfFile { header_offset: u64::MAX, ..ElfFile::good() }.bytes(), "program header table");
    refused(&ElfFile { header_count: 0, ..ElfFile::good() }.bytes(), "is not in a loaded segment");
    refused(&ElfFile { entry: LOAD_ADDRESS + 0x3000, ..ElfFile::good() }.bytes(), "entry point 0x1003000");
    refused(&segment((LOAD, u64::MAX, LOAD_ADDRESS, size, size)), "Its segment ends at byte");
    refused(&segment((LOAD, LOAD_OFFSET, LOAD_ADDRESS, u64::MAX, u64::MAX)), "is not possible");
    refused(&segment((LOAD, LOAD_OFFSET, LOAD_ADDRESS, size, size - 1)), "is not possible");
    // Over the boot structures, over the end of memory, into the MMIO gap, round the end of all.
    refused(&segment((LOAD, LOAD_OFFSET, 0x7000, size, size)), "segment at 0x7000 is not possible");
    refused(&segment((LOAD, LOAD_OFFSET, LOAD_ADDRESS, size, 64 << 20)), "which the machine does not have");
    refused(&segment((LOAD, LOAD_OFFSET, 0xd000_0000, size, size)), "which the machine does not have");
    refused(&segment((LOAD, LOAD_OFFSET, u64::MAX - 2, size, size)), "is not possible");
    refused(&segment((NOTE, LOAD_OFFSET, 0, 1 << 20, 0)), "Its size of notes of 1048576 is more than 65536");
}

#[test]
fn a_kernel_larger_than_memory_is_refused() {
    for start in [CODE, b"\0"] {
        let image = file(start);
        image.as_file().set_len(1 << 40).expect("sparse");
        // Not read: the size alone decides, at once.
        assert!(load(&memory(), image.path(), Placement::Copied).is_err());
    }
    let mut bzimage = vec![0; 0x300];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    let image = file(&bzimage);
    image.as_file().set_len(1 << 40).expect("sparse");
    assert!(load(&memory(), image.path(), Placement::Copied).is_err());
}

#[test]
fn a_bzimage_without_its_kernel_is_refused() {
    let mut bzimage = vec![0; 0x300];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    refused(&bzimage, "Its bzImage header is not valid");
    // Version 2.15, loaded high, setup of one sector, 32-bit start at 1 MiB.
    bzimage[0x1f1] = 1;
    bzimage[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    bzimage[0x211] = 1;
    bzimage[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    refused(&bzimage, "Its bzImage header is not valid");
    bzimage.resize(0x600, 0);
    let kernel = load_bytes(&bzimage).expect("long enough");
    assert_eq!(kernel.entry, Entry::Linux32(0x10_0000));
    bzimage[0x236] = 1;
    let kernel = load_bytes(&bzimage).expect("64-bit");
    assert_eq!(kernel.entry, Entry::Linux64(0x10_0200));
    // It wants more memory to unpack than there is.
    bzimage[0x260..0x264].copy_from_slice(&(65u32 << 20).to_le_bytes());
    refused(&bzimage, "which the machine does not have");
}

#[test]
fn an_initrd_goes_to_the_top_of_low_memory() {
    let memory = memory();
    let kernel = load(&memory, file(CODE).path(), Placement::Mapped).expect("kernel");
    let bytes: Vec<u8> = (0..=250).cycle().take(200_001).collect();
    let initrd = load_initrd(&memory, file(&bytes).path(), &kernel, Placement::Mapped).expect("initrd");
    assert_eq!(initrd.size, 200_001);
    assert_eq!(initrd.address.0, (64 << 20) - 0x31000);
    let mut loaded = vec![0; bytes.len()];
    memory.read_slice(&mut loaded, initrd.address).expect("read");
    assert!(loaded == bytes);
}

#[test]
fn an_initrd_that_does_not_fit_says_how_much_would() {
    let memory = memory();
    let kernel = load(&memory, file(CODE).path(), Placement::Mapped).expect("kernel");
    let room = (64 << 20) - kernel.end.next_multiple_of(4096);
    let initrd = NamedTempFile::new().expect("file");
    let resize = |size| OpenOptions::new().write(true).open(initrd.path()).and_then(|file| file.set_len(size));
    resize(room).expect("resize");
    load_initrd(&memory, initrd.path(), &kernel, Placement::Copied).expect("just fits");
    for size in [room + 1, 64 << 20, (64 << 20) + 1, 1 << 40] {
        resize(size).expect("resize");
        match load_initrd(&memory, initrd.path(), &kernel, Placement::Copied) {
            Err(KernelError::InitrdTooLarge { size: told, room: left, .. }) => {
                assert_eq!((told, left), (size, room));
            }
            other => panic!("{other:?}"),
        }
    }
}
