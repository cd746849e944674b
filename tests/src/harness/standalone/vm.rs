//! A machine that runs.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::console::{Console, Said};
use super::order::Running;
use super::qmp::Qmp;

/// How long a command in the guest may take, unless a test says otherwise.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// How long an event may take, and the end of the machine.
const EVENT_LIMIT: Duration = Duration::from_secs(60);

/// How long a failed test leaves a machine that may be about to say why it ends.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A machine whose guest does what it is told. Ends with this value.
pub struct Vm {
    process: Running,
    console: Console,
    qmp: Qmp,
    dir: PathBuf,
    started: Instant,
    jobs: Cell<u32>,
}

/// A command that runs in the guest meanwhile.
#[derive(Debug)]
#[must_use = "What comes of it is known only when it is joined"]
pub struct Job(u32);

impl Vm {
    pub(super) fn new(process: Running, console: Console, qmp: Qmp, dir: PathBuf, started: Instant) -> Self {
        Self { process, console, qmp, dir, started, jobs: Cell::new(0) }
    }

    /// The process's id, to read what `/proc` has on it.
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// When the program was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The directory that the machine runs in, with its sockets `console` and `qmp` and its `log`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits until the guest has booted. Once for each boot.
    #[track_caller]
    pub fn wait_ready(&self, limit: Duration) {
        if let Err(error) = self.console.wait_ready(limit) {
            panic!("The guest has not booted: {error:#}");
        }
    }

    /// Runs a shell command in the guest, which must succeed; what it wrote to standard output and error.
    #[track_caller]
    pub fn sh(&self, command: &str) -> String {
        let Said { code, output } = self.try_sh(command);
        assert_eq!(code, 0, "In the guest failed: {command}\n{output}");
        output
    }

    /// Runs a shell command in the guest.
    #[track_caller]
    pub fn try_sh(&self, command: &str) -> Said {
        self.sh_within(command, COMMAND_LIMIT)
    }

    /// Runs a shell command in the guest, which may take as long as `limit`.
    #[track_caller]
    pub fn sh_within(&self, command: &str, limit: Duration) -> Said {
        match self.console.run(command, limit) {
            Ok(said) => said,
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Runs a command in the guest's background.
    #[track_caller]
    pub fn spawn(&self, command: &str) -> Job {
        let number = self.jobs.get();
        self.jobs.set(number + 1);
        self.sh(&format!(
            "(({command}) </dev/null >/tmp/job.{number} 2>&1; echo $? >/tmp/job.{number}.new; \
             mv /tmp/job.{number}.new /tmp/job.{number}.code) &"
        ));
        Job(number)
    }

    /// Fails if the job has ended, and shows what it said.
    #[track_caller]
    pub fn assert_running(&self, job: &Job) {
        let Job(number) = job;
        let said = self.try_sh(&format!("test ! -e /tmp/job.{number}.code || {{ cat /tmp/job.{number}; false; }}"));
        assert_eq!(said.code, 0, "The job is over too early: {}", said.output);
    }

    /// Waits for the end of a job, which must have succeeded. A machine that goes on from a snapshot can join what was spawned
    /// before it was taken.
    #[track_caller]
    pub fn join(&self, job: Job) -> String {
        let Job(number) = job;
        self.sh(&format!(
            "until [ -e /tmp/job.{number}.code ]; do sleep 0.05; done; cat /tmp/job.{number}; exit $(cat /tmp/job.{number}.code)"
        ))
    }

    /// Executes a QMP command, which must succeed; what it returns.
    #[track_caller]
    pub fn qmp(&self, command: &str, arguments: Value) -> Value {
        self.try_qmp(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Executes a QMP command: what it returns, or the error that it answers.
    #[track_caller]
    pub fn try_qmp(&self, command: &str, arguments: Value) -> Result<Value, Value> {
        self.qmp.execute(command, &arguments).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Waits for a QMP event, which may have come already.
    #[track_caller]
    pub fn event(&self, name: &str) -> Value {
        self.qmp.event(name, EVENT_LIMIT).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Ends the machine over QMP; its exit status.
    #[track_caller]
    pub fn quit(mut self) -> ExitStatus {
        self.qmp("quit", serde_json::json!({}));
        self.wait()
    }

    /// Lets the guest shut down; the machine's exit status.
    #[track_caller]
    pub fn power_off(mut self) -> ExitStatus {
        // The console ends before an answer: the process's end tells.
        let _ = self.console.run("poweroff -f", COMMAND_LIMIT);
        self.wait()
    }

    #[track_caller]
    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + EVENT_LIMIT;
        while Instant::now() < deadline {
            match self.process.0.try_wait() {
                Ok(Some(status)) => return status,
                Ok(None) => thread::sleep(Duration::from_millis(5)),
                Err(error) => panic!("The machine cannot be waited for: {error}"),
            }
        }
        panic!("The machine has not ended after {} s", EVENT_LIMIT.as_secs());
    }
}

impl Drop for Vm {
    /// Leaves what the guest has said beside the machine's other files, which the rig shows of a failed test.
    fn drop(&mut self) {
        if thread::panicking() {
            // A machine that has ended by itself says why after its console is closed.
            let deadline = Instant::now() + LAST_WORDS;
            while Instant::now() < deadline && matches!(self.process.0.try_wait(), Ok(None)) {
                thread::sleep(Duration::from_millis(20));
            }
            let _ = fs::write(self.dir.join("transcript"), self.console.transcript());
        }
    }
}
