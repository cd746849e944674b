//! The part of the agent that makes containers: the same program, started again for each one.
//!
//! libcontainer clones itself with a raw `clone3` and runs code that allocates in the child. In a process with threads
//! that can hang for ever on a lock another thread held, so it runs in a process that has none: this one. What it makes
//! is not its own child but the agent's (`CLONE_PARENT`), so the agent reaps it and learns its exit code; PID 1 itself
//! may not clone siblings (clone(2), EINVAL), which is the second reason for a process of its own.
//!
//! Command line: `ctr-helper create|exec REPORT_FD CONTAINER_DIR [NAME]`. Standard streams are those of the process to
//! be made. The report is one line of JSON: `{"pid":N}` or `{"error":"..."}`.

mod create;
mod entrypoint;
mod exec;

use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde::{Deserialize, Serialize};

pub use exec::ExecRequest;

/// First argument that makes this program a helper.
pub const VERB: &str = "ctr-helper";
/// Second argument: make a container and leave it before its entry point.
pub const CREATE: &str = "create";
/// Second argument: run a process in a container.
pub const EXEC: &str = "exec";

/// Where helpers are started from in a guest: this program, mounted read-only by [`crate::boot`].
pub const PROGRAM: &str = "/run/inlay/agent";

/// Where libcontainer keeps its state, one directory a container.
pub const STATE_ROOT: &str = "/run/inlay/state";
/// The socket in a container's state directory on which its first process waits for the start.
pub const START_SOCKET: &str = "notify.sock";
/// The console socket in a container's directory; the terminal of a process comes over it.
pub const CONSOLE_SOCKET: &str = "console.sock";
/// The runtime configuration in a container's directory.
pub const CONFIG: &str = "config.json";

/// What the helper tells the agent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Report {
    /// The process was made and has this number in the agent's PID namespace.
    Pid(i32),
    /// It was not; the sentence is meant for the user.
    Error(String),
}

/// Runs the helper and reports. The arguments are those after [`VERB`].
pub fn main(mut args: impl Iterator<Item = String>) -> ExitCode {
    let (Some(verb), Some(report), Some(directory)) = (args.next(), args.next(), args.next()) else {
        return ExitCode::FAILURE;
    };
    let Ok(report) = report.parse::<RawFd>() else { return ExitCode::FAILURE };
    // SAFETY: the agent passed this descriptor to this process for this purpose and nothing else here knows it.
    let mut report = unsafe { File::from_raw_fd(report) };
    // The process that is made must not keep the report open.
    if fcntl(&report, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).is_err() {
        return ExitCode::FAILURE;
    }
    // Rust programs start with SIGPIPE ignored, and ignored signals survive an exec: a container's `yes | head` would
    // not end.
    // SAFETY: setting a signal's default action runs no code of ours in a handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let directory = PathBuf::from(directory);
    let made = match verb.as_str() {
        CREATE => create::create(&directory),
        EXEC => exec::exec(&directory, &args.next().unwrap_or_default()),
        _ => Err(format!("Unknown helper command {verb:?}")),
    };
    let (message, code) = match made {
        Ok(pid) => (Report::Pid(pid), ExitCode::SUCCESS),
        Err(error) => (Report::Error(error), ExitCode::FAILURE),
    };
    let line = serde_json::to_string(&message).unwrap_or_else(|_| r#"{"error":"No report"}"#.to_owned());
    match writeln!(report, "{line}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// An error and its causes on one line, each said once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let sentence = error.to_string();
        if !text.contains(&sentence) {
            text.push_str(": ");
            text.push_str(&sentence);
        }
        cause = error.source();
    }
    text
}
