//! What a thread gives up before its filter: gaining privileges, capabilities, the file system.

use std::io;

use caps::{CapSet, Capability, CapsHashSet};
use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};

use crate::{ConfineError, Role};

/// Landlock as in Linux 5.19, which Debian 12 has; an older kernel is asked for what it knows.
const LANDLOCK: ABI = ABI::V2;

/// What reading and writing files in the name of a guest's users takes (capabilities(7)).
const FILES: [Capability; 9] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];

/// From now on no program that the thread starts has more privileges than it. seccomp(2) asks for it.
pub fn no_new_privileges() -> Result<(), ConfineError> {
    // SAFETY: prctl(2) with integers alone.
    match unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(ConfineError::NoNewPrivileges(io::Error::last_os_error())),
    }
}

/// What a sandbox's helper takes beside [`FILES`] to mount root file systems: overlayfs works on its layers with the
/// capabilities of whoever mounted it.
const MOUNTS: [Capability; 6] = [
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SYS_RESOURCE,
    Capability::CAP_SYS_NICE,
    Capability::CAP_IPC_LOCK,
    Capability::CAP_KILL,
    Capability::CAP_NET_ADMIN,
];

/// Leaves the calling thread the capabilities that files take.
pub fn keep_file_capabilities() -> Result<(), ConfineError> {
    keep(&FILES)
}

/// Leaves the calling thread no capabilities.
pub fn keep_no_capabilities() -> Result<(), ConfineError> {
    keep(&[])
}

/// Leaves the calling thread the capabilities that files and mounts take.
pub fn keep_mount_capabilities() -> Result<(), ConfineError> {
    keep(&[FILES.as_slice(), MOUNTS.as_slice()].concat())
}

/// Takes from the calling thread what `role` does not need.
pub fn give_up(role: Role) -> Result<(), ConfineError> {
    no_new_privileges()?;
    match role {
        Role::Api => keep(&[]),
        Role::Fs => keep(&FILES),
        Role::Io | Role::Vcpu | Role::Uffd => {
            close_file_system()?;
            keep(&[])
        }
    }
}

fn keep(wanted: &[Capability]) -> Result<(), ConfineError> {
    let wanted: CapsHashSet = wanted.iter().copied().collect();
    let kept = &caps::read(None, CapSet::Permitted)? & &wanted;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    caps::clear(None, CapSet::Inheritable)?;
    Ok(())
}

/// Takes from the calling thread, and those that it starts, what no machine does with files: to run them, and to make
/// devices. Links and pipes are made for guests in the directories that are theirs. Where the kernel has no Landlock
/// nothing happens.
pub fn refuse_programs() -> Result<(), ConfineError> {
    let access = AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock;
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(access)?.create()?;
    ruleset.restrict_self()?;
    Ok(())
}

/// Leaves the calling thread the descriptors that it has, and no path. Only a socket file can be removed: that of the
/// vsock device, by whoever drops the device. Where the kernel has no Landlock nothing happens.
fn close_file_system() -> Result<(), ConfineError> {
    let access = AccessFs::from_all(LANDLOCK) & !AccessFs::RemoveFile;
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(access)?.create()?;
    ruleset.restrict_self()?;
    Ok(())
}
