//! What a guest may name: entries of directories, and extended attributes.

use std::ffi::CStr;
use std::io;

/// Extended attributes that a guest sees and sets.
///
/// Not `trusted.`: `trusted.overlay.` would steer an overlay that the host mounts over the
/// directory later. Of `security.` only file capabilities, which mean nothing on a host that does
/// not run the file; labels are the host's own.
const XATTR_NAMESPACES: [&[u8]; 3] = [b"user.", b"security.capability", b"system.posix_acl_"];

/// Refuses what is not the name of one entry: a path, or a directory's names for itself and its
/// parent. Linux resolves those itself and never asks for them.
pub fn check(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(()),
    }
}

/// Refuses extended attributes that are not for guests.
pub fn check_xattr(name: &CStr) -> io::Result<()> {
    if is_for_guests(name.to_bytes()) { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)) }
}

/// Keeps of a list of names, each ended by a zero, those that are for guests.
pub fn keep_xattrs(names: &[u8]) -> Vec<u8> {
    names.split_inclusive(|byte| *byte == 0).filter(|name| is_for_guests(name)).flatten().copied().collect()
}

fn is_for_guests(name: &[u8]) -> bool {
    XATTR_NAMESPACES.iter().any(|namespace| name.starts_with(namespace))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_entries() {
        for bad in [c"", c".", c"..", c"/", c"a/b", c"../x", c"x/..", c"/etc"] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
        for good in [c"a", c"...", c".a", c"..a", c"a..", c" ", c"\xff"] {
            assert!(check(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn only_attributes_for_guests() {
        assert!(check_xattr(c"user.x").is_ok());
        assert!(check_xattr(c"trusted.overlay.redirect").is_err());
        assert_eq!(
            keep_xattrs(b"security.selinux\0user.a\0trusted.b\0security.capability\0"),
            b"user.a\0security.capability\0"
        );
    }
}
