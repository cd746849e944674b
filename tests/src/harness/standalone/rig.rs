//! A directory for machines, their disks and snapshots, and the host's state before and after.

use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::{Order, Vm, order};
use crate::harness::scene::{self, Parts};
use crate::harness::{HOME, HostState};

const UNMOUNT_PATIENCE: Duration = Duration::from_secs(20);

/// Where a test's machines are.
pub struct Rig {
    dir: PathBuf,
    parts: Parts,
    machines: Cell<u32>,
    mounts: RefCell<Vec<PathBuf>>,
}

/// Plays one test. Afterwards nothing of it may be left on the host.
pub fn play(test: impl FnOnce(&Rig)) {
    scene::note_panics();
    let before = HostState::take();
    let rig = Rig::new();
    test(&rig);
    drop(rig);
    HostState::assert_settles(&before);
}

impl Default for Rig {
    fn default() -> Self {
        Self::new()
    }
}

impl Rig {
    /// An empty directory below [`HOME`], in memory where `/run` is; removed with this value.
    pub fn new() -> Self {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let name = format!("rig-{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(HOME).join(name);
        if let Err(error) = fs::create_dir_all(&dir) {
            panic!("Cannot make {}: {error}", dir.display());
        }
        Self { dir, parts: Parts::find(), machines: Cell::new(0), mounts: RefCell::default() }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A new file of `size` zeros.
    #[track_caller]
    pub fn file(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let made = File::create(&path).and_then(|file| file.set_len(size));
        made.unwrap_or_else(|error| panic!("Cannot make {}: {error}", path.display()));
        path
    }

    /// A new file of `size` zeros in another directory.
    #[track_caller]
    pub fn file_in(&self, dir: &Path, name: &str, size: u64) -> PathBuf {
        let dir = dir.strip_prefix(&self.dir).unwrap_or(dir);
        self.file(&dir.join(name).to_string_lossy(), size)
    }

    /// An empty ext4 of so many MiB: where a file can be opened past the page cache, which a tmpfs does not allow.
    #[track_caller]
    pub fn scratch(&self, mib: u64) -> PathBuf {
        let image = self.file("scratch.img", mib << 20);
        let dir = self.path("scratch");
        let made = fs::create_dir(&dir);
        made.unwrap_or_else(|error| panic!("Cannot make {}: {error}", dir.display()));
        host(&["mke2fs", "-F", &image.to_string_lossy()]);
        host(&["mount", "-t", "ext4", "-o", "loop", &image.to_string_lossy(), &dir.to_string_lossy()]);
        self.mounts.borrow_mut().push(dir.clone());
        dir
    }

    /// A machine to be ordered, with a directory of its own.
    #[track_caller]
    pub fn vm(&self) -> Order {
        let dir = self.machine_dir();
        let Parts { shim, kernel, tools, .. } = self.parts.clone();
        Order::new(shim, kernel, tools, dir)
    }

    /// The files that machines are made of.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Runs a command line as it is, which makes sockets for the console of a guest with tools and for QMP in the directory that
    /// it is run in, and waits for the guest's shell.
    #[track_caller]
    pub fn boot(&self, command: Command, console: &str, qmp: &str) -> Vm {
        match order::launch(command, self.machine_dir(), console, qmp) {
            Ok(vm) => {
                vm.wait_ready(order::BOOT_LIMIT);
                vm
            }
            Err(error) => panic!("{error:#}"),
        }
    }

    #[track_caller]
    fn machine_dir(&self) -> PathBuf {
        let number = self.machines.get();
        self.machines.set(number + 1);
        let dir = self.path(&format!("vm-{number}"));
        fs::create_dir(&dir).unwrap_or_else(|error| panic!("Cannot make {}: {error}", dir.display()));
        dir
    }

    /// What the machines have left of a failed test.
    fn evidence(&self) -> String {
        let machines = (0..self.machines.get()).map(|number| self.path(&format!("vm-{number}")));
        let files = machines.flat_map(|dir| ["transcript", "output", "log"].map(|name| dir.join(name)));
        let show = |path: PathBuf| {
            let content = fs::read_to_string(&path).unwrap_or_default();
            format!("=== {} ===\n{content}\n", path.display())
        };
        files.map(show).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if thread::panicking() {
            scene::testify(&self.evidence());
        }
        for dir in self.mounts.borrow().iter() {
            unmount(dir);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Unmounts a file system and frees its loop device. The kernel lets go of the files of an I/O ring some time after the ring's
/// process has ended (`io_ring_exit_work`), so a busy one is tried again.
fn unmount(dir: &Path) {
    let deadline = Instant::now() + UNMOUNT_PATIENCE;
    loop {
        let output = Command::new("/bin/busybox").args(["umount", "-d"]).arg(dir).stdin(Stdio::null()).output();
        let why = match output {
            Ok(output) if output.status.success() => return,
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim_end().to_owned(),
            Err(error) => error.to_string(),
        };
        if Instant::now() > deadline {
            eprintln!("{} is still mounted after {} s: {why}", dir.display(), UNMOUNT_PATIENCE.as_secs());
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Runs a command of busybox on the host, which must succeed; what it printed.
#[track_caller]
pub fn host(args: &[&str]) -> String {
    let output = Command::new("/bin/busybox").args(args).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("Cannot run busybox: {error}"));
    assert!(output.status.success(), "busybox {} failed: {output:?}", args.join(" "));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A file's digest, as md5sum prints it.
#[track_caller]
pub fn md5(file: &Path) -> String {
    let line = host(&["md5sum", &file.to_string_lossy()]);
    line.split_whitespace().next().unwrap_or_default().to_owned()
}

/// Bytes that compress badly and are the same each time (xorshift64).
pub fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}
