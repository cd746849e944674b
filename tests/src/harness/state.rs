//! What a host holds that a container may leave behind, to compare before and after.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use super::HOME;

/// How long the traces of a container may take to vanish: containerd collects its garbage after it
/// has answered, and everything is slow in emulation.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

/// Trees in which every file and every empty directory counts.
const TREES: &[&str] = &[
    "/dev/shm",
    "/run/containerd",
    "/run/inlay",
    "/run/kata-containers",
    "/run/netns",
    "/run/vc",
    "/tmp",
    "/var/lib/inlay",
];

/// Trees of our own containerd, below [`HOME`]. Its content store and its metadata stay out: what
/// they hold is the images' and does not go with a container.
const OWN_TREES: &[&str] = &[
    "root/io.containerd.runtime.v2.task",
    "root/io.containerd.snapshotter.v1.overlayfs/snapshots",
    "state/io.containerd.runtime.v2.task",
];

/// A directory deeper than so many below its tree's root belongs to one container; one above is a
/// part of the tree that is made once and stays.
const SHARED_DEPTH: usize = 1;

/// containerd's namespace, which gives its name to directories that stay.
const NAMESPACE: &str = "default";

/// How often each thing is there. Process ids and the like are not part of a thing's name, so that
/// states can be compared across restarts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostState(BTreeMap<String, usize>);

impl HostState {
    /// Looks at the host as it is now.
    pub fn take() -> Self {
        let mut state = Self::default();
        state.processes();
        state.mounts();
        state.unix_sockets();
        state.net_devices();
        state.loop_devices();
        state.cgroups(Path::new("/sys/fs/cgroup"));
        for tree in TREES {
            state.tree(Path::new(tree), 0);
        }
        for tree in OWN_TREES {
            state.tree(&PathBuf::from(HOME).join(tree), 0);
        }
        state
    }

    /// What is here and was not in `before`, one thing a line. Empty if nothing was left behind.
    pub fn left_since(&self, before: &Self) -> String {
        let mut text = String::new();
        for (thing, count) in &self.0 {
            let more = count.saturating_sub(before.0.get(thing).copied().unwrap_or(0));
            if more > 0 {
                let _ = writeln!(text, "    {more} x {thing}");
            }
        }
        text
    }

    /// Fails if, after some time to settle, anything is left that was not in `before`.
    #[track_caller]
    pub fn assert_settles(before: &Self) {
        let started = Instant::now();
        loop {
            let left = Self::take().left_since(before);
            if left.is_empty() {
                return;
            }
            assert!(started.elapsed() < SETTLE_LIMIT, "Left behind after {} s:\n{left}", SETTLE_LIMIT.as_secs());
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn add(&mut self, kind: &str, name: &str) {
        *self.0.entry(format!("{kind}: {name}")).or_default() += 1;
    }

    fn processes(&mut self) {
        for entry in read_dir(Path::new("/proc")) {
            let is_process =
                entry.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit));
            let pid = entry.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !is_process || pid == process::id().to_string() {
                continue;
            }
            // A kernel thread has no command line; a process that has ended and is not reaped has none either.
            let command = fs::read(entry.join("cmdline")).unwrap_or_default();
            let stat = fs::read_to_string(entry.join("stat")).unwrap_or_default();
            let zombie = stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'));
            if zombie {
                let name = fs::read_to_string(entry.join("comm")).unwrap_or_default();
                self.add("zombie", name.trim());
            } else if !command.is_empty() {
                self.add("process", String::from_utf8_lossy(&command).replace('\0', " ").trim());
            }
            if !command.is_empty()
                && let Ok(namespace) = fs::read_link(entry.join("ns/net"))
            {
                let name = format!("net namespace: {}", namespace.display());
                self.0.insert(name, 1);
            }
        }
    }

    fn mounts(&mut self) {
        // Field 5 is the mount point; the type follows the separator (proc_pid_mountinfo(5)).
        for line in read("/proc/self/mountinfo").lines() {
            let point = line.split(' ').nth(4).unwrap_or_default();
            let kind = line.split(" - ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_default();
            self.add("mount", &format!("{kind} on {point}"));
        }
    }

    fn unix_sockets(&mut self) {
        // A path appears once for the listener and once for each connection it accepted.
        for line in read("/proc/net/unix").lines().skip(1) {
            if let Some(path) = line.split_whitespace().nth(7) {
                self.0.insert(format!("socket: {path}"), 1);
            }
        }
    }

    fn net_devices(&mut self) {
        for device in read_dir(Path::new("/sys/class/net")) {
            self.add("net device", &device.to_string_lossy());
        }
    }

    fn loop_devices(&mut self) {
        for device in read_dir(Path::new("/sys/block")) {
            if device.join("loop").exists() {
                self.add("loop device", &read(device.join("loop/backing_file")));
            }
        }
    }

    fn cgroups(&mut self, dir: &Path) {
        for child in read_dir(dir).into_iter().filter(|child| is_dir(child)) {
            // runc keeps the parent of its containers' cgroups, named like containerd's namespace.
            if child.file_name().is_none_or(|name| name != NAMESPACE) {
                self.add("cgroup", &child.to_string_lossy());
            }
            self.cgroups(&child);
        }
    }

    fn tree(&mut self, dir: &Path, depth: usize) {
        for child in read_dir(dir) {
            if is_dir(&child) {
                // A container's root file system is named by its directory; what is in it does not matter.
                let is_root = child.file_name().is_some_and(|name| name == "rootfs" || name == "fs");
                let shared = depth < SHARED_DEPTH || child.file_name().is_some_and(|name| name == NAMESPACE);
                if is_root || (!shared && read_dir(&child).is_empty()) {
                    self.add("directory", &child.to_string_lossy());
                }
                if !is_root {
                    self.tree(&child, depth + 1);
                }
            } else {
                self.add("file", &child.to_string_lossy());
            }
        }
    }
}

/// Children in order; none if there is no such directory, or no longer.
fn read_dir(dir: &Path) -> Vec<PathBuf> {
    let mut children: Vec<PathBuf> =
        fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    children.sort();
    children
}

fn is_dir(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|data| data.is_dir())
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_of_the_same_counts() {
        let mut before = HostState::default();
        before.add("process", "sleep 1");
        let mut after = before.clone();
        assert_eq!(after.left_since(&before), "");
        after.add("process", "sleep 1");
        after.add("mount", "tmpfs on /x");
        assert_eq!(after.left_since(&before), "    1 x mount: tmpfs on /x\n    1 x process: sleep 1\n");
        // What has gone was not left behind.
        assert_eq!(before.left_since(&after), "");
    }
}
