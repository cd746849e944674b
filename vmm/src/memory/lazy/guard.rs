//! Guest memory that nobody can provide any more.
//!
//! Threads wait in the kernel for its pages: processors, the devices' threads, those of the host's kernel that work for
//! them. They must go on, or the machine never ends; and they must not go on with pages of zeros, which a drive would
//! write to its image. So all rights to the memory are taken away before they are woken:
//!
//! - a processor has its end's signal pending by then, and is not in the guest again;
//! - a system call that moves the guest's data (`pwritev` of a drive) fails with `EFAULT`, and the device's request with it;
//! - a device that reads rings and headers itself meets a signal (`SIGSEGV`), whose handler puts a page of 0xff at the
//!   address. No index, length, address or type in rings and headers is valid then, so that nothing comes of what it reads.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use super::pages::{Layout, Span};

/// Mappings of all lazy memories of a process: two for each of 512 machines, which is more than one process has but in a test.
pub const MAX_SPANS: usize = 1024;

/// What the page has that takes the place of a lost one.
pub const POISON: u8 = 0xff;

/// Why lost memory could not be guarded, before it is lost.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// There are too many.
    #[error("This process has {MAX_SPANS} mappings of lazy memory already, the most that it can have")]
    TooMany,
    /// The page that takes the place of lost ones cannot be made.
    #[error("Cannot make a page for memory that is lost")]
    Poison(#[source] io::Error),
    /// The handler of the signal cannot be installed.
    #[error("Cannot handle SIGSEGV")]
    Handler(#[source] io::Error),
}

/// What the signal's handler knows of one mapping: it can take no lock.
struct Slot {
    /// Host address; 0 of a slot that is free, 1 of one that is being filled in.
    start: AtomicUsize,
    end: AtomicUsize,
    unit: AtomicUsize,
    /// The file of the page for lost ones; -1 as long as nothing is lost.
    poison: AtomicI32,
}

const FREE: usize = 0;
const TAKEN: usize = 1;

impl Slot {
    const fn free() -> Self {
        Self {
            start: AtomicUsize::new(FREE),
            end: AtomicUsize::new(0),
            unit: AtomicUsize::new(0),
            poison: AtomicI32::new(-1),
        }
    }
}

static SLOTS: [Slot; MAX_SPANS] = [const { Slot::free() }; MAX_SPANS];

/// Watches over the mappings of one memory until it is dropped. The mappings live longer.
#[derive(Debug)]
pub struct Guard {
    slots: Vec<(usize, Span)>,
    poison: File,
}

impl Guard {
    /// Gets ready for the loss of this memory.
    pub fn new(layout: &Layout) -> Result<Self, GuardError> {
        install_handler().map_err(GuardError::Handler)?;
        let poison = poison(layout.unit).map_err(GuardError::Poison)?;
        let mut guard = Self { slots: Vec::new(), poison };
        for span in layout.spans() {
            let slot = take_slot(&SLOTS, span, layout.unit).ok_or(GuardError::TooMany)?;
            guard.slots.push((slot, *span));
        }
        Ok(guard)
    }

    /// Takes the memory away from everybody. To be called when no processor will enter the guest any more, and before
    /// who waits for pages is woken.
    pub fn sever(&self) -> io::Result<()> {
        for (slot, span) in &self.slots {
            if let Some(slot) = SLOTS.get(*slot) {
                slot.poison.store(self.poison.as_raw_fd(), Ordering::SeqCst);
            }
            let length = usize::try_from(span.length).map_err(io::Error::other)?;
            // SAFETY: a mapping of guest memory, to which this process holds no reference. Who accesses it from now on
            // gets an error from the kernel or meets the handler below.
            if unsafe { libc::mprotect(span.host as *mut libc::c_void, length, libc::PROT_NONE) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The threads that could meet the handler are gone: the machine has joined them.
        for (slot, _) in &self.slots {
            if let Some(slot) = SLOTS.get(*slot) {
                slot.poison.store(-1, Ordering::SeqCst);
                slot.start.store(FREE, Ordering::SeqCst);
            }
        }
    }
}

fn take_slot(slots: &[Slot], span: &Span, unit: u64) -> Option<usize> {
    let (start, length) = (usize::try_from(span.host).ok()?, usize::try_from(span.length).ok()?);
    let unit = usize::try_from(unit).ok()?;
    let free = |slot: &Slot| slot.start.compare_exchange(FREE, TAKEN, Ordering::SeqCst, Ordering::SeqCst).is_ok();
    let index = slots.iter().position(free)?;
    let slot = slots.get(index)?;
    slot.end.store(start + length, Ordering::SeqCst);
    slot.unit.store(unit, Ordering::SeqCst);
    slot.start.store(start, Ordering::SeqCst);
    Some(index)
}

/// A file of one page that has nothing but [`POISON`].
fn poison(unit: u64) -> io::Result<File> {
    // SAFETY: the name is a C string; the call returns a new descriptor or an error.
    let descriptor = unsafe { libc::memfd_create(c"lost-memory".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor and nobody else owns it.
    let file = unsafe { File::from_raw_fd(descriptor) };
    let page = [POISON; 4096];
    for offset in (0..unit).step_by(page.len()) {
        file.write_all_at(&page, offset)?;
    }
    Ok(file)
}

/// The handler that was there before: Rust's, which tells of a stack that overflows.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
    let failed =
        |result: libc::c_int| (result != 0).then(|| io::Error::last_os_error().raw_os_error().unwrap_or_default());
    let error = INSTALLED.get_or_init(|| {
        // SAFETY: all zeros is a valid sigaction.
        let mut before: libc::sigaction = unsafe { mem::zeroed() };
        // SAFETY: the structure is valid, and the kernel fills it in.
        if let Some(error) = failed(unsafe { libc::sigaction(libc::SIGSEGV, ptr::null(), &raw mut before) }) {
            return Some(error);
        }
        // The handler finds it when it is first called.
        let _ = BEFORE.set(before);
        // SAFETY: as above; its fields are set below.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: the structure is valid, and the handler calls nothing but mmap and what was there before.
        failed(unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, ptr::null_mut()) })
    });
    match error {
        None => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(*code)),
    }
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel gives the structure, and of this signal it has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    if replace(address) {
        return;
    }
    let Some(before) = BEFORE.get() else { return };
    let (function, with_info) = (before.sa_sigaction, before.sa_flags & libc::SA_SIGINFO != 0);
    match function {
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: the fault happens again when this returns, and ends the process, as it would have without us.
            unsafe { libc::sigaction(signal, ptr::from_ref(before), ptr::null_mut()) };
        }
        function if with_info => {
            // SAFETY: with SA_SIGINFO this is the address of such a function.
            let function: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { mem::transmute(function) };
            function(signal, info, context);
        }
        function => {
            // SAFETY: without SA_SIGINFO it is the address of such a function.
            let function: extern "C" fn(libc::c_int) = unsafe { mem::transmute(function) };
            function(signal);
        }
    }
}

/// Puts the page for lost ones at an address, if memory is lost there. Called in a signal's handler.
fn replace(address: usize) -> bool {
    for slot in &SLOTS {
        let (start, end) = (slot.start.load(Ordering::SeqCst), slot.end.load(Ordering::SeqCst));
        let poison = slot.poison.load(Ordering::SeqCst);
        if start <= TAKEN || address < start || address >= end || poison < 0 {
            continue;
        }
        let unit = slot.unit.load(Ordering::SeqCst);
        let page = address / unit * unit;
        // SAFETY: always a valid pointer in the C library.
        let errno = unsafe { *libc::__errno_location() };
        // SAFETY: a page of a mapping of guest memory without rights, so that nobody has anything to lose in it; mappings
        // start at a multiple of their pages.
        let mapped = unsafe {
            libc::mmap(
                page as *mut libc::c_void,
                unit,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED,
                poison,
                0,
            )
        };
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        return mapped != libc::MAP_FAILED;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_taken_until_there_is_none() {
        let slots = [const { Slot::free() }; 3];
        let span = Span { host: 0x10_0000, start: 0, length: 0x2000 };
        let taken: Vec<_> = (0..4).map(|_| take_slot(&slots, &span, 4096)).collect();
        assert_eq!(taken, [Some(0), Some(1), Some(2), None]);
        slots[1].start.store(FREE, Ordering::SeqCst);
        assert_eq!(take_slot(&slots, &span, 4096), Some(1));
        assert_eq!(slots[1].end.load(Ordering::SeqCst), 0x10_2000);
    }
}
