//! What a thread gives up before its filter: gaining privileges, capabilities, the file system.

use std::io;
use std::os::fd::OwnedFd;

use caps::{CapSet, Capability, CapsHashSet};
use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError,
};

use crate::{ConfineError, Post, Role};

/// Landlock as in Linux 5.19, the first that lets a thread move files to another directory. Debian 12 has it.
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

/// Takes from the calling thread what its role does not need.
pub fn give_up(post: Post) -> Result<(), ConfineError> {
    no_new_privileges()?;
    match post.role() {
        Role::Api => keep(&[]),
        Role::Fs => {
            close_all_but(post.ground)?;
            keep(&FILES)
        }
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

/// What nobody does with files for a guest: to run them, and to make devices.
fn never() -> BitFlags<AccessFs> {
    AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock
}

/// Takes from the calling thread, and those that it starts, what [`never`] has. Links and pipes are made for guests in the
/// directories that are theirs. Where the kernel has no Landlock, or has that of before Linux 5.19, nothing happens.
pub fn refuse_programs() -> Result<(), ConfineError> {
    // A thread that is restricted in anything moves no file to another directory, unless a rule says that it may.
    let ruleset = ruleset(never() | AccessFs::Refer, CompatLevel::SoftRequirement)?;
    ruleset.add_rule(PathBeneath::new(PathFd::new("/")?, AccessFs::Refer))?.restrict_self()?;
    Ok(())
}

/// Leaves the calling thread the descriptors that it has, and no path. Only a socket file can be removed: that of the
/// vsock device, by whoever drops the device. Where the kernel has no Landlock nothing happens.
fn close_file_system() -> Result<(), ConfineError> {
    ruleset(AccessFs::from_all(LANDLOCK) & !AccessFs::RemoveFile, CompatLevel::BestEffort)?.restrict_self()?;
    Ok(())
}

/// Leaves the calling thread the descriptors that it has, and what is below `ground`, also by mounts. Where the kernel has
/// no Landlock, or has that of before Linux 5.19, nothing happens.
fn close_all_but(ground: Option<OwnedFd>) -> Result<(), ConfineError> {
    let all = AccessFs::from_all(LANDLOCK);
    let rule = ground.map(|directory| Ok::<_, RulesetError>(PathBeneath::new(directory, all & !never())));
    ruleset(all, CompatLevel::SoftRequirement)?.add_rules(rule)?.restrict_self()?;
    Ok(())
}

/// What refuses `access` wherever no rule is added that allows it.
fn ruleset(access: BitFlags<AccessFs>, level: CompatLevel) -> Result<RulesetCreated, RulesetError> {
    Ruleset::default().set_compatibility(level).handle_access(access)?.create()
}
