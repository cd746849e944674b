//! The shim's place in the host's control groups.
//!
//! The sandbox's cgroup path comes from its specification. The whole process moves there: vCPU and device threads are
//! its threads, so what the guest uses is charged to the pod, as kata's `sandbox_cgroup_only` does it. Both hierarchies
//! are served: one unified (cgroups(7), version 2), or one for each controller (version 1).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{ResourceError, file_error};

const MEMBERS: &str = "cgroup.procs";
/// A directory can vanish between two steps when another sandbox of the same parent ends; more than a few times in a
/// row is something else.
const ATTEMPTS: usize = 5;

/// How long a thread may take from its last instruction to its end, on a host that has other things to do.
const ENDING: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(1);

/// A path in the hierarchy, from the specification's `cgroupsPath`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupPath(PathBuf);

impl CgroupPath {
    /// Reads a path or systemd's form `slice:prefix:name`. `None` when there is none, or it leaves the hierarchy.
    pub fn parse(text: &str) -> Option<Self> {
        let path = match text.split(':').collect::<Vec<_>>().as_slice() {
            [slice, prefix, name] => systemd_path(slice, prefix, name),
            _ => PathBuf::from(text.trim_start_matches('/')),
        };
        let plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        (plain && !path.as_os_str().is_empty()).then_some(Self(path))
    }
}

/// Where systemd puts a scope: `a-b.slice` is inside `a.slice` (systemd.slice(5)).
fn systemd_path(slice: &str, prefix: &str, name: &str) -> PathBuf {
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let mut path = PathBuf::new();
    let mut so_far = String::new();
    for part in slice.trim_end_matches(".slice").split('-').filter(|part| !part.is_empty()) {
        if !so_far.is_empty() {
            so_far.push('-');
        }
        so_far.push_str(part);
        path.push(format!("{so_far}.slice"));
    }
    path.join(if name.ends_with(".slice") { name.to_owned() } else { format!("{prefix}-{name}.scope") })
}

/// A mounted hierarchy and where this process is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    /// The process's own directory, absolute.
    own: PathBuf,
    /// New groups of a version 1 `cpuset` hierarchy take no process until CPUs and memory nodes are written.
    cpuset: bool,
}

/// Directories made for a sandbox; what `delete` needs to remove them.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeDirectories(Vec<PathBuf>);

impl MadeDirectories {
    /// Removes the directories, the deepest first. One that others use by now stays. Waits for threads that are ending: the
    /// kernel says that one is gone before it has left its group.
    pub fn remove(&self) {
        let begun = Instant::now();
        for directory in self.0.iter().rev() {
            let removed = loop {
                match fs::remove_dir(directory) {
                    Err(error) if is_busy(&error) && begun.elapsed() < ENDING && is_left(directory) => {
                        thread::sleep(LOOK);
                    }
                    removed => break removed,
                }
            };
            match removed {
                Err(error) if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EBUSY | libc::ENOTEMPTY)) => {
                    tracing::warn!(directory = %directory.display(), %error, "Cannot remove a control group");
                }
                _ => {}
            }
        }
    }
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

/// Whether a group has neither groups below it nor processes: what keeps it are threads that are ending, which are not listed.
fn is_left(directory: &Path) -> bool {
    let has_groups = fs::metadata(directory).is_ok_and(|metadata| metadata.nlink() > 2);
    !has_groups && fs::read(directory.join(MEMBERS)).is_ok_and(|members| members.is_empty())
}

/// A sandbox's control groups, as long as this value lives. The process is in them after [`join`](Self::join).
#[derive(Debug)]
pub struct Placement {
    path: CgroupPath,
    hierarchies: Vec<Hierarchy>,
    made: MadeDirectories,
    origins: Vec<PathBuf>,
}

impl Placement {
    /// Makes the groups in every hierarchy.
    pub fn make(path: CgroupPath) -> Result<Self, ResourceError> {
        Self::make_in(path, hierarchies()?)
    }

    fn make_in(path: CgroupPath, hierarchies: Vec<Hierarchy>) -> Result<Self, ResourceError> {
        let mut placement = Self { path, hierarchies, made: MadeDirectories::default(), origins: Vec::new() };
        for hierarchy in placement.hierarchies.clone() {
            placement.make_directories(&hierarchy)?;
        }
        Ok(placement)
    }

    /// Moves this process, with all threads that it has and will have.
    pub fn join(&mut self) -> Result<(), ResourceError> {
        for hierarchy in self.hierarchies.clone() {
            self.join_one(&hierarchy)?;
            self.origins.push(hierarchy.own.join(MEMBERS));
        }
        Ok(())
    }

    fn join_one(&mut self, hierarchy: &Hierarchy) -> Result<(), ResourceError> {
        let members = hierarchy.mount.join(&self.path.0).join(MEMBERS);
        let mut attempt = 1;
        loop {
            match fs::write(&members, std::process::id().to_string()) {
                Err(error)
                    if attempt < ATTEMPTS && matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) =>
                {
                    self.make_directories(hierarchy)?;
                }
                joined => return joined.map_err(file_error("join", members)),
            }
            attempt += 1;
        }
    }

    fn make_directories(&mut self, hierarchy: &Hierarchy) -> Result<(), ResourceError> {
        let mut directory = hierarchy.mount.clone();
        for part in self.path.0.components() {
            let parent = directory.clone();
            directory.push(part);
            match fs::create_dir(&directory) {
                Ok(()) if !self.made.0.contains(&directory) => self.made.0.push(directory.clone()),
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(file_error("make the control group", directory)(error)),
            }
            if hierarchy.cpuset {
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    let inherited = fs::read(parent.join(file)).map_err(file_error("read", parent.join(file)))?;
                    fs::write(directory.join(file), inherited).map_err(file_error("write", directory.join(file)))?;
                }
            }
        }
        Ok(())
    }

    /// What was made, to be remembered outside of this process.
    pub fn made(&self) -> &MadeDirectories {
        &self.made
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        // A group with a process cannot be removed, so the process goes back first.
        for origin in &self.origins {
            if let Err(error) = fs::write(origin, std::process::id().to_string()) {
                tracing::warn!(group = %origin.display(), %error, "Cannot go back to the control group");
            }
        }
        self.made.remove();
    }
}

fn hierarchies() -> Result<Vec<Hierarchy>, ResourceError> {
    let read = |path: &str| fs::read_to_string(path).map_err(file_error("read", path));
    Ok(parse_hierarchies(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?))
}

/// Joins the mounted hierarchies with the process's memberships, lines of `id:controllers:path` (cgroups(7)).
fn parse_hierarchies(mountinfo: &str, memberships: &str) -> Vec<Hierarchy> {
    let find = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let (kind, rest) = right.split_once(' ')?;
        let mut fields = left.split(' ').skip(3);
        let (root, mount) = (fields.next()?, PathBuf::from(fields.next()?));
        let super_options: Vec<&str> = rest.split_once(' ')?.1.split(',').collect();
        let path = memberships.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let same = match kind {
                "cgroup2" => controllers.is_empty(),
                _ => !controllers.is_empty() && controllers.split(',').all(|name| super_options.contains(&name)),
            };
            same.then_some(path)
        })?;
        // The root of the mount may itself be inside the hierarchy, as in a container.
        let relative = Path::new(path).strip_prefix(root).unwrap_or(Path::new(path.trim_start_matches('/')));
        let own = if relative.as_os_str().is_empty() { mount.clone() } else { mount.join(relative) };
        Some(Hierarchy { own, mount, cpuset: kind == "cgroup" && super_options.contains(&"cpuset") })
    };
    let is_cgroup = |line: &&str| line.contains(" - cgroup ") || line.contains(" - cgroup2 ");
    mountinfo.lines().filter(is_cgroup).filter_map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Option<String> {
        CgroupPath::parse(text).map(|path| path.0.to_str().unwrap().to_owned())
    }

    #[test]
    fn both_forms_of_a_path_are_read() {
        assert_eq!(parsed("/default/demo").as_deref(), Some("default/demo"));
        assert_eq!(parsed("kubepods/pod1/x").as_deref(), Some("kubepods/pod1/x"));
        assert_eq!(
            parsed("kubepods-burstable-pod1.slice:cri-containerd:abc").as_deref(),
            Some("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope")
        );
        assert_eq!(parsed(":docker:abc").as_deref(), Some("system.slice/docker-abc.scope"));
        assert_eq!(parsed("-.slice:a:b").as_deref(), Some("a-b.scope"));
        for nothing in ["", "/", "/a/../b", "../x"] {
            assert_eq!(parsed(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn the_unified_hierarchy_is_found() {
        let mounts = "25 1 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n1 0 8:1 / / rw - ext4 /dev/sda rw\n";
        let found = parse_hierarchies(mounts, "0::/system.slice/containerd.service\n");
        let [hierarchy] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!(hierarchy.mount, Path::new("/sys/fs/cgroup"));
        assert_eq!(hierarchy.own, Path::new("/sys/fs/cgroup/system.slice/containerd.service"));
        assert!(!hierarchy.cpuset);
    }

    #[test]
    fn every_version_1_hierarchy_is_found() {
        let mounts = "30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      31 25 0:27 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n\
                      32 25 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
                      33 25 0:29 /docker/x /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        let found = parse_hierarchies(mounts, "4:cpu,cpuacct:/a\n3:cpuset:/\n1:name=systemd:/b\n5:memory:/docker/x\n");
        let own: Vec<_> = found.iter().map(|hierarchy| hierarchy.own.to_str().unwrap()).collect();
        assert_eq!(
            own,
            [
                "/sys/fs/cgroup/cpu,cpuacct/a",
                "/sys/fs/cgroup/cpuset",
                "/sys/fs/cgroup/systemd/b",
                "/sys/fs/cgroup/memory"
            ]
        );
        assert_eq!(found.iter().filter(|hierarchy| hierarchy.cpuset).count(), 1);
    }

    #[test]
    fn a_group_that_nobody_lists_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let members = dir.path().join(MEMBERS);
        assert!(!is_left(dir.path()));
        fs::write(&members, "").unwrap();
        assert!(is_left(dir.path()));
        fs::write(&members, "1\n").unwrap();
        assert!(!is_left(dir.path()));
        fs::write(&members, "").unwrap();
        fs::create_dir(dir.path().join("below")).unwrap();
        assert!(!is_left(dir.path()));
    }

    #[test]
    fn only_what_was_made_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("shared")).unwrap();
        fs::write(dir.path().join(MEMBERS), "").unwrap();
        let hierarchy = Hierarchy { mount: dir.path().into(), own: dir.path().into(), cpuset: false };
        let path = CgroupPath::parse("/shared/a/b").unwrap();
        let mut placement = Placement::make_in(path, vec![hierarchy]).unwrap();
        let group = dir.path().join("shared/a/b");
        assert_eq!(placement.made().0, [dir.path().join("shared/a"), group.clone()]);
        // Somebody else's end takes it away.
        MadeDirectories(vec![dir.path().join("shared/a"), group.clone()]).remove();
        placement.join().unwrap();
        assert_eq!(fs::read_to_string(group.join(MEMBERS)).unwrap(), std::process::id().to_string());
        // On a real hierarchy the file is the kernel's and goes with the directory.
        fs::remove_file(group.join(MEMBERS)).unwrap();
        drop(placement);
        assert!(!dir.path().join("shared/a").exists() && dir.path().join("shared").exists());
    }
}
