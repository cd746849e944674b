//! Looking into a container's root file system from outside, without following its links out of it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};

/// `/etc/passwd` is read up to here.
const MAX_PASSWD: u64 = 1 << 20;

fn open_in(root: &OwnedFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

fn open_root(rootfs: &Path) -> io::Result<OwnedFd> {
    Ok(File::open(rootfs)?.into())
}

/// The home directory that the container's `/etc/passwd` gives to a user; `/` if it gives none, as runc does.
pub fn home(rootfs: &Path, uid: u32) -> String {
    read_passwd(rootfs).ok().and_then(|passwd| find_home(&passwd, uid)).unwrap_or_else(|| "/".to_owned())
}

fn read_passwd(rootfs: &Path) -> io::Result<String> {
    // O_NONBLOCK: a FIFO in the file's place must not hold up the agent.
    let file = open_in(&open_root(rootfs)?, Path::new("etc/passwd"), OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
    let mut bytes = Vec::new();
    File::from(file).take(MAX_PASSWD).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// passwd(5): name, password, uid, gid, comment, home, shell.
fn find_home(passwd: &str, uid: u32) -> Option<String> {
    let uid = uid.to_string();
    let of_user = |line: &str| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2) == Some(&uid.as_str())).then(|| fields.get(5).map(|&home| home.to_owned()))?
    };
    passwd.lines().find_map(of_user).filter(|home| !home.is_empty())
}

/// Makes the working directory if the image lacks it, as runc does. A root that is read-only, or in which something
/// else is in the way, is left alone: entering the directory will say what is wrong.
pub fn ensure_directory(rootfs: &Path, path: &Path) -> io::Result<()> {
    let mut current = open_root(rootfs)?;
    let root = current.try_clone()?;
    let mut walked = Path::new("/").to_owned();
    for component in path.components() {
        let Component::Normal(name) = component else { continue };
        walked.push(name);
        let next = open_in(&root, &walked, OFlag::O_PATH | OFlag::O_DIRECTORY);
        current = match next {
            Err(Errno::ENOENT) => {
                mkdirat(&current, name, Mode::from_bits_truncate(0o755))?;
                open_in(&root, &walked, OFlag::O_PATH | OFlag::O_DIRECTORY)?
            }
            other => other?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn homes_come_from_the_containers_passwd() {
        let root = tempfile::tempdir().expect("A directory");
        assert_eq!(home(root.path(), 0), "/");
        fs::create_dir(root.path().join("etc")).expect("New");
        fs::write(root.path().join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nbroken\nx:x:5:5::\n").expect("New");
        assert_eq!(home(root.path(), 0), "/root");
        assert_eq!(home(root.path(), 5), "/");
        assert_eq!(home(root.path(), 6), "/");
    }

    #[test]
    fn links_do_not_lead_out_of_the_root() {
        let root = tempfile::tempdir().expect("A directory");
        let outside = tempfile::tempdir().expect("A directory");
        symlink(outside.path(), root.path().join("out")).expect("New");
        symlink("/", root.path().join("top")).expect("New");
        assert!(ensure_directory(root.path(), Path::new("/out/made")).is_err());
        assert!(!outside.path().join("made").exists());
        ensure_directory(root.path(), Path::new("/top/a/b")).expect("Inside");
        ensure_directory(root.path(), Path::new("/a/b")).expect("There already");
        assert!(root.path().join("a/b").is_dir());
    }
}
