//! What machine is wanted, and its start.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Vm;
use super::console::Console;
use super::qmp::Qmp;

/// How long the program may take until its sockets are there.
const SOCKET_LIMIT: Duration = Duration::from_secs(30);

/// How long a guest may take to its shell. Emulated on a busy machine, it takes some seconds.
pub(super) const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// What every guest's kernel is told.
const APPEND: &str = "console=ttyS0 reboot=k panic=-1 quiet iommu=off";

/// A machine to be started, by default with one processor and 128 MiB.
#[derive(Clone, Debug)]
pub struct Order {
    program: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    /// Where its sockets and logs go; the machine's alone.
    pub(super) dir: PathBuf,
    machine: String,
    cpus: u32,
    memory: u32,
    append: String,
    words: Vec<String>,
}

impl Order {
    pub(super) fn new(program: PathBuf, kernel: PathBuf, initrd: PathBuf, dir: PathBuf) -> Self {
        Self {
            program,
            kernel,
            initrd,
            dir,
            machine: "microvm".into(),
            cpus: 1,
            memory: 128,
            append: APPEND.into(),
            words: Vec::new(),
        }
    }

    /// Another program with the same command line: a peer to compare with.
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.program = program.into();
        self
    }

    /// Another kernel.
    pub fn kernel(mut self, kernel: impl Into<PathBuf>) -> Self {
        self.kernel = kernel.into();
        self
    }

    /// Processors.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Memory, in MiB.
    pub fn memory(mut self, mib: u32) -> Self {
        self.memory = mib;
        self
    }

    /// Memory that other processes can be given: what vhost-user devices need.
    pub fn shared(mut self) -> Self {
        self.machine = "microvm,mem-share=on".into();
        self
    }

    /// More words for the kernel's command line.
    pub fn append(mut self, words: &str) -> Self {
        self.append = format!("{} {words}", self.append);
        self
    }

    /// An option with its value.
    pub fn option(self, name: &str, value: impl AsRef<str>) -> Self {
        self.word(name).word(value.as_ref())
    }

    /// A word of the command line.
    pub fn word(mut self, word: &str) -> Self {
        self.words.push(word.to_owned());
        self
    }

    /// Starts the machine and waits for the guest's shell.
    #[track_caller]
    pub fn boot(self) -> Vm {
        let vm = self.start();
        vm.wait_ready(BOOT_LIMIT);
        vm
    }

    /// Starts the machine from a snapshot, whose guest goes on where it was.
    #[track_caller]
    pub fn incoming(self, snapshot: &Path) -> Vm {
        self.option("-incoming", format!("file:{}", snapshot.display())).start()
    }

    /// Starts the machine, and waits for nothing but its sockets.
    #[track_caller]
    pub fn start(self) -> Vm {
        match self.launch() {
            Ok(vm) => vm,
            Err(error) => panic!("{error:#}"),
        }
    }

    /// The command that would be run.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg0("stratovirt");
        command.args(["-machine", &self.machine, "-smp", &self.cpus.to_string(), "-m", &self.memory.to_string()]);
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initrd).args(["-append", &self.append]);
        command.args(["-serial", "socket,path=console,server,nowait", "-qmp", "unix:qmp,server,nowait", "-D", "log"]);
        command.args(&self.words);
        command
    }

    fn launch(self) -> Result<Vm> {
        let command = self.command();
        launch(command, self.dir, "console", "qmp")
    }
}

/// Runs a command that makes the sockets `console` and `qmp` in `dir`, where it runs.
pub(super) fn launch(mut command: Command, dir: PathBuf, console: &str, qmp: &str) -> Result<Vm> {
    let said = File::create(dir.join("output"))?;
    command.current_dir(&dir).stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said);
    let started = Instant::now();
    let process = command.spawn().with_context(|| format!("Cannot run {:?}", command.get_program()))?;
    // From here on it ends with the value, whatever else fails.
    let mut process = Running(process);
    let console = Console::new(connect(&dir.join(console), &mut process.0)?)?;
    let qmp = Qmp::new(connect(&dir.join(qmp), &mut process.0)?)?;
    Ok(Vm::new(process, console, qmp, dir, started))
}

/// A process that does not outlive this.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Connects to a socket as soon as `process` has made it.
fn connect(path: &Path, process: &mut Child) -> Result<UnixStream> {
    let deadline = Instant::now() + SOCKET_LIMIT;
    loop {
        if let Ok(stream) = UnixStream::connect(path) {
            return Ok(stream);
        }
        if let Some(status) = process.try_wait()? {
            let said = std::fs::read_to_string(path.with_file_name("output")).unwrap_or_default();
            bail!("The machine ended with {status}: {said}");
        }
        if Instant::now() > deadline {
            bail!("The machine has made no socket {} in {} s", path.display(), SOCKET_LIMIT.as_secs());
        }
        // So short that nothing of the guest's output is lost before somebody listens.
        thread::sleep(Duration::from_millis(2));
    }
}
