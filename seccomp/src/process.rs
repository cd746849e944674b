//! Processes as a whole, and threads that were there before their role was known.

use std::sync::{Mutex, PoisonError};

use crate::{ConfineError, Confinement, Role, filter, privileges, trap};

/// Gives up what a process that serves a guest does not need: gaining privileges, and all capabilities but those for
/// files. Capabilities belong to threads, so this is for a process that has one thread yet; the others inherit it.
pub fn drop_privileges() -> Result<(), ConfineError> {
    privileges::no_new_privileges()?;
    privileges::keep_file_capabilities()
}

/// Takes all capabilities from the calling thread, and from those that it starts.
pub fn drop_capabilities() -> Result<(), ConfineError> {
    privileges::keep_no_capabilities()
}

/// Leaves a helper process, which mounts file systems and starts programs of others, what these take, and refuses it
/// the rest. The programs inherit the refusals, and may gain their own privileges. Needs `CAP_SYS_ADMIN`.
pub fn confine_helper() -> Result<(), ConfineError> {
    filter::install_helper()?;
    privileges::keep_mount_capabilities()
}

/// Whether the ceiling is over this process.
static CEILING: Mutex<bool> = Mutex::new(false);

/// Whether this process is below its ceiling, where paths that its threads need no more are out of reach.
pub fn is_confined() -> bool {
    *CEILING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Puts the ceiling over all threads that there are and will be. Must come before the first [`spawn`](crate::spawn):
/// the kernel puts no filter under another. A second call, as after a start that failed, does nothing.
pub fn confine_process(confinement: Confinement) -> Result<(), ConfineError> {
    if confinement == Confinement::Off {
        confinement.announce();
        return Ok(());
    }
    let mut confined = CEILING.lock().unwrap_or_else(PoisonError::into_inner);
    if !*confined {
        trap::install_handler()?;
        privileges::no_new_privileges()?;
        filter::install_ceiling()?;
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

/// Puts the calling thread into its role, and the threads that it starts from now on. For a thread that was there
/// before the guest was: the others are [`spawn`](crate::spawn)ed in theirs. A second call does nothing.
pub fn take_role(confinement: Confinement, role: Role) -> Result<(), ConfineError> {
    if confinement == Confinement::Off || trap::has_role(role) {
        return Ok(());
    }
    crate::thread::enter(role.into())
}
