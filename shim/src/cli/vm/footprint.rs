//! Memory that only the start of a machine needed.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::time::Duration;

/// How long a machine has run when its start is over, devices and all. One that ends before needs no less memory.
pub const START: Duration = Duration::from_millis(500);

/// What mappings are made of on this architecture.
const PAGE: u64 = 4096;

/// Unmaps the pages of this program's code and constants. Reading a command line, building a machine and relocating the program
/// take megabytes of them, and none is needed again; what a machine that runs executes comes back from the page cache by itself,
/// which is a fraction. Nothing is written to them, so nothing is lost.
pub fn let_go_of_the_start() {
    // SAFETY: `unmap` has the type that the call asks for, and makes nothing of its third argument.
    unsafe { libc::dl_iterate_phdr(Some(unmap), ptr::null_mut()) };
}

/// Does so for the first object, which is the program, and stops.
unsafe extern "C" fn unmap(object: *mut libc::dl_phdr_info, _: libc::size_t, _: *mut c_void) -> c_int {
    // SAFETY: the C library passes the description of an object that is loaded; it and its headers live through the call.
    let (object, headers) = unsafe {
        let object = &*object;
        (object, std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()))
    };
    let never_written = |header: &&libc::Elf64_Phdr| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0;
    for header in headers.iter().filter(never_written) {
        let start = object.dlpi_addr.wrapping_add(header.p_vaddr);
        // A segment begins in a page of its own, but may end in one that the next mapping has: that page stays.
        let end = start.wrapping_add(header.p_memsz) / PAGE * PAGE;
        let start = start / PAGE * PAGE;
        let (Ok(start), Ok(length)) = (usize::try_from(start), usize::try_from(end.saturating_sub(start))) else {
            continue;
        };
        // SAFETY: a private mapping of the program's file that is not writable: each page is read anew from the file when it is
        // needed, by this function too. Whether it succeeds makes no difference to what the program does.
        unsafe { libc::madvise(ptr::with_exposed_provenance_mut(start), length, libc::MADV_DONTNEED) };
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of this program's file that are mapped and not writable, in KiB.
    fn mapped() -> u64 {
        let program = std::env::current_exe().unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut counts, mut total) = (false, 0);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some(range), Some(access)) if range.contains('-') && access.len() == 4 => {
                    counts = line.ends_with(program.to_str().unwrap()) && access.starts_with("r-");
                }
                (Some("Rss:"), Some(kilobytes)) if counts => total += kilobytes.parse::<u64>().unwrap(),
                _ => {}
            }
        }
        total
    }

    #[test]
    fn pages_go_and_what_is_called_comes_back() {
        let before = mapped();
        for _ in 0..3 {
            let_go_of_the_start();
            assert_eq!("again".len() + usize::from(before == 0), 5);
        }
        let after = mapped();
        assert!(after < before, "{before} KiB before, {after} KiB after");
    }
}
