//! A test binary in nested hosts: a host that fails under a test is replaced, and the new one goes
//! on with that test. Tests that have ended, well or not, do not run twice.

use std::cell::RefCell;
use std::io::{self, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::session::Session;
use super::supervise::{Ending, Output};

/// So many of the slowest tests are named at the end.
const SLOWEST: usize = 12;

/// How a trial ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// Every test passed.
    Passed,
    /// Tests failed, or there was no time to run them all.
    Failed,
    /// Nested hosts failed more often than may be.
    HostsFailed,
    /// We were asked to end by this signal.
    Interrupted(i32),
}

/// Builds the end-to-end tests, and returns the path of their binary.
pub fn build() -> Result<String> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["test", "--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")]);
    cargo.args(["--test", "e2e", "--no-run", "--message-format=json-render-diagnostics"]);
    let output = cargo.stderr(Stdio::inherit()).output().context("Cannot run cargo")?;
    ensure!(output.status.success(), "cargo does not build the end-to-end tests");
    // One JSON object a line; the one of an artefact that can be run names it.
    let messages = String::from_utf8(output.stdout)?;
    let mut executables = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "e2e")
        .filter_map(|message| message["executable"].as_str().map(str::to_owned));
    executables.next().context("cargo names no binary of the end-to-end tests")
}

/// Runs the tests of `binary` whose names contain one of `filters` (all, if there are none).
pub fn run(session: &mut Session, binary: &str, filters: &[String], limit: Duration) -> Result<Verdict> {
    let started = Instant::now();
    let names = list(binary, filters)?;
    ensure!(!names.is_empty(), "{binary} has no test that matches {}", filters.join(" "));
    let mut progress = Progress::default();
    let (verdict, timed_out) = loop {
        let left: Vec<String> = names.iter().filter(|name| !progress.ended(name)).cloned().collect();
        if left.is_empty() {
            break (progress.verdict(), None);
        }
        let mut argv = vec![binary.to_owned(), "--exact".into(), "--test-threads=1".into()];
        argv.extend(left.iter().cloned());
        let mut request = session.request(argv)?;
        // Emulated, the symbols of one backtrace take 20 s to read.
        request.env.retain(|(name, _)| !name.ends_with("_BACKTRACE"));
        progress.line.clear();
        progress.last = None;
        let first = left[0].clone();
        let remaining = limit.saturating_sub(started.elapsed());
        let during = RefCell::new(first.clone());
        let mut watcher = Watcher { progress: &mut progress, during: &during };
        let run = session.attempt(&|| during.borrow().clone(), &request, remaining, &mut watcher)?;
        match run.ending {
            Ending::Exited(0) if names.iter().all(|name| progress.ended(name)) => break (progress.verdict(), None),
            // 101 is what the test binary answers when tests failed; it has run them all.
            Ending::Exited(_) => break (Verdict::Failed, None),
            Ending::TimedOut => break (Verdict::Failed, Some(during.into_inner())),
            Ending::Interrupted(signal) => break (Verdict::Interrupted(signal), None),
            Ending::HostFailed(_) if session.retry() => {}
            Ending::HostFailed(_) => break (Verdict::HostsFailed, None),
        }
    };
    if let Some(name) = timed_out {
        println!("nested-host: no time was left in {name}: {} s are over", limit.as_secs());
    }
    for name in &progress.failed {
        println!("nested-host: FAILED {name}");
    }
    println!("nested-host: the slowest tests, in seconds:{}", progress.slowest());
    let not_run = names.len() - progress.passed.len() - progress.failed.len();
    println!(
        "nested-host: {} passed, {} failed, {not_run} not run in {:.0} s; {}",
        progress.passed.len(),
        progress.failed.len(),
        started.elapsed().as_secs_f64(),
        session.summary()
    );
    Ok(verdict)
}

/// Test names as the binary itself lists them.
fn list(binary: &str, filters: &[String]) -> Result<Vec<String>> {
    let output = Command::new(binary).args(["--list", "--format", "terse"]).args(filters).output();
    let output = output.with_context(|| format!("Cannot run {binary}"))?;
    ensure!(output.status.success(), "{binary} does not list its tests");
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// What the output so far says of the tests.
#[derive(Default)]
struct Progress {
    passed: Vec<String>,
    failed: Vec<String>,
    /// How long each took that has ended. The first one's includes the start of its host's containerd.
    took: Vec<(String, Duration)>,
    /// The unfinished line.
    line: Vec<u8>,
    /// When the line before it ended.
    last: Option<Instant>,
}

impl Progress {
    fn ended(&self, name: &str) -> bool {
        self.passed.iter().chain(&self.failed).any(|ended| ended == name)
    }

    fn verdict(&self) -> Verdict {
        if self.failed.is_empty() { Verdict::Passed } else { Verdict::Failed }
    }

    fn take(&mut self, piece: &[u8]) {
        for byte in piece {
            if *byte == b'\n' {
                let line = String::from_utf8_lossy(&self.line).into_owned();
                self.line.clear();
                let last = self.last.replace(Instant::now());
                let (name, ended) = match outcome(&line) {
                    Some((name, "ok")) => (name, &mut self.passed),
                    Some((name, "FAILED")) => (name, &mut self.failed),
                    _ => continue,
                };
                ended.push(name.to_owned());
                self.took.extend(last.map(|last| (name.to_owned(), last.elapsed())));
            } else {
                self.line.push(*byte);
            }
        }
    }

    /// The tests that took longest, a line each.
    fn slowest(&self) -> String {
        let mut took: Vec<_> = self.took.iter().collect();
        took.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
        took.iter().take(SLOWEST).map(|(name, time)| format!("\n{:8.1} {name}", time.as_secs_f64())).collect()
    }

    /// The test that has begun and not ended.
    fn running(&self) -> Option<String> {
        let line = String::from_utf8_lossy(&self.line);
        outcome(&line).map(|(name, _)| name.to_owned())
    }
}

/// The name and the outcome, empty so far perhaps, of a line `test NAME ... OUTCOME`.
fn outcome(line: &str) -> Option<(&str, &str)> {
    let (name, outcome) = line.strip_prefix("test ")?.split_once(" ... ")?;
    Some((name.split(" - ").next().unwrap_or(name), outcome))
}

struct Watcher<'a> {
    progress: &'a mut Progress,
    during: &'a RefCell<String>,
}

impl Output for Watcher<'_> {
    fn stdout(&mut self, piece: &[u8]) -> io::Result<()> {
        self.progress.take(piece);
        if let Some(name) = self.progress.running() {
            self.during.replace(name);
        }
        let mut stdout = io::stdout().lock();
        stdout.write_all(piece)?;
        stdout.flush()
    }

    fn stderr(&mut self, piece: &[u8]) -> io::Result<()> {
        io::stderr().write_all(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_failure_leaves_the_running_test_to_be_run_again() {
        let mut progress = Progress::default();
        progress.take(b"\nrunning 3 tests\ntest runc::echo ... ok\ntest runc::exit_code ... FAI");
        assert_eq!(progress.running().as_deref(), Some("runc::exit_code"));
        progress.take(b"LED\ntest inlay::echo ... ");
        assert!(progress.ended("runc::echo") && progress.ended("runc::exit_code"));
        assert_eq!(progress.running().as_deref(), Some("inlay::echo"));
        assert!(!progress.ended("inlay::echo"));
        assert_eq!(progress.verdict(), Verdict::Failed);
    }
}
