//! Mounts, and undoing them.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MntFlags, MsFlags};
use serde::{Deserialize, Serialize};

use super::below::{fd_path, open_below};
use super::overlay::{self, MAX_OPTIONS};
use super::{ResourceError, file_error};

/// A mount as a snapshotter describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// File system type, or `bind`.
    pub fs_type: String,
    /// Device or directory.
    pub source: String,
    /// Options in the words of mount(8).
    pub options: Vec<String>,
}

/// Where something is mounted: below a directory that is held open.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The directory.
    pub directory: BorrowedFd<'a>,
    /// The way from there, through no link.
    pub path: &'a Path,
}

impl Mount {
    /// A bind mount of `source` with everything mounted below it.
    pub fn bind(source: &str, read_only: bool) -> Self {
        let access = if read_only { "ro" } else { "rw" };
        Self {
            fs_type: "bind".to_owned(),
            source: source.to_owned(),
            options: vec!["rbind".to_owned(), access.to_owned()],
        }
    }

    /// Whether it shows what is elsewhere already.
    pub fn is_bind(&self) -> bool {
        self.fs_type == "bind" || self.options.iter().any(|option| matches!(option.as_str(), "bind" | "rbind"))
    }

    /// Mounts on `target`, which is unmounted when the result is dropped. A bind mount is one of `bound`, where it is
    /// given, and else of the source's path.
    pub fn mount(&self, target: Target<'_>, bound: Option<BorrowedFd<'_>>) -> Result<Mounted, ResourceError> {
        let parsed = Options::parse(&self.options)
            .map_err(|option| ResourceError::Option { option, source_name: self.source.clone() })?;
        let failed = |source| ResourceError::Mount {
            source_name: self.source.clone(),
            fs_type: self.fs_type.clone(),
            target: target.path.to_owned(),
            source,
        };
        let place = open_below(target.directory, target.path).map_err(failed)?;
        let on = fd_path(place.as_fd());
        let bind = self.is_bind();
        if bind {
            let recursive = parsed.flags & MsFlags::MS_REC;
            let source = bound.map_or_else(|| PathBuf::from(&self.source), fd_path);
            mount(&source, &on, "", MsFlags::MS_BIND | recursive, "").map_err(failed)?;
        } else if self.fs_type == "overlay" {
            mount_overlay(self.source.as_ref(), &on, parsed.flags, parsed.data).map_err(failed)?;
        } else {
            mount(self.source.as_ref(), &on, &self.fs_type, parsed.flags, &parsed.data.join(",")).map_err(failed)?;
        }
        // What is there now is the root of what was mounted.
        let root = open_below(target.directory, target.path).map_err(failed)?;
        let mounted = Mounted { root, target: target.path.to_owned() };
        let on = fd_path(mounted.root.as_fd());
        // The first mount(2) of a bind mount ignores all flags but MS_REC; a second one sets them.
        let own_flags = parsed.flags & !(MsFlags::MS_BIND | MsFlags::MS_REC);
        if bind && !own_flags.is_empty() {
            let kept = kept_flags(&mounted.root).map_err(failed)?;
            mount("".as_ref(), &on, "", MsFlags::MS_BIND | MsFlags::MS_REMOUNT | own_flags | kept, "")
                .map_err(failed)?;
        }
        // What the container mounts or what is mounted here must not show up in other mount namespaces.
        mount("".as_ref(), &on, "", MsFlags::MS_PRIVATE | MsFlags::MS_REC, "").map_err(failed)?;
        Ok(mounted)
    }
}

/// A mount that lasts as long as this value.
#[derive(Debug)]
pub struct Mounted {
    root: OwnedFd,
    target: PathBuf,
}

impl Mounted {
    /// The root of what is mounted.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // By the descriptor: a name may stand for something else by now.
        if let Err(error) = detach(&fd_path(self.root.as_fd()), MntFlags::empty()) {
            tracing::warn!(target = %self.target.display(), %error, "Cannot unmount");
        }
    }
}

/// Unmounts what is on `target`, even while the guest's file system still holds files of it.
pub fn unmount(target: &Path) -> io::Result<()> {
    detach(target, MntFlags::UMOUNT_NOFOLLOW)
}

fn detach(target: &Path, flags: MntFlags) -> io::Result<()> {
    match nix::mount::umount2(target, MntFlags::MNT_DETACH | flags) {
        // Not a mount point, or gone: somebody was faster.
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Mount points below `directory`, the deepest and the latest first.
pub fn mounts_below(directory: &Path) -> Result<Vec<PathBuf>, ResourceError> {
    let table = "/proc/self/mountinfo";
    let text = std::fs::read_to_string(table).map_err(file_error("read", table))?;
    let mut points: Vec<PathBuf> = mount_points(&text).filter(|point| point.starts_with(directory)).collect();
    points.reverse();
    points.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    Ok(points)
}

/// Field 5 of each line of mountinfo (proc_pid_mountinfo(5)), in which blanks are written as octal numbers.
fn mount_points(mountinfo: &str) -> impl Iterator<Item = PathBuf> {
    mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(|field| PathBuf::from(unescape(field)))
}

fn unescape(field: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(field.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

struct Options {
    flags: MsFlags,
    data: Vec<String>,
}

impl Options {
    /// Sorts options into flags and what the file system itself reads. Returns the option that nobody reads.
    fn parse(options: &[String]) -> Result<Self, String> {
        let words: HashMap<&str, (bool, MsFlags)> =
            WORDS.iter().map(|&(word, set, flag)| (word, (set, flag))).collect();
        let mut parsed = Self { flags: MsFlags::empty(), data: Vec::new() };
        for option in options {
            match words.get(option.as_str()) {
                Some(&(true, flag)) => parsed.flags |= flag,
                Some(&(false, flag)) => parsed.flags &= !flag,
                None if option == "loop" || option.starts_with("X-") => return Err(option.clone()),
                None => parsed.data.push(option.clone()),
            }
        }
        Ok(parsed)
    }
}

/// Words of mount(8) that are flags of mount(2): whether the word sets or clears it.
const WORDS: [(&str, bool, MsFlags); 25] = [
    ("defaults", true, MsFlags::empty()),
    ("rw", false, MsFlags::MS_RDONLY),
    ("ro", true, MsFlags::MS_RDONLY),
    ("suid", false, MsFlags::MS_NOSUID),
    ("nosuid", true, MsFlags::MS_NOSUID),
    ("dev", false, MsFlags::MS_NODEV),
    ("nodev", true, MsFlags::MS_NODEV),
    ("exec", false, MsFlags::MS_NOEXEC),
    ("noexec", true, MsFlags::MS_NOEXEC),
    ("async", false, MsFlags::MS_SYNCHRONOUS),
    ("sync", true, MsFlags::MS_SYNCHRONOUS),
    ("dirsync", true, MsFlags::MS_DIRSYNC),
    ("mand", true, MsFlags::MS_MANDLOCK),
    ("nomand", false, MsFlags::MS_MANDLOCK),
    ("atime", false, MsFlags::MS_NOATIME),
    ("noatime", true, MsFlags::MS_NOATIME),
    ("diratime", false, MsFlags::MS_NODIRATIME),
    ("nodiratime", true, MsFlags::MS_NODIRATIME),
    ("relatime", true, MsFlags::MS_RELATIME),
    ("norelatime", false, MsFlags::MS_RELATIME),
    ("strictatime", true, MsFlags::MS_STRICTATIME),
    ("nostrictatime", false, MsFlags::MS_STRICTATIME),
    ("bind", true, MsFlags::MS_BIND),
    ("rbind", true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
    ("silent", true, MsFlags::MS_SILENT),
];

/// Flags that a remount must repeat: leaving one out is an attempt to clear it.
fn kept_flags(root: &OwnedFd) -> io::Result<MsFlags> {
    use nix::sys::statvfs::FsFlags;
    let present = nix::sys::statvfs::fstatvfs(root)?.flags();
    let pairs = [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    Ok(pairs.into_iter().filter(|(there, _)| present.contains(*there)).map(|(_, flag)| flag).collect())
}

fn mount(source: &Path, target: &Path, fs_type: &str, flags: MsFlags, data: &str) -> io::Result<()> {
    fn given(text: &str) -> Option<&str> {
        Some(text).filter(|text| !text.is_empty())
    }
    let source = Some(source).filter(|source| !source.as_os_str().is_empty());
    Ok(nix::mount::mount(source, target, given(fs_type), flags, given(data))?)
}

fn mount_overlay(source: &Path, target: &Path, flags: MsFlags, data: Vec<String>) -> io::Result<()> {
    let Some(compacted) = overlay::compact(&data) else {
        check_length(&data)?;
        return mount(source, target, "overlay", flags, &data.join(","));
    };
    check_length(&compacted.options)?;
    // A thread of its own: the working directory is the process's unless it is unshared.
    thread::scope(|scope| {
        let in_directory = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(&compacted.directory)?;
            mount(source, target, "overlay", flags, &compacted.options.join(","))
        };
        scope.spawn(in_directory).join().unwrap_or_else(|_| Err(io::Error::other("The mounting thread panicked")))
    })
}

fn check_length(options: &[String]) -> io::Result<()> {
    let length = overlay::length(options);
    if length < MAX_OPTIONS {
        return Ok(());
    }
    Err(io::Error::other(format!("Its options are {length} bytes long, and mount(2) reads {}", MAX_OPTIONS - 1)))
}

#[cfg(test)]
mod tests {
    use super::super::below::open_anywhere;
    use super::*;

    fn texts(options: &[&str]) -> Vec<String> {
        options.iter().map(|&option| option.to_owned()).collect()
    }

    #[test]
    fn options_are_flags_or_data() {
        let parsed = Options::parse(&texts(&["rbind", "ro", "nosuid", "size=5m", "rw"])).unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_NOSUID);
        assert_eq!(parsed.data, ["size=5m"]);
        assert_eq!(Options::parse(&texts(&["loop"])).err().as_deref(), Some("loop"));
    }

    #[test]
    fn mount_points_are_read_with_blanks() {
        let table =
            "36 35 98:0 /mnt1 /a\\040b rw,noatime master:1 - ext3 /dev/root rw\n37 35 0:1 / /c rw - tmpfs t rw\n";
        assert_eq!(mount_points(table).collect::<Vec<_>>(), [PathBuf::from("/a b"), PathBuf::from("/c")]);
    }

    #[test]
    fn a_bind_mount_is_read_only_and_goes_when_dropped() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("s"), dir.path().join("t"));
        std::fs::create_dir(&source).unwrap();
        std::fs::create_dir(&target).unwrap();
        std::fs::write(source.join("f"), "x").unwrap();
        let base = open_anywhere(dir.path()).unwrap();
        let on = Target { directory: base.as_fd(), path: Path::new("t") };
        let mounted = Mount::bind(source.to_str().unwrap(), true).mount(on, None).unwrap();
        assert_eq!(mounts_below(dir.path()).unwrap(), std::slice::from_ref(&target));
        assert_eq!(std::fs::read(target.join("f")).unwrap(), b"x");
        assert_eq!(std::fs::write(target.join("g"), "").unwrap_err().raw_os_error(), Some(libc::EROFS));
        drop(mounted);
        assert!(mounts_below(dir.path()).unwrap().is_empty() && !target.join("f").exists());
    }

    #[test]
    fn an_overlay_of_many_layers_mounts() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("snapshots-with-a-long-name-to-fill-a-page-of-options-soon-enough");
        let layers: Vec<String> = (0..60)
            .map(|n| {
                let layer = long.join(n.to_string()).join("fs");
                std::fs::create_dir_all(&layer).unwrap();
                std::fs::write(layer.join(format!("file{n}")), "").unwrap();
                layer.to_str().unwrap().to_owned()
            })
            .collect();
        let target = dir.path().join("t");
        std::fs::create_dir(&target).unwrap();
        let options = vec![format!("lowerdir={}", layers.join(":"))];
        assert!(overlay::length(&options) > MAX_OPTIONS);
        let before = std::env::current_dir().unwrap();
        let mount = Mount { fs_type: "overlay".to_owned(), source: "overlay".to_owned(), options };
        let base = open_anywhere(dir.path()).unwrap();
        match mount.mount(Target { directory: base.as_fd(), path: Path::new("t") }, None) {
            Ok(_mounted) => assert!(target.join("file0").exists() && target.join("file59").exists()),
            // Not every file system can be a layer, a container's own overlay for instance.
            Err(ResourceError::Mount { source, .. }) => {
                assert_eq!(source.raw_os_error(), Some(libc::EINVAL));
                eprintln!("skipped: no overlay on this file system");
            }
            Err(error) => panic!("{error}"),
        }
        assert_eq!(std::env::current_dir().unwrap(), before);
    }
}
