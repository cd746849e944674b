//! The processes of a sandbox.

use std::fs;
use std::path::PathBuf;

use nix::unistd::Pid;

/// What the helper process calls itself.
const HELPER: &str = "inlay-helper";

/// A sandbox's shim and its helper.
#[derive(Clone, Copy, Debug)]
pub struct Processes {
    /// The process that has the machine in it.
    pub shim: Pid,
    /// The process that mounts for it.
    pub helper: Pid,
}

/// A thread, as `/proc/<pid>/task/<tid>/status` has it.
#[derive(Clone, Debug)]
pub struct Thread {
    /// Its id.
    pub id: Pid,
    /// Its name.
    pub name: String,
    status: String,
}

impl Processes {
    /// Those whose arguments have the id: a shim is started with `-id ID`, and its helper is a copy of it.
    #[track_caller]
    pub fn of(id: &str) -> Self {
        let (mut shim, mut helper) = (None, None);
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).map(Pid::from_raw);
            if command.split(|byte| *byte == 0).any(|word| word == id.as_bytes())
                && command.starts_with(b"containerd-shim")
            {
                let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                *(if name.trim() == HELPER { &mut helper } else { &mut shim }) = pid;
            }
        }
        match (shim, helper) {
            (Some(shim), Some(helper)) => Self { shim, helper },
            missing => panic!("not both processes of {id} run: {missing:?}"),
        }
    }
}

impl Thread {
    /// The threads of a process.
    pub fn all(process: Pid) -> Vec<Self> {
        let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
        tasks.filter_map(|task| Self::read(task.path())).collect()
    }

    fn read(task: PathBuf) -> Option<Self> {
        let status = fs::read_to_string(task.join("status")).ok()?;
        let id = Pid::from_raw(task.file_name()?.to_str()?.parse().ok()?);
        let name = fs::read_to_string(task.join("comm")).ok()?.trim().to_owned();
        Some(Self { id, name, status })
    }

    /// A line of its status, such as `Seccomp` (proc_pid_status(5)).
    pub fn status(&self, line: &str) -> &str {
        let found = self.status.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':'));
        found.map(str::trim).unwrap_or_default()
    }

    /// Its effective capabilities.
    pub fn capabilities(&self) -> u64 {
        u64::from_str_radix(self.status("CapEff"), 16).unwrap_or(u64::MAX)
    }
}
