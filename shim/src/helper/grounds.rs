//! What the helper may be asked for. Until the guest runs the shim is believed, and what containerd has named through it
//! is remembered. From then on
//!
//! - a volume is one that the specification in the container's bundle names, which containerd has written;
//! - a root file system comes from where the snapshotter keeps that of the first container, or is the bundle's own;
//! - a logging program is the one that containerd has named for the first container, with the same arguments.
//!
//! At no time is anything of the host's kernel (`/proc`, `/sys`, devices) or of another sandbox mounted.

use std::fs::File;
use std::io::{self, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, PROC_SUPER_MAGIC, SYSFS_MAGIC, fstatfs};
use serde::{Deserialize, Serialize};

use super::wire::Program;
use crate::ids::Id;
use crate::resources::below::{fd_path, open_anywhere, open_below};
use crate::resources::mount::Mount;

/// File with the specification in a bundle (runtime specification, bundle.md).
const SPECIFICATION: &str = "config.json";
/// Longest specification that is read: containerd passes it on in one message of at most 16 MiB.
const MAX_SPECIFICATION: u64 = 16 << 20;
/// A snapshotter's directory lies at least so deep, as `/var/lib/x` does. What lies above holds other things too.
const SHALLOWEST_ROOT: usize = 3;
/// Options of overlayfs that name directories.
const OVERLAY_DIRECTORIES: [&str; 3] = ["lowerdir", "upperdir", "workdir"];

/// What containerd has named before the guest runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// The first container's root file system, as the snapshotter gave it.
    pub rootfs: Vec<Mount>,
    /// The first container's logging program.
    pub logger: Option<Program>,
}

/// Why something is not done.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The guest runs, and nobody has named this before.
    #[error("{what} was not named before the guest ran, so it is not taken from a shim with a guest")]
    Unnamed {
        /// What.
        what: String,
    },
    /// The specification does not have the volume.
    #[error("The specification of {container} has no mount of {}", path.display())]
    NoVolume {
        /// The container.
        container: Id,
        /// The file on the host.
        path: PathBuf,
    },
    /// What never leaves the host.
    #[error("{} is {kind} of the host, which no guest gets", path.display())]
    Host {
        /// The file.
        path: PathBuf,
        /// What kind of file it is.
        kind: &'static str,
    },
    /// A source cannot be opened.
    #[error("Cannot use {}", path.display())]
    Source {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The specification cannot be read.
    #[error("Cannot read the specification of {container}")]
    Specification {
        /// The container.
        container: Id,
        /// What the system said.
        source: io::Error,
    },
}

/// The rules, and what they are measured by.
#[derive(Debug)]
pub struct Grounds {
    /// Directory with the bundles of the namespace's containers, which are named like them.
    bundles: OwnedFd,
    /// Directory with the state of all sandboxes.
    state: PathBuf,
    roots: Vec<PathBuf>,
    types: Vec<String>,
    logger: Option<Program>,
    sealed: bool,
}

/// What is read of a specification.
#[derive(Deserialize)]
struct Specification {
    root: Option<Root>,
    #[serde(default)]
    mounts: Vec<SpecifiedMount>,
}

#[derive(Deserialize)]
struct Root {
    path: PathBuf,
}

#[derive(Deserialize)]
struct SpecifiedMount {
    source: Option<PathBuf>,
}

impl Grounds {
    /// Rules for a sandbox of the containers whose bundles are in `bundles`. `state` has the state of all sandboxes.
    pub fn new(bundles: &Path, state: PathBuf) -> io::Result<Self> {
        let bundles = open_anywhere(bundles)?;
        Ok(Self { bundles, state, roots: Vec::new(), types: Vec::new(), logger: None, sealed: false })
    }

    /// Takes another directory with bundles.
    pub fn adopt(&mut self, bundles: &Path) -> Result<(), Refusal> {
        if self.sealed {
            return Err(unnamed("Another place of bundles"));
        }
        self.bundles = open_anywhere(bundles).map_err(|source| Refusal::Source { path: bundles.to_owned(), source })?;
        Ok(())
    }

    /// Remembers what containerd has named.
    pub fn admit(&mut self, named: Named) -> Result<(), Refusal> {
        if self.sealed {
            return Err(Refusal::Unnamed { what: "A second sandbox".to_owned() });
        }
        self.roots.clear();
        for mount in &named.rootfs {
            self.types.push(mount.fs_type.clone());
            self.roots.extend(sources(mount).filter_map(snapshotters_directory));
        }
        self.roots.sort();
        self.roots.dedup();
        self.logger = named.logger;
        Ok(())
    }

    /// From now on the shim is not believed.
    pub fn seal(&mut self) {
        self.sealed = true;
    }

    /// Looks at a part of a root file system. Returns what is to be bound, where it is a bind mount.
    pub fn rootfs(&self, mount: &Mount) -> Result<Option<OwnedFd>, Refusal> {
        let mut opened = None;
        for source in sources(mount) {
            opened = Some(self.source(Path::new(source))?);
        }
        if mount.is_bind() {
            return opened.map(Some).ok_or_else(|| unnamed("A root file system without a source"));
        }
        if self.sealed {
            if !self.types.contains(&mount.fs_type) {
                return Err(unnamed(format!("A root file system of type {}", mount.fs_type)));
            }
            if let Some(option) = mount.options.iter().find(|option| names_another_file(option)) {
                return Err(unnamed(format!("The mount option {option}")));
            }
        }
        Ok(None)
    }

    /// The root file system in a container's bundle.
    pub fn bundle_rootfs(&self, container: &Id) -> Result<OwnedFd, Refusal> {
        let root = self.specification(container)?.root.map_or_else(|| "rootfs".into(), |root| root.path);
        let opened = if root.is_absolute() {
            open_anywhere(&root)
        } else {
            open_below(self.bundles.as_fd(), &Path::new(container.as_str()).join(&root))
        };
        let opened = opened.map_err(|source| Refusal::Source { path: root.clone(), source })?;
        self.is_a_containers(&opened, &root)?;
        Ok(opened)
    }

    /// A file or directory of the host for a container, and its name.
    pub fn volume(&self, container: &Id, source: &Path) -> Result<(OwnedFd, String), Refusal> {
        let named = self.specification(container)?.mounts.iter().any(|mount| mount.source.as_deref() == Some(source));
        if !named {
            return Err(Refusal::NoVolume { container: container.clone(), path: source.to_owned() });
        }
        // Symlinks are followed now, by the host, and never again.
        let opened =
            open_anywhere(source).map_err(|error| Refusal::Source { path: source.to_owned(), source: error })?;
        let real = self.is_a_containers(&opened, source)?;
        Ok((opened, real.file_name().map_or_else(|| "root".to_owned(), |name| name.to_string_lossy().into_owned())))
    }

    /// Whether the program may be started.
    pub fn logger(&self, program: &Program) -> Result<(), Refusal> {
        if self.sealed && self.logger.as_ref() != Some(program) {
            return Err(unnamed(format!("The logging program {}", program.path.display())));
        }
        Ok(())
    }

    /// A directory or device that a root file system is made of.
    fn source(&self, path: &Path) -> Result<OwnedFd, Refusal> {
        let failed = |source| Refusal::Source { path: path.to_owned(), source };
        if !self.sealed {
            return open_anywhere(path).map_err(failed);
        }
        let inside = |root: &&PathBuf| path.starts_with(root) && path != root.as_path();
        let root = self.roots.iter().find(inside).ok_or_else(|| unnamed(path.display().to_string()))?;
        let rest = path.strip_prefix(root).unwrap_or(Path::new(""));
        // The snapshotter's own directory may be reached by a link; what is in it may be a guest's, so there none counts.
        let opened = open_anywhere(root).and_then(|root| open_below(root.as_fd(), rest)).map_err(failed)?;
        let kind = kind_of(&opened).map_err(failed)?;
        if kind == SFlag::S_IFBLK { Ok(opened) } else { self.is_a_containers(&opened, path).map(|_| opened) }
    }

    /// Refuses what is never a container's. Returns the real path.
    fn is_a_containers(&self, opened: &OwnedFd, path: &Path) -> Result<PathBuf, Refusal> {
        let failed = |source| Refusal::Source { path: path.to_owned(), source };
        let host = |kind| Refusal::Host { path: path.to_owned(), kind };
        let kind = kind_of(opened).map_err(failed)?;
        if kind == SFlag::S_IFBLK || kind == SFlag::S_IFCHR {
            return Err(host("a device"));
        }
        let system = fstatfs(opened).map_err(|errno| failed(errno.into()))?.filesystem_type();
        if [PROC_SUPER_MAGIC, SYSFS_MAGIC, CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC].contains(&system) {
            return Err(host("a file of the kernel"));
        }
        let real = std::fs::read_link(fd_path(opened.as_fd())).map_err(failed)?;
        if real.starts_with(&self.state) {
            return Err(host("the state of sandboxes"));
        }
        Ok(real)
    }

    fn specification(&self, container: &Id) -> Result<Specification, Refusal> {
        let failed = |source| Refusal::Specification { container: container.clone(), source };
        let path = Path::new(container.as_str()).join(SPECIFICATION);
        let file = open_below(self.bundles.as_fd(), &path).map_err(failed)?;
        // The descriptor stands for the file's place only; reading it takes another.
        let file = File::open(fd_path(file.as_fd())).map_err(failed)?;
        let limited = io::Read::take(BufReader::new(file), MAX_SPECIFICATION);
        serde_json::from_reader(limited).map_err(|error| failed(error.into()))
    }
}

fn unnamed(what: impl Into<String>) -> Refusal {
    Refusal::Unnamed { what: what.into() }
}

fn kind_of(opened: &OwnedFd) -> io::Result<SFlag> {
    Ok(SFlag::from_bits_truncate(fstat(opened)?.st_mode) & SFlag::S_IFMT)
}

/// The files of the host that a mount is made of.
fn sources(mount: &Mount) -> impl Iterator<Item = &str> {
    let directories = mount.options.iter().filter_map(|option| {
        let (key, value) = option.split_once('=')?;
        OVERLAY_DIRECTORIES.contains(&key).then_some(value)
    });
    let overlay = mount.fs_type == "overlay" && !mount.is_bind();
    let own = (!overlay).then_some(mount.source.as_str());
    own.into_iter().chain(directories.filter(move |_| overlay).flat_map(|value| value.split(':')))
}

/// An option with a path in it that [`sources`] does not know.
fn names_another_file(option: &str) -> bool {
    let known = option.split_once('=').is_some_and(|(key, _)| OVERLAY_DIRECTORIES.contains(&key));
    option.contains('\\') || (option.contains('/') && !known)
}

/// Where a snapshotter keeps its snapshots: `…/snapshots` of `…/snapshots/7/fs`, `/dev/mapper` of `/dev/mapper/x`.
fn snapshotters_directory(source: &str) -> Option<PathBuf> {
    let path = Path::new(source);
    let plain = path.is_absolute() && path.components().skip(1).all(|part| matches!(part, Component::Normal(_)));
    if path.starts_with("/dev") {
        let parent = path.parent().filter(|parent| *parent != Path::new("/dev"));
        return parent.filter(|_| plain).map(Path::to_owned);
    }
    let directory = path.parent()?.parent()?;
    let deep = directory.components().count() > SHALLOWEST_ROOT;
    (plain && deep).then(|| directory.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshotters_directory_is_two_levels_up_and_not_near_the_root() {
        let of = |path: &str| snapshotters_directory(path).map(|path| path.display().to_string());
        let snapshots = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
        assert_eq!(of(&format!("{snapshots}/7/fs")).as_deref(), Some(snapshots));
        assert_eq!(of("/var/lib/x/7/fs").as_deref(), Some("/var/lib/x"));
        assert_eq!(of("/var/lib/7/fs"), None);
        assert_eq!(of("/var/lib/x/../7/fs"), None);
        assert_eq!(of("tank/7/fs/x/y/z"), None);
        assert_eq!(of("/dev/mapper/pool-snap-7").as_deref(), Some("/dev/mapper"));
        assert_eq!(of("/dev/sda"), None);
    }

    #[test]
    fn the_files_of_a_mount_are_its_source_or_its_layers() {
        let mount = |fs_type: &str, source: &str, options: &[&str]| Mount {
            fs_type: fs_type.to_owned(),
            source: source.to_owned(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
        };
        let overlay = mount("overlay", "overlay", &["index=off", "lowerdir=/a:/b", "upperdir=/c", "workdir=/d"]);
        assert_eq!(sources(&overlay).collect::<Vec<_>>(), ["/a", "/b", "/c", "/d"]);
        assert_eq!(sources(&mount("bind", "/a", &["rbind"])).collect::<Vec<_>>(), ["/a"]);
        // A bind mount stays one, whatever it calls itself.
        assert_eq!(sources(&mount("overlay", "/a", &["bind", "lowerdir=/b"])).collect::<Vec<_>>(), ["/a"]);
        for option in ["datadir+=/x", "lowerdir=/a\\:b", "foo=/x"] {
            assert!(names_another_file(option), "{option}");
        }
        assert!(!names_another_file("lowerdir=/a:/b") && !names_another_file("index=off"));
    }
}
