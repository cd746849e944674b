//! Guest memory at addresses where KVM can map 2 MiB at once.
//!
//! It does so only where guest and host address agree modulo 2 MiB. Else each 4 KiB page of the guest costs a fault of
//! its own: thousands in a boot. Linux aligns large mappings by itself since 6.7; before, it puts a mapping right below
//! the lowest one, wherever that is.

use std::io;

use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};

use super::backing::Backing;

/// What the processor maps with one entry of a page directory.
const HUGE_PAGE: usize = 2 << 20;

/// How often a region is placed anew. Each time fills a gap that would have been just large enough, or was lost to
/// another thread of this process.
const ATTEMPTS: usize = 16;

/// Maps `size` bytes, aligned if the kernel can be brought to it. Without, all still works.
pub fn map(size: usize, backing: Backing) -> Result<MmapRegion<()>, MmapRegionError> {
    let mut region = build(size, backing.clone())?;
    let mut unaligned = Vec::new();
    while size >= HUGE_PAGE && !is_aligned(&region) && unaligned.len() < ATTEMPTS {
        // It stays for the time being: the kernel fills the highest gap that is large enough, and would take the place
        // of this one again where that is too small for a spacer and lies above the spacer's. With the spacer above,
        // which ends at the right place, the next region ends up there, unless another thread maps something first.
        unaligned.push(region);
        let spacer = Spacer::above(size);
        region = build(size, backing.clone())?;
        drop(spacer);
    }
    Ok(region)
}

fn build(size: usize, backing: Backing) -> Result<MmapRegion<()>, MmapRegionError> {
    let builder = MmapRegionBuilder::new(size).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    let builder = match backing {
        Backing::Anonymous => builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
        Backing::File { file, shared: true } => builder.with_mmap_flags(libc::MAP_SHARED).with_file_offset(file),
        Backing::File { file, shared: false } => {
            builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE).with_file_offset(file)
        }
    };
    builder.build()
}

fn is_aligned(region: &MmapRegion<()>) -> bool {
    (region.as_ptr() as usize).is_multiple_of(HUGE_PAGE)
}

/// A piece of address space that keeps others out.
struct Spacer {
    start: usize,
    length: usize,
}

impl Spacer {
    /// Leaves a gap of `size` bytes below itself, which starts at a multiple of 2 MiB.
    fn above(size: usize) -> io::Result<Self> {
        let length = size.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping that nothing refers to.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let whole = Self { start: start as usize, length };
        let gap = whole.start.next_multiple_of(HUGE_PAGE) + size - whole.start;
        Ok(whole.without_first(gap))
    }

    /// Gives the first `length` bytes back; fewer than it has.
    fn without_first(self, length: usize) -> Self {
        let rest = Self { start: self.start + length, length: self.length - length };
        let first = Self { start: self.start, length };
        std::mem::forget(self);
        drop(first);
        rest
    }
}

impl Drop for Spacer {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: this part of a mapping belongs to this value alone, and nothing refers into it.
            unsafe { libc::munmap(self.start as *mut libc::c_void, self.length) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_aligned_whatever_lies_above_it() {
        for pages in [1, 7, 300, 511, 513] {
            let _above = build(pages << 12, Backing::Anonymous).expect("map");
            let region = map((32 << 20) + 0x3000, Backing::Anonymous).expect("map");
            assert!(is_aligned(&region), "{pages}");
            assert_eq!(region.size(), (32 << 20) + 0x3000);
        }
    }

    #[test]
    fn a_region_is_aligned_beside_gaps_that_are_just_large_enough() {
        const SIZE: usize = 32 << 20;
        // Neighbours, the one in the middle of which is given back: a gap of the size that has no room for a spacer.
        let neighbours: Vec<_> = (0..9).map(|_| build(SIZE + 0x1000, Backing::Anonymous).expect("map")).collect();
        let _kept: Vec<_> = neighbours.into_iter().enumerate().filter(|(index, _)| index % 2 == 0).collect();
        assert!(is_aligned(&map(SIZE + 0x1000, Backing::Anonymous).expect("map")));
    }

    #[test]
    fn a_region_is_aligned_while_other_threads_map() {
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for pages in [1, 513] {
                let done = &done;
                scope.spawn(move || {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        drop(build(pages << 12, Backing::Anonymous).expect("map"));
                    }
                });
            }
            let aligned = (0..200).filter(|_| is_aligned(&map(4 << 20, Backing::Anonymous).expect("map"))).count();
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(aligned, 200);
        });
    }

    #[test]
    fn a_spacer_leaves_a_gap_that_is_aligned() {
        let size = (4 << 20) + 0x1000;
        let spacer = Spacer::above(size).expect("map");
        assert!((spacer.start - size).is_multiple_of(HUGE_PAGE));
        assert!(spacer.length <= HUGE_PAGE);
    }
}
