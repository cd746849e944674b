//! What happens at a call that the filter does not allow: a line with the reason, and the end of the process.
//!
//! There is no going on. The thread may be somebody else's by now, and what it shares with the others is all memory.

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use syscalls::Sysno;

use crate::{ConfineError, Role};

/// Exit code of a process that a filter has ended: what a shell makes of SIGSYS.
pub const EXIT_CODE: i32 = 128 + libc::SIGSYS;
/// `si_code` of a signal that seccomp sent (asm-generic/siginfo.h).
const SYS_SECCOMP: i32 = 1;
/// Arguments that are reported.
const ARGUMENTS: [libc::c_int; 3] = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX];

static REPORT_FD: AtomicI32 = AtomicI32::new(libc::STDERR_FILENO);

thread_local! {
    // Without a destructor and constant, so that the handler can read it.
    static ROLE: Cell<&'static str> = const { Cell::new("ceiling") };
}

/// Where the reason goes, instead of to standard error. The descriptor must stay open.
pub fn report_to(descriptor: std::os::fd::RawFd) {
    REPORT_FD.store(descriptor, Ordering::Relaxed);
}

/// Names the role of the calling thread in reports; for a thread that inherits its filter.
pub fn set_role(role: Role) {
    ROLE.set(role.name());
}

/// Whether the calling thread is in `role`.
pub fn has_role(role: Role) -> bool {
    ROLE.get() == role.name()
}

/// Installs the handler, once in a process.
pub fn install_handler() -> Result<(), ConfineError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| sigaction().map_err(|error| error.raw_os_error().unwrap_or_default()));
    installed.map_err(|errno| ConfineError::Handler(io::Error::from_raw_os_error(errno)))
}

fn sigaction() -> io::Result<()> {
    // SAFETY: all zeroes are a valid sigaction; its fields are set below.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handle as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `action` is complete, and its handler calls only what is async-signal-safe.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `siginfo_t` of a SIGSYS, as far as it is read (sigaction(2)).
#[repr(C)]
struct Info {
    signal: i32,
    errno: i32,
    code: i32,
    address: *const libc::c_void,
    syscall: i32,
}

/// Runs in a signal's context: no allocation, no lock, plain system calls that every filter allows.
extern "C" fn handle(_: libc::c_int, info: *const Info, context: *const libc::ucontext_t) {
    // SAFETY: the kernel passes a siginfo_t and a ucontext_t, as SA_SIGINFO asks for; for a signal that seccomp sent,
    // which the code tells, the former has the fields of `Info`.
    let (info, registers) = unsafe { (&*info, &(*context).uc_mcontext.gregs) };
    let call = usize::try_from(info.syscall).ok().and_then(Sysno::new);
    let arguments = ARGUMENTS.map(|register| {
        let value = usize::try_from(register).ok().and_then(|register| registers.get(register)).copied();
        value.unwrap_or_default().cast_unsigned()
    });
    let mut line = Line::default();
    line.text("seccomp: the thread role ");
    line.text(ROLE.get());
    let code = match fault(call, arguments) {
        Some((signal, name)) => {
            line.text(" has met ");
            line.text(name);
            128 + signal
        }
        None => {
            line.text(" may not call ");
            line.text(if info.code == SYS_SECCOMP {
                call.map_or("an unknown system call", |call| call.name())
            } else {
                "(sent by kill)"
            });
            for (index, argument) in arguments.into_iter().enumerate() {
                line.text(if index == 0 { "(0x" } else { ", 0x" });
                line.hex(argument);
            }
            line.text(", ...)");
            EXIT_CODE
        }
    };
    line.text("; the process ends\n");
    line.write();
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(code) }
}

/// The signal that Rust's handler of memory faults was called for, if this is it: it puts the default action back, and the
/// fault that happens again would end the process without a word about whose it was.
fn fault(call: Option<Sysno>, [signal, ..]: [u64; 3]) -> Option<(i32, &'static str)> {
    let faults = [
        (libc::SIGSEGV, "SIGSEGV: it has used memory that it does not have"),
        (libc::SIGBUS, "SIGBUS: it has used memory of a file that has none there"),
    ];
    let is_restored = call == Some(Sysno::rt_sigaction);
    faults.into_iter().find(|(number, _)| is_restored && u64::from(number.cast_unsigned()) == signal)
}

/// A line that is put together without memory of the heap. What does not fit is cut.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 256], len: 0 }
    }
}

impl Line {
    fn text(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(slot) = self.bytes.get_mut(self.len) {
                *slot = byte;
                self.len += 1;
            }
        }
    }

    fn hex(&mut self, value: u64) {
        const DIGITS: [&str; 16] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "a", "b", "c", "d", "e", "f"];
        let first = (64 - value.leading_zeros()).div_ceil(4).max(1);
        for place in (0..first).rev() {
            let digit = usize::try_from((value >> (4 * place)) & 0xf).unwrap_or_default();
            self.text(DIGITS.get(digit).copied().unwrap_or_default());
        }
    }

    fn write(&self) {
        let written = self.bytes.get(..self.len).unwrap_or_default();
        // SAFETY: the pointer and length are those of a live slice. Nothing can be done about a failure.
        let _ = unsafe { libc::write(REPORT_FD.load(Ordering::Relaxed), written.as_ptr().cast(), written.len()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_text_and_numbers_and_an_end() {
        let mut line = Line::default();
        line.text("x ");
        line.hex(0);
        line.text(" ");
        line.hex(u64::MAX);
        line.text(" ");
        line.hex(0x10a0);
        assert_eq!(&line.bytes[..line.len], b"x 0 ffffffffffffffff 10a0");
        line.text(&"y".repeat(500));
        assert_eq!(line.len, line.bytes.len());
    }
}
