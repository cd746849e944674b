//! Giving up what a guest need not keep when it is saved.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;

use nix::errno::Errno;

/// Frees the page cache, dentries and inodes when 3 is written (Documentation/admin-guide/sysctl/vm.rst).
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";
/// Moves what is in use together, and empties the lists of single pages that each CPU keeps.
const COMPACT: &str = "/proc/sys/vm/compact_memory";
/// What the kernel keeps free for itself, in KiB.
const MIN_FREE: &str = "/proc/sys/vm/min_free_kbytes";
/// Memory that is taken at a time: one huge page.
const STEP: usize = 2 << 20;

/// Drops caches and makes free memory zero, by taking almost all of it and giving it back. What the kernel needs for
/// itself is left, so nobody is killed for it.
pub fn clear_free_memory() -> io::Result<()> {
    // SAFETY: sync takes no arguments and touches no memory of this process.
    unsafe { libc::sync() };
    fs::write(DROP_CACHES, "3")?;
    // Not every kernel compacts.
    let _ = fs::write(COMPACT, "1");
    let kept = kept_free()?;
    let mut taken = Taken::new(free()?)?;
    while free()? >= kept.saturating_add(STEP) && taken.take(STEP)? {}
    Ok(())
}

/// Twice what wakes the kernel up: below that it would reclaim, and in the end kill.
fn kept_free() -> io::Result<usize> {
    let text = fs::read_to_string(MIN_FREE)?;
    let kib: usize = text.trim().parse().map_err(io::Error::other)?;
    Ok(kib.saturating_mul(2 << 10))
}

/// Bytes that nobody uses.
fn free() -> io::Result<usize> {
    let mut info = MaybeUninit::<libc::sysinfo>::uninit();
    // SAFETY: sysinfo fills in the one structure that it is given.
    Errno::result(unsafe { libc::sysinfo(info.as_mut_ptr()) })?;
    // SAFETY: sysinfo has succeeded, so it is filled in.
    let info = unsafe { info.assume_init() };
    let bytes = info.freeram.saturating_mul(u64::from(info.mem_unit));
    Ok(usize::try_from(bytes).unwrap_or(usize::MAX))
}

/// A mapping of which more and more is real memory.
struct Taken {
    start: *mut libc::c_void,
    length: usize,
    used: usize,
}

impl Taken {
    fn new(length: usize) -> io::Result<Self> {
        let length = length.max(STEP);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Saves page tables, which would be dirty when they are given back. Without huge pages it works as well.
        // SAFETY: advice about the mapping that was just made.
        let _ = unsafe { libc::madvise(start, length, libc::MADV_HUGEPAGE) };
        Ok(Self { start, length, used: 0 })
    }

    /// Makes `bytes` more of the mapping real. False when there is no more of it, or no memory.
    fn take(&mut self, bytes: usize) -> io::Result<bool> {
        let bytes = bytes.min(self.length - self.used);
        if bytes == 0 {
            return Ok(false);
        }
        // SAFETY: the range is inside the mapping, which this value owns and nobody refers to.
        let taken = unsafe { libc::madvise(self.start.byte_add(self.used), bytes, libc::MADV_POPULATE_WRITE) };
        match Errno::result(taken) {
            Ok(_) => {
                self.used += bytes;
                Ok(true)
            }
            Err(Errno::ENOMEM) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, whole, and nothing refers to it.
        unsafe { libc::munmap(self.start, self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_taken_step_by_step_up_to_the_end_of_the_mapping() {
        let mut taken = Taken::new(2 * STEP + 4096).expect("A mapping");
        assert!(taken.take(STEP).expect("Memory") && taken.take(STEP).expect("Memory"));
        assert!(taken.take(STEP).expect("Memory"), "The rest");
        assert_eq!(taken.used, taken.length);
        assert!(!taken.take(STEP).expect("No more"));
    }

    #[test]
    fn something_is_free_and_something_is_kept() {
        assert!(free().expect("sysinfo") > 0);
        assert!(kept_free().expect("Readable") > 0);
    }
}
