//! One test on the stage: the shared containerd, a runtime, and the host's state before and after.

use std::cell::RefCell;
use std::env;
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::panic;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, Once, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Containerd, HOME, HostState, Output, converse, unique};
use crate::images;

/// The longest that a dialogue on a terminal may take.
const DIALOGUE_LIMIT: Duration = Duration::from_secs(120);

/// How much of a log is shown as evidence.
const SHOWN: u64 = 24 << 10;

/// Where Inlay looks for its configuration.
pub const CONFIGURATION: &str = "/etc/inlay/configuration.toml";

/// What starts the containers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Runtime {
    /// Debian's runc: the anchor. A test that fails with it is wrong.
    Runc,
    /// Inlay.
    Inlay,
}

impl Runtime {
    /// containerd's name of the runtime.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "io.containerd.runc.v2",
            Self::Inlay => "io.containerd.inlay.v2",
        }
    }
}

/// Files that the runtime is made of, as built in the checkout.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The program `inlay`.
    pub shim: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initrd.
    pub initrd: PathBuf,
    /// What is in the initrd, as an image on a drive.
    pub image: PathBuf,
    /// The initrd of the guest with tools.
    pub tools: PathBuf,
}

impl Parts {
    /// Where the build puts them: `target/release` and `target/guest`, or what `INLAY_SHIM` and
    /// `INLAY_GUEST` name.
    pub fn find() -> Self {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target");
        let named =
            |variable: &str, default: &str| env::var_os(variable).map_or_else(|| target.join(default), PathBuf::from);
        let guest = named("INLAY_GUEST", "guest");
        Self {
            shim: named("INLAY_SHIM", "release/inlay"),
            kernel: guest.join("vmlinux"),
            initrd: guest.join("inlay-minimal.initrd"),
            image: guest.join("inlay-minimal.img"),
            tools: guest.join("inlay-tools.initrd"),
        }
    }

    /// A configuration with these parts and `extra` lines in the table of the machine.
    pub fn configuration(&self, extra: &str) -> String {
        self.configuration_of("initrd", &self.initrd, extra)
    }

    /// The same with the image in the initrd's place.
    pub fn configuration_of_image(&self, extra: &str) -> String {
        self.configuration_of("image", &self.image, extra)
    }

    fn configuration_of(&self, key: &str, root: &Path, extra: &str) -> String {
        let (kernel, root) = (self.kernel.display(), root.display());
        format!(
            "[hypervisor.inlay]\nkernel = \"{kernel}\"\n{key} = \"{root}\"\n{extra}\n[runtime]\ntrace_file = \"{HOME}/trace.jsonl\"\n"
        )
    }
}

/// A test's view of the host.
pub struct Scene {
    /// What starts the containers.
    pub runtime: Runtime,
    /// The parts of Inlay.
    pub parts: Parts,
    before: RefCell<HostState>,
    log_start: u64,
    ids: RefCell<Vec<String>>,
}

/// Plays one test. Afterwards nothing of it may be left on the host; if it fails, what is known of
/// the reasons is printed.
pub fn play(runtime: Runtime, test: impl FnOnce(&Scene)) {
    note_panics();
    let scene = Scene::set(runtime);
    test(&scene);
    HostState::assert_settles(&scene.before.borrow());
}

thread_local! {
    /// What this thread's panic said.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Notes what a panic says, for the evidence: the test binary itself tells it only when all tests have ended.
pub(super) fn note_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            PANIC.replace(info.to_string());
            usual(info);
        }));
    });
}

/// The containerd of this process, with the images of busybox imported.
pub fn containerd() -> MutexGuard<'static, Containerd> {
    static CONTAINERD: OnceLock<Mutex<Containerd>> = OnceLock::new();
    let start = || -> Result<Mutex<Containerd>> {
        let containerd = Containerd::start(Path::new(HOME), Some(&Parts::find().shim))?;
        containerd.import(&images::busybox()?)?;
        Ok(Mutex::new(containerd))
    };
    let shared =
        CONTAINERD.get_or_init(|| start().unwrap_or_else(|error| panic!("Cannot start containerd: {error:#}")));
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Scene {
    fn set(runtime: Runtime) -> Self {
        let parts = Parts::find();
        let log = containerd().log();
        configure(&parts.configuration("")).unwrap_or_else(|error| panic!("{error:#}"));
        let log_start = fs::metadata(log).map_or(0, |data| data.len());
        Self { runtime, parts, before: RefCell::new(HostState::take()), log_start, ids: RefCell::default() }
    }

    /// Imports the image of several layers, the first time: it takes seconds, and few tests need it.
    /// To be called first, as the image stays on the host after the test.
    pub fn import_debian(&self) {
        static IMPORTED: Once = Once::new();
        IMPORTED.call_once(|| {
            let imported = images::debian().and_then(|archive| containerd().import(&archive));
            imported.unwrap_or_else(|error| panic!("{error:#}"));
        });
        self.before.replace(HostState::take());
    }

    /// Runs `ctr run --rm` on the busybox image, to its end.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> Output {
        self.run_with(&[], images::BUSYBOX, args)
    }

    /// Runs `ctr run --rm OPTIONS IMAGE`, to its end.
    #[track_caller]
    pub fn run_with(&self, options: &[&str], image: &str, args: &[&str]) -> Output {
        let id = self.id("run");
        let mut all = vec!["run", "--rm", "--runtime", self.runtime.name()];
        all.extend(options);
        all.extend([image, &id]);
        all.extend(args);
        self.ctr(&all)
    }

    /// Runs `ctr run --rm` with something on its standard input, to its end.
    #[track_caller]
    pub fn run_fed(&self, input: Vec<u8>, program: &str, limit: Duration) -> Output {
        const READY: &str = "ready\n";

        let id = self.id("fed");
        let script = format!("printf '{READY}'; exec {program}");
        let args = ["run", "--rm", "--runtime", self.runtime.name(), images::BUSYBOX, &id, "sh", "-c", &script];
        let mut output = containerd().ctr_with(&args, Some(input), limit);
        if output.stdout.starts_with(READY) {
            output.stdout.drain(..READY.len());
        }
        output
    }

    /// Starts a container in the background and returns its id. [`Scene::remove`] it.
    #[track_caller]
    pub fn start(&self, args: &[&str]) -> String {
        let id = self.id("task");
        let mut all = vec!["run", "--detach", "--runtime", self.runtime.name(), images::BUSYBOX, &id];
        all.extend(args);
        self.ctr(&all).ok();
        id
    }

    /// Runs a program in a running container.
    #[track_caller]
    pub fn exec(&self, id: &str, args: &[&str]) -> Output {
        let exec = unique("exec");
        let mut all = vec!["task", "exec", "--exec-id", &exec, id];
        all.extend(args);
        self.ctr(&all)
    }

    /// Runs any `ctr` command.
    #[track_caller]
    pub fn ctr(&self, args: &[&str]) -> Output {
        containerd().ctr(args)
    }

    /// The operator's command.
    pub fn operator(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.parts.shim);
        containerd().environment(&mut command).args(args);
        command
    }

    /// Runs the operator's command to its end.
    #[track_caller]
    pub fn inlay(&self, args: &[&str]) -> Output {
        let started = Instant::now();
        let output = self.operator(args).output().unwrap_or_else(|error| panic!("inlay {}: {error}", args.join(" ")));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Output {
            status: output.status,
            stdout: text(output.stdout),
            stderr: text(output.stderr),
            wall: started.elapsed(),
        }
    }

    /// Runs a `ctr` command on a terminal, and talks to it.
    #[track_caller]
    pub fn converse(&self, args: &[&str], size: (u16, u16), dialogue: &[(&str, &str)]) -> (String, Option<i32>) {
        let mut command = containerd().command();
        command.args(args);
        match converse(command, size, dialogue, DIALOGUE_LIMIT) {
            Ok((seen, status)) => (seen, status.code()),
            Err(error) => panic!("ctr {}: {error:#}", args.join(" ")),
        }
    }

    /// Kills a container started in the background and removes it.
    #[track_caller]
    pub fn remove(&self, id: &str) {
        self.ctr(&["task", "kill", "--signal", "KILL", id]);
        self.wait_for(&format!("{id} to stop"), || !self.state_of(id).contains("RUNNING"));
        self.ctr(&["task", "delete", id]).ok_or_missing();
        self.ctr(&["container", "delete", id]).ok();
    }

    /// The line that `ctr task list` has for a container; empty if it has none.
    #[track_caller]
    pub fn state_of(&self, id: &str) -> String {
        let list = self.ctr(&["task", "list"]).ok().stdout;
        list.lines().find(|line| line.split_whitespace().next() == Some(id)).unwrap_or_default().to_owned()
    }

    /// The process of a container's task. With Inlay it is the sandbox's.
    #[track_caller]
    pub fn pid_of(&self, id: &str) -> u32 {
        containerd().pid_of(id).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Waits for something that has no event of its own.
    #[track_caller]
    pub fn wait_for(&self, what: &str, mut happened: impl FnMut() -> bool) {
        let started = Instant::now();
        while !happened() {
            assert!(started.elapsed() < Duration::from_secs(60), "Waited in vain for {what}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// What containerd and the shims have logged since the test began.
    pub fn log(&self) -> String {
        let mut text = Vec::new();
        if let Ok(mut file) = fs::File::open(containerd().log()) {
            let _ = file.seek(SeekFrom::Start(self.log_start));
            let _ = file.read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// An id for a container of this test, which will be gone when the test is over.
    pub fn id(&self, name: &str) -> String {
        let id = unique(name);
        self.ids.borrow_mut().push(id.clone());
        id
    }

    /// Takes down what a failed test left, so that the next one does not suffer.
    fn strike(&self) {
        for id in self.ids.borrow().iter() {
            for args in [
                &["task", "kill", "--signal", "KILL", id],
                &["task", "delete", "--force", id][..],
                &["container", "delete", id],
            ] {
                let mut command = containerd().command();
                // With a limit of its own: a failed test must not hold up the others for long.
                let _ = command.args(["--timeout", "10s"]).args(args).output();
            }
        }
    }

    fn evidence(&self) -> String {
        let mut text = format!("=== containerd and shims ===\n{}", tail(&self.log()));
        for place in ["/run/inlay", "/run/kata-containers"] {
            logs_below(Path::new(place), &mut text);
        }
        text.push_str("=== left behind ===\n");
        text.push_str(&HostState::take().left_since(&self.before.borrow()));
        text
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        testify(&self.evidence());
        self.strike();
    }
}

impl Output {
    /// The output of a command whose object may have gone already.
    #[track_caller]
    pub fn ok_or_missing(self) -> Self {
        let missing = self.stderr.contains("not found");
        assert!(missing || self.status.success(), "The command failed: {self:#?}");
        self
    }
}

/// Prints what is known of a failed test's reasons, and adds it to the file that is kept of the test.
pub(super) fn testify(evidence: &str) {
    let text = PANIC.with_borrow(|panic| format!("{panic}\n{evidence}\n"));
    println!("{text}");
    if let Some(dir) = env::var_os("INLAY_ARTEFACTS") {
        let name = thread::current().name().unwrap_or("test").replace("::", ".");
        let file = fs::File::options().create(true).append(true).open(PathBuf::from(dir).join(format!("{name}.txt")));
        let _ = file.and_then(|mut file| file.write_all(text.as_bytes()));
    }
}

/// Writes Inlay's configuration file.
pub fn configure(text: &str) -> Result<()> {
    let path = Path::new(CONFIGURATION);
    fs::create_dir_all(path.parent().context("The configuration has no directory")?)?;
    fs::write(path, text).with_context(|| format!("Cannot write {CONFIGURATION}"))
}

fn logs_below(dir: &Path, text: &mut String) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, Ok(kind)) = (entry.path(), entry.file_type()) else { continue };
        if kind.is_dir() && !path.ends_with("rootfs") {
            logs_below(&path, text);
        } else if kind.is_file() {
            let content = fs::read(&path).unwrap_or_default();
            text.push_str(&format!("=== {} ===\n{}\n", path.display(), tail(&String::from_utf8_lossy(&content))));
        }
    }
}

fn tail(text: &str) -> &str {
    let shown = usize::try_from(SHOWN).unwrap_or(usize::MAX);
    let mut start = text.len().saturating_sub(shown);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}
