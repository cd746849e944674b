//! Runs in nested hosts, one after another: artefacts, retries, and the count of what failed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use super::channel::Request;
use super::image::Image;
use super::inside::ARTEFACTS;
use super::machine;
use super::qemu::Shape;
use super::supervise::{self, Ending, HostFailure, Output, Run};
use crate::cache;

/// Artefacts of so many runs are kept in the cache.
const KEPT_RUNS: usize = 12;

/// Lines of the console that are shown when the host failed.
const SHOWN_LINES: usize = 40;

/// Variables that reach the command besides the `INLAY_` and `RUST_` ones.
const PASSED: &[&str] = &["CI", "HOME", "PATH"];

/// Variables that the command finds in the host: Debian's unpacked packages, and where to keep what
/// a person will want to see after a failure.
const SET: [&str; 2] = ["INLAY_TOOLS", "INLAY_ARTEFACTS"];

/// Nested hosts of one shape.
pub struct Session {
    shape: Shape,
    image: Image,
    retries: u32,
    artefacts: Option<PathBuf>,
    hosts: u32,
    boots: Vec<Duration>,
    failures: Vec<(String, HostFailure)>,
}

impl Session {
    /// A session of no hosts yet. With `artefacts` everything is kept there, else the artefacts of
    /// failures are kept in the cache.
    pub fn new(shape: Shape, retries: u32, artefacts: Option<PathBuf>) -> Result<Self> {
        let image = Image::prepare()?;
        Ok(Self { shape, image, retries, artefacts, hosts: 0, boots: Vec::new(), failures: Vec::new() })
    }

    /// A request to run `argv` here: in this directory, with the part of this environment that
    /// is passed on, and with what the harness wants to know.
    pub fn request(&self, argv: Vec<String>) -> Result<Request> {
        let mut env: Vec<(String, String)> = std::env::vars()
            .filter(|(name, _)| {
                PASSED.contains(&name.as_str()) || name.starts_with("INLAY_") || name.starts_with("RUST_")
            })
            .filter(|(name, _)| !SET.contains(&name.as_str()))
            .collect();
        let packages = self.image.packages.to_string_lossy().into_owned();
        env.extend(SET.iter().map(|name| (*name).to_owned()).zip([packages, ARTEFACTS.to_owned()]));
        let cwd = std::env::current_dir().context("Cannot find the current directory")?;
        Ok(Request { argv, env, cwd: cwd.to_string_lossy().into_owned() })
    }

    /// Runs once. A failure of the host is counted under the name `what` and returned.
    pub fn attempt(
        &mut self,
        what: &dyn Fn() -> String,
        request: &Request,
        limit: Duration,
        output: &mut dyn Output,
    ) -> Result<Run> {
        self.hosts += 1;
        let place = self.place()?;
        let run = supervise::run(&self.shape, &self.image, request, limit, &place, output)?;
        self.boots.extend(run.boot);
        if let Ending::HostFailed(failure) = &run.ending {
            let what = what();
            eprintln!("nested-host: HOST FAILURE during {what}: {failure}");
            eprintln!("{}", supervise::console_tail(&place, SHOWN_LINES));
            self.failures.push((what, failure.clone()));
        }
        if run.ending == Ending::Exited(0) && self.artefacts.is_none() {
            fs::remove_dir_all(&place).with_context(|| format!("Cannot remove {}", place.display()))?;
        } else {
            eprintln!("nested-host: console and logs are in {}", place.display());
        }
        Ok(run)
    }

    /// Runs to an ending that is the command's own, in new hosts for as long as retries are left.
    pub fn run(&mut self, request: &Request, limit: Duration, output: &mut dyn Output) -> Result<Run> {
        let name = request.argv.join(" ");
        loop {
            let run = self.attempt(&|| name.clone(), request, limit, output)?;
            if !matches!(run.ending, Ending::HostFailed(_)) || !self.retry() {
                return Ok(run);
            }
        }
    }

    /// Runs once, on the machine itself.
    pub fn run_on_machine(&mut self, argv: Vec<String>, limit: Duration) -> Result<Ending> {
        self.hosts += 1;
        let program = std::env::current_exe().context("Cannot find this program's own path")?;
        let ending = machine::run(&program, &self.request(argv)?, limit, &self.place()?)?;
        eprintln!("nested-host: {ending:?}");
        Ok(ending)
    }

    /// Whether another host may be tried after a failure; says so if it may.
    pub fn retry(&self) -> bool {
        let failed = self.failures.len();
        let may = failed <= self.retries as usize;
        if may {
            eprintln!("nested-host: trying again in a new host ({failed} of at most {} retries)", self.retries);
        }
        may
    }

    /// What failed so far.
    pub fn failures(&self) -> &[(String, HostFailure)] {
        &self.failures
    }

    /// One line on the hosts so far, and one more for each failure.
    pub fn summary(&self) -> String {
        let boots: Vec<String> = self.boots.iter().map(|boot| format!("{:.1}", boot.as_secs_f64())).collect();
        let mut text = format!(
            "{} booted in {} s, {}",
            count(self.hosts as usize, "nested host"),
            boots.join(" "),
            count(self.failures.len(), "host failure")
        );
        for (what, failure) in &self.failures {
            text.push_str(&format!("\n    {}: during {what}: {failure}", failure.class()));
        }
        text
    }

    /// A new directory for one run's artefacts.
    fn place(&self) -> Result<PathBuf> {
        let serial = self.hosts;
        let place = match &self.artefacts {
            Some(dir) => dir.join(format!("host-{serial}")),
            None => {
                let runs = cache::root().join("runs");
                prune(&runs);
                let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
                runs.join(format!("{now}-{}-{serial}", process::id()))
            }
        };
        fs::create_dir_all(&place).with_context(|| format!("Cannot create {}", place.display()))?;
        // virtiofsd and QEMU are given it as it is, whatever their working directory.
        Ok(fs::canonicalize(place)?)
    }
}

/// Removes all but the newest runs' artefacts; names begin with the time.
fn prune(runs: &Path) {
    let Ok(entries) = fs::read_dir(runs) else { return };
    let mut dirs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    dirs.sort();
    for dir in dirs.iter().rev().skip(KEPT_RUNS) {
        let _ = fs::remove_dir_all(dir);
    }
}

fn count(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}
