//! The compiled filters, and how the kernel gets them.

use std::io;

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

/// Puts the calling thread, and every thread that it starts, under the filter of `role`.
pub fn install(role: Role) -> Result<(), ConfineError> {
    load(program(role), 0).map(drop).map_err(|source| ConfineError::Filter { filter: role.name(), source })
}

/// Puts all threads under the ceiling.
pub fn install_ceiling() -> Result<(), ConfineError> {
    let answer = load(CEILING, libc::SECCOMP_FILTER_FLAG_TSYNC);
    match answer.map_err(|source| ConfineError::Filter { filter: "ceiling", source })? {
        0 => Ok(()),
        thread => Err(ConfineError::Diverged(thread)),
    }
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

    #[test]
    fn programs_have_the_size_that_their_rules_make() {
        // The kernel translates a program for each thread that comes under it: more than these is a sign of a rule that
        // should be another.
        for (program, most) in
            [(API, 256), (IO, 384), (VCPU, 512), (FS, 256), (UFFD, 192), (CEILING, 1024), (HELPER, 96)]
        {
            assert!((32..most).contains(&program.len()), "{} of {most}", program.len());
        }
    }
}
