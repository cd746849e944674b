//! Kernel images: ELF, bzImage and flat.

#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmm::{MemoryConfig, Placement};

#[derive(Arbitrary, Debug)]
enum Image {
    Elf { entry: u32, header_offset: Option<u64>, count: u8, segments: Vec<Segment>, notes: Vec<u8> },
    BzImage { sectors: u8, header: Vec<u8>, size: u16 },
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Segment {
    kind: Option<u8>,
    flags: u32,
    offset: u16,
    far: Option<u64>,
    address: u32,
    file_size: u16,
    memory_size: u32,
    huge: Option<u64>,
}

impl Image {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes.clone(),
            Self::BzImage { sectors, header, size } => {
                let mut bytes = vec![0; 0x202];
                bytes[0x1f1] = *sectors;
                bytes.extend(b"HdrS");
                bytes.extend(header);
                bytes.resize(bytes.len().max(0x268) + usize::from(*size), 0x90);
                bytes
            }
            Self::Elf { entry, header_offset, count, segments, notes } => {
                let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
                bytes.resize(16, 0);
                bytes.extend([2, 62].map(u16::to_le_bytes).concat());
                bytes.extend(1_u32.to_le_bytes());
                let entry = 0x100_0000 + u64::from(*entry % 0x10000);
                bytes.extend([entry, header_offset.unwrap_or(64), 0].map(u64::to_le_bytes).concat());
                bytes.extend(0_u32.to_le_bytes());
                let count = u16::try_from(segments.len()).map_or(u16::MAX, |real| real ^ u16::from(*count % 2));
                bytes.extend([64, 56, count, 0, 0, 0].map(u16::to_le_bytes).concat());
                for segment in segments {
                    let kind = match segment.kind {
                        None => 1,
                        Some(kind) => u32::from(kind % 8),
                    };
                    bytes.extend([kind, segment.flags].map(u32::to_le_bytes).concat());
                    let address = 0x100_0000 + u64::from(segment.address % 0x400_0000);
                    let offset = segment.far.unwrap_or(segment.offset.into());
                    let size = segment.huge.unwrap_or(segment.memory_size.into());
                    let fields = [offset, address, address, segment.file_size.into(), size, 0x1000];
                    bytes.extend(fields.map(u64::to_le_bytes).concat());
                }
                bytes.extend(notes);
                bytes.resize(bytes.len().max(0x1000), 0x90);
                bytes
            }
        }
    }
}

fuzz_target!(|input: (Image, bool)| {
    let (image, mapped) = input;
    // SAFETY: the name ends with a zero, and the result is checked before it becomes a file's.
    let descriptor = unsafe { libc::memfd_create(c"kernel".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(descriptor >= 0, "A file in memory");
    // SAFETY: a system call just returned it as a new descriptor.
    let mut file = unsafe { File::from_raw_fd(descriptor) };
    file.write_all(&image.bytes()).expect("A file in memory");
    let memory = vmm::memory::reserve(&MemoryConfig::from_mib(64)).expect("Guest memory");
    let placement = if mapped { Placement::Mapped } else { Placement::Copied };
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    if let Ok(kernel) = vmm::kernel::load(&memory, Path::new(&path), placement) {
        assert!(kernel.end <= 64 << 20, "A kernel that was loaded ends in memory: {:#x}", kernel.end);
    }
});
