//! Fewer privileges for a target that hands a guest's wishes to the host's kernel.

use std::fs;

/// Whom files belong to that belong to nobody.
const NOBODY: u32 = 65534;

/// Most bytes of a file that a target may make: a region of guest memory is one.
const MAX_FILE: libc::rlim_t = devices::testkit::REGION_SIZE;

/// Makes the process nobody's, and root of namespaces for users, mounts and networks in which there is nothing else: a finding must not
/// cost the host its files, and no device node can be made. Files do not grow without end.
pub fn become_nobody() {
    // SAFETY: none of these calls touches memory but the structure that lives until it returned.
    unsafe {
        let limit = libc::rlimit { rlim_cur: MAX_FILE, rlim_max: MAX_FILE };
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0, "A limit for files");
        // A write past the limit is an error, not the end.
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        if libc::geteuid() == 0 {
            assert_eq!(libc::setgroups(0, std::ptr::null()), 0, "No groups");
            assert_eq!(libc::setresgid(NOBODY, NOBODY, NOBODY), 0, "Nobody's group");
            assert_eq!(libc::setresuid(NOBODY, NOBODY, NOBODY), 0, "Nobody");
            // Or /proc/self would be root's.
            libc::prctl(libc::PR_SET_DUMPABLE, 1);
        }
        let (uid, gid) = (libc::geteuid(), libc::getegid());
        assert_eq!(
            libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWNET),
            0,
            "User namespaces for users"
        );
        fs::write("/proc/self/setgroups", "deny").expect("No groups in the namespace");
        fs::write("/proc/self/uid_map", format!("0 {uid} 1")).expect("A user in the namespace");
        fs::write("/proc/self/gid_map", format!("0 {gid} 1")).expect("A group in the namespace");
    }
}

/// Leaves the host's network for one that has nothing. Only root may use `/dev/net/tun` on most hosts, and stays root.
pub fn leave_network() {
    // SAFETY: no memory is involved.
    match unsafe { libc::geteuid() } {
        // SAFETY: no memory is involved.
        0 => assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "A network namespace"),
        _ => become_nobody(),
    }
}
