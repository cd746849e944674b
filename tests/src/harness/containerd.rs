//! A real containerd of our own, and `ctr` to talk to it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::stuck;

/// Where tests keep their containerd and all that belongs to it: in memory, as `/run` is.
pub const HOME: &str = "/run/inlay-tests";

/// How long containerd may take to answer. Emulated, it takes about 2 s.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// The longest that one `ctr` may take, unless a test says otherwise.
const CTR_LIMIT: Duration = Duration::from_secs(240);

/// A running containerd with directories of its own.
pub struct Containerd {
    dir: PathBuf,
    tools: PathBuf,
    path: String,
    process: Child,
}

/// What a program answered.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output, as text where it is text.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// How long it took.
    pub wall: Duration,
}

impl Output {
    /// The output, if the program succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.status.success(), "The command failed: {self:#?}");
        self
    }

    /// The output, if the program failed.
    #[track_caller]
    pub fn failed(self) -> Self {
        assert!(!self.status.success(), "The command should have failed: {self:#?}");
        self
    }
}

impl Containerd {
    /// Starts a containerd that keeps everything below `dir`, which must be able to hold an overlay's
    /// upper directory (a tmpfs is, an overlay is not).
    ///
    /// `shim` is the program `inlay`, if it is to be found as a shim. The variable `INLAY_TOOLS`,
    /// which the nested host sets, names the root of Debian's unpacked packages.
    pub fn start(dir: &Path, shim: Option<&Path>) -> Result<Self> {
        let tools = std::env::var_os("INLAY_TOOLS").context("Not in the nested host: INLAY_TOOLS is not set")?;
        let tools = PathBuf::from(tools);
        let bin = dir.join("bin");
        fs::create_dir_all(&bin).with_context(|| format!("Cannot create {}", bin.display()))?;
        if let Some(shim) = shim {
            let link = bin.join("containerd-shim-inlay-v2");
            std::os::unix::fs::symlink(shim, &link).with_context(|| format!("Cannot make {}", link.display()))?;
        }
        fs::write(dir.join("config.toml"), config(dir))?;
        let path = format!(
            "{bin}:{tools}/usr/bin:{tools}/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
            bin = bin.display(),
            tools = tools.display()
        );
        let process = launch(dir, &tools, &path)?;
        let mut containerd = Self { dir: dir.to_owned(), tools, path, process };
        containerd.wait_ready()?;
        Ok(containerd)
    }

    /// Where containerd's own log is, shims' logs included.
    pub fn log(&self) -> PathBuf {
        self.dir.join("containerd.log")
    }

    /// Where containerd keeps its bundles.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Ends containerd, leaving its shims alone, and starts it again.
    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        self.process = launch(&self.dir, &self.tools, &self.path)?;
        self.wait_ready()
    }

    /// Imports an image's archive.
    pub fn import(&self, archive: &Path) -> Result<()> {
        let archive = archive.to_str().context("The archive's path is not UTF-8")?;
        let output = self.ctr(&["image", "import", archive]);
        ensure!(output.status.success(), "Cannot import {archive}: {}{}", output.stdout, output.stderr);
        Ok(())
    }

    /// `ctr` as a command to add arguments to.
    pub fn command(&self) -> Command {
        let mut command = Command::new(self.tools.join("usr/bin/ctr"));
        command.arg("--address").arg(self.dir.join("containerd.sock")).arg("--connect-timeout=400s");
        command.env("PATH", &self.path).stdin(Stdio::null());
        command
    }

    /// Gives a command the `PATH` that containerd has, with the shims in it.
    pub fn environment<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("PATH", &self.path)
    }

    /// Runs `ctr` to its end with no input.
    #[track_caller]
    pub fn ctr(&self, args: &[&str]) -> Output {
        self.ctr_with(args, None, CTR_LIMIT)
    }

    /// The process of a container's task. With Inlay it is the sandbox's.
    #[track_caller]
    pub fn pid_of(&self, id: &str) -> Result<u32> {
        let tasks = self.ctr(&["task", "list"]).ok().stdout;
        let mut lines = tasks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let line = lines.find(|words| words.first() == Some(&id)).with_context(|| format!("{id} is not listed"))?;
        line.get(1).and_then(|pid| pid.parse().ok()).with_context(|| format!("No process in {line:?}"))
    }

    /// Lets containerd remove what nobody needs. It forgets deletions that come while it does that, until the next one, so
    /// snapshots of containers that end together may stay.
    #[track_caller]
    pub fn collect_garbage(&self) {
        self.ctr(&["leases", "create", "--id", "sweep"]).ok();
        self.ctr(&["leases", "delete", "--sync", "sweep"]).ok();
    }

    /// Runs `ctr` to its end; past `limit` it is killed and the test fails. It is fed `input` as soon
    /// as it has said something: `ctr` itself loses the end of an input that ends before the
    /// container has started.
    #[track_caller]
    pub fn ctr_with(&self, args: &[&str], input: Option<Vec<u8>>, limit: Duration) -> Output {
        let mut command = self.command();
        command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        if input.is_some() {
            command.stdin(Stdio::piped());
        }
        match finish(command, input.unwrap_or_default(), limit) {
            Ok(output) => output,
            Err(error) => panic!("ctr {}: {error:#}", args.join(" ")),
        }
    }

    fn wait_ready(&mut self) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < READY_LIMIT {
            if let Some(status) = self.process.try_wait()? {
                let log = fs::read_to_string(self.log()).unwrap_or_default();
                bail!("containerd ended with {status}:\n{log}");
            }
            // The socket exists before containerd serves; `ctr version` asks it something.
            if UnixStream::connect(self.dir.join("containerd.sock")).is_ok() && self.ctr(&["version"]).status.success()
            {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50));
        }
        bail!("containerd does not answer after {} s", READY_LIMIT.as_secs())
    }

    fn stop(&mut self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.process.id())?), Signal::SIGTERM)?;
        self.process.wait()?;
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

/// A container id or exec id that no other test uses.
pub fn unique(name: &str) -> String {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    format!("{name}-{}", SERIAL.fetch_add(1, Ordering::Relaxed))
}

fn launch(dir: &Path, tools: &Path, path: &str) -> Result<Child> {
    let log = File::options().create(true).append(true).open(dir.join("containerd.log"))?;
    let mut command = Command::new(tools.join("usr/bin/containerd"));
    command.arg("--config").arg(dir.join("config.toml"));
    command.env("PATH", path).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().context("Cannot start containerd")
}

/// No CRI, and only the snapshotter that is used: the rest costs seconds of start-up here.
fn config(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[debug]
level = "debug"
[grpc]
address = "{dir}/containerd.sock"
[ttrpc]
address = "{dir}/containerd.sock.ttrpc"
"#
    )
}

/// Runs a command to its end, its streams served.
fn finish(mut command: Command, input: Vec<u8>, limit: Duration) -> Result<Output> {
    let started = Instant::now();
    let mut child = command.spawn().context("Cannot start")?;
    let (spoke, first) = mpsc::channel();
    let stdout = drain(child.stdout.take().context("No standard output")?, spoke);
    let stderr = drain(child.stderr.take().context("No standard error")?, mpsc::channel().0);
    let mut stdin = child.stdin.take();
    thread::spawn(move || {
        let _ = first.recv();
        // A reader that leaves early is the reader's business.
        let _ = stdin.as_mut().map(|stdin| stdin.write_all(&input));
    });
    let mut stuck = None;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > limit && stuck.is_none() {
            stuck = Some(stuck::threads());
            child.kill()?;
        }
        thread::sleep(Duration::from_millis(10));
    };
    let text = |bytes: thread::Result<Vec<u8>>| String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned();
    let (stdout, stderr) = (text(stdout.join()), text(stderr.join()));
    if let Some(stuck) = stuck {
        bail!("Not ended after {} s; stdout: {stdout}\nstderr: {stderr}\nthreads:\n{stuck}", limit.as_secs());
    }
    Ok(Output { status, stdout, stderr, wall: started.elapsed() })
}

/// Reads to the end; says when the first piece has come, or none ever will.
fn drain(mut from: impl Read + Send + 'static, spoke: mpsc::Sender<()>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut all = vec![0];
        if matches!(from.read(&mut all), Ok(0) | Err(_)) {
            all.clear();
        }
        drop(spoke);
        let _ = from.read_to_end(&mut all);
        all
    })
}
