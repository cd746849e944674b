//! The process as a whole.

use std::sync::{Mutex, PoisonError};

use crate::{ConfineError, Confinement, filter, privileges, trap};

/// Gives up what a process that serves a guest does not need: gaining privileges, and all capabilities but those for
/// files. Capabilities belong to threads, so this is for a process that has one thread yet; the others inherit it.
pub fn drop_privileges() -> Result<(), ConfineError> {
    privileges::no_new_privileges()?;
    privileges::keep_file_capabilities()
}

/// As [`drop_privileges`], for a process that goes on to mount file systems and to start programs of others: those
/// capabilities stay, and programs may gain theirs.
pub fn drop_privileges_but_mounts() -> Result<(), ConfineError> {
    privileges::keep_mount_capabilities()
}

/// Refuses what no sandbox needs to all threads that there are and will be, and to the programs that they start. For a
/// process that mounts and starts programs: the ceiling would end those. Must come before the first
/// [`spawn`](crate::spawn). Needs `CAP_SYS_ADMIN`. A second call, as after a start that failed, does nothing.
pub fn confine_sandbox(confinement: Confinement) -> Result<(), ConfineError> {
    static CONFINED: Mutex<bool> = Mutex::new(false);
    if confinement == Confinement::Off {
        return Ok(());
    }
    let mut confined = CONFINED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*confined {
        filter::install_sandbox()?;
        *confined = true;
    }
    Ok(())
}

/// For a program that is a machine and nothing else, when it has opened what its operator named: it gains no privileges,
/// starts no programs, keeps the capabilities that files take, and is under the ceiling. As for [`confine_process`]; and
/// capabilities belong to threads, so there must be one thread yet.
pub fn confine_machine() -> Result<(), ConfineError> {
    drop_privileges()?;
    privileges::refuse_programs()?;
    confine_process(Confinement::On)
}

/// Puts the ceiling over all threads that there are and will be. Must come before the first [`spawn`](crate::spawn):
/// the kernel puts no filter under another.
pub fn confine_process(confinement: Confinement) -> Result<(), ConfineError> {
    if confinement == Confinement::Off {
        confinement.announce();
        return Ok(());
    }
    trap::install_handler()?;
    privileges::no_new_privileges()?;
    filter::install_ceiling()
}
