//! Flat kernels: what `objcopy -O binary vmlinux vmlinux.bin` leaves, a picture of memory from
//! the first segment on, with the 64-bit entry point at its start.
//!
//! There is no header to check. What is certainly not such an image is refused by name, so that
//! a wrong file gives a sentence instead of a guest that faults at once.

use devices::GuestMemory;

use super::{FormatError, LoadedKernel};
use crate::arch::x86_64::layout;
use crate::arch::x86_64::regs::Entry;
use crate::memory::image::{ImageFile, Placement};

/// The image does not say how much zeroed memory the kernel uses behind its end; the initrd keeps
/// this distance. A Linux kernel's .bss and .brk take 2 to 6 MiB.
const BSS_ALLOWANCE: u64 = 16 << 20;

const KNOWN_OTHERS: [(&[u8], &str); 9] = [
    (b"\x1f\x8b", "gzip-compressed"),
    (b"\xfd7zXZ", "xz-compressed"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed"),
    (b"BZh", "bzip2-compressed"),
    (b"\x02\x21\x4c\x18", "lz4-compressed"),
    (b"070701", "a cpio archive"),
    (b"MZ", "a PE executable"),
    (b"#!", "a script"),
    (b"!<arch>", "an archive"),
];

/// Places the image where it was linked to run.
pub fn load(memory: &GuestMemory, image: &ImageFile, placement: Placement) -> Result<LoadedKernel, FormatError> {
    let start = super::first_bytes::<16>(image);
    for (magic, what) in KNOWN_OTHERS {
        if start.starts_with(magic) {
            return Err(FormatError::NotAKernel(what));
        }
    }
    if start.iter().all(|byte| *byte == 0) {
        return Err(FormatError::NotAKernel("zeros at its start"));
    }
    if start.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()) {
        return Err(FormatError::NotAKernel("a text"));
    }
    image.place(memory, 0, layout::FLAT_KERNEL, image.size(), placement)?;
    let end = layout::FLAT_KERNEL.0.saturating_add(image.size()).saturating_add(BSS_ALLOWANCE);
    Ok(LoadedKernel { entry: Entry::Linux64(layout::FLAT_KERNEL.0), end, header: None })
}
