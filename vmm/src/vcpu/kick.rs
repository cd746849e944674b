//! Getting a processor out of the guest: a flag that `KVM_RUN` looks at on its way in, and a
//! signal for the case that it is in already.

use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// The signal that interrupts `KVM_RUN`. Nothing is done when it arrives; that it does, suffices.
pub fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// Installs the handler, once in a process.
pub fn install_handler() {
    static INSTALLED: Once = Once::new();
    extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    INSTALLED.call_once(|| {
        // Fails for numbers that are no signal or cannot be handled: this one can.
        let _ = register_signal_handler(kick_signal(), nothing);
    });
}

/// `kvm_run.immediate_exit` of one vCPU, mapped a second time: the thread that runs the vCPU owns
/// the first mapping, and this one is valid whatever becomes of that.
pub struct ImmediateExit {
    page: NonNull<libc::c_void>,
}

// SAFETY: the page is only accessed atomically.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Maps the first page of the vCPU's `kvm_run`.
    pub fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new mapping, of a page that every vCPU descriptor has.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(page) {
            Some(page) if page.as_ptr() != libc::MAP_FAILED => Ok(Self { page }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// One page; the field is in the first bytes of it.
    const SIZE: usize = 4096;

    /// Makes the next `KVM_RUN` return at once with EINTR.
    pub fn set(&self) {
        // SAFETY: the field is inside the mapped page, which lives as long as `self`, and both
        // this process and the kernel access it a byte at a time.
        let flag =
            unsafe { AtomicU8::from_ptr(self.page.as_ptr().cast::<u8>().add(offset_of!(kvm_run, immediate_exit))) };
        flag.store(1, Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length and is used by nobody else.
        unsafe { libc::munmap(self.page.as_ptr(), Self::SIZE) };
    }
}
