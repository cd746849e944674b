//! The compiled filters, and how the kernel gets them.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::sock_filter;

use crate::{ConfineError, Role};

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

fn program(role: Role) -> &'static [sock_filter] {
    match role {
        Role::Api => API,
        Role::Io => IO,
        Role::Vcpu => VCPU,
        Role::Fs => FS,
        Role::Uffd => UFFD,
    }
}

/// Whether clone3 is refused to all threads already. Each call of a thread goes through all of its filters.
static CEILING_INSTALLED: AtomicBool = AtomicBool::new(false);

/// Puts the calling thread, and every thread that it starts, under the filter of `role`.
pub fn install(role: Role) -> Result<(), ConfineError> {
    let failed = |source| ConfineError::Filter { filter: role.name(), source };
    if !CEILING_INSTALLED.load(Ordering::Acquire) {
        load(REFUSE_CLONE3, 0).map_err(failed)?;
    }
    load(program(role), 0).map(drop).map_err(failed)
}

/// Puts all threads under the ceiling.
pub fn install_ceiling() -> Result<(), ConfineError> {
    for program in [REFUSE_CLONE3, CEILING] {
        let failed = |source| ConfineError::Filter { filter: "ceiling", source };
        match load(program, libc::SECCOMP_FILTER_FLAG_TSYNC).map_err(failed)? {
            0 => {}
            thread => return Err(ConfineError::Diverged(thread)),
        }
    }
    CEILING_INSTALLED.store(true, Ordering::Release);
    Ok(())
}

/// Puts the calling thread, and the programs that it starts, under the helper's filter.
pub fn install_helper() -> Result<(), ConfineError> {
    load(HELPER, 0).map(drop).map_err(|source| ConfineError::Filter { filter: "helper", source })
}

/// seccomp(2). With `SECCOMP_FILTER_FLAG_TSYNC` a positive answer is the thread that stands in the way.
fn load(program: &'static [sock_filter], flags: libc::c_ulong) -> io::Result<i64> {
    let len = libc::c_ushort::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: `program` points to `len` instructions, which the kernel copies and does not write to.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) } {
        -1 => Err(io::Error::last_os_error()),
        answer => Ok(answer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's limit for one program (BPF_MAXINSNS). Each call of a thread walks through it: half of that is a
    /// sign of a rule that should be another.
    const MOST: usize = 2048;

    #[test]
    fn programs_have_the_size_that_their_rules_make() {
        let clone3_and_architecture = REFUSE_CLONE3.len();
        assert!(clone3_and_architecture < 12, "{clone3_and_architecture}");
        for role in [API, IO, VCPU, FS, UFFD] {
            assert!(role.len() > clone3_and_architecture && role.len() < CEILING.len());
        }
        assert!(CEILING.len() < MOST, "{}", CEILING.len());
        // Each processor's exit pays for this one.
        assert!(VCPU.len() < 640, "{}", VCPU.len());
    }
}
