//! The machine itself in place of a nested host, where it has hardware virtualization.
//!
//! The command gets namespaces of its own (mounts, processes, network) and a root that is an
//! overlay in memory above the machine's: like in the nested host, nothing it does stays.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chroot, pivot_root};

use super::channel::Request;
use super::inside::{self, ARTEFACTS};
use super::signals;
use super::supervise::Ending;

/// Where the new root is put together: a directory that every machine has.
const STAGE: &str = "/mnt";

/// Whether the machine can run microVMs itself, and why or why not.
pub fn virtualization() -> (bool, String) {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let Some(flag) = flags.split_whitespace().find(|flag| matches!(*flag, "vmx" | "svm")) else {
        // A /dev/kvm may be there all the same, one that emulates: an unmodified Linux stops in it.
        return (false, "the CPU has neither vmx nor svm".into());
    };
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => (true, format!("the CPU has {flag} and /dev/kvm opens")),
        Err(error) => (false, format!("the CPU has {flag} but /dev/kvm does not open: {error}")),
    }
}

/// Runs the command on the machine. `program` is this program, which becomes PID 1 of the
/// command's processes and calls [`become_room`].
pub fn run(program: &Path, request: &Request, limit: Duration, artefacts: &Path) -> Result<Ending> {
    let started = Instant::now();
    fs::create_dir_all(artefacts).with_context(|| format!("Cannot create {}", artefacts.display()))?;
    unshare(CloneFlags::CLONE_NEWPID).context("Cannot make a PID namespace (needs root)")?;
    let mut child = Command::new(program)
        .arg("room")
        .arg(serde_json::to_string(request)?)
        .arg(artefacts)
        .stdin(Stdio::null())
        .spawn()
        .context("Cannot start the room")?;
    loop {
        let over = signals::caught().map(Ending::Interrupted);
        let over = over.or_else(|| (started.elapsed() > limit).then_some(Ending::TimedOut));
        if let Some(ending) = over {
            // PID 1 takes every process of its namespace with it.
            child.kill()?;
            child.wait()?;
            return Ok(ending);
        }
        if let Some(status) = child.try_wait()? {
            return Ok(Ending::Exited(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))));
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// PID 1 of the command's processes: makes the room, runs the command, answers its exit code.
pub fn become_room(request: &str, artefacts: &Path) -> Result<i32> {
    let request: Request = serde_json::from_str(request).context("The request does not parse")?;
    if std::process::id() != 1 {
        bail!("The room is entered by `nested-host run --auto` only");
    }
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).context("Cannot make namespaces")?;
    furnish(artefacts)?;
    inside::loopback()?;
    let (program, args) = request.argv.split_first().context("The request names no command")?;
    let mut command = Command::new(program);
    command.args(args).env_clear().envs(request.env).current_dir(&request.cwd);
    let child = command.spawn().with_context(|| format!("Cannot run {program}"))?;
    inside::reap_until(child.id())
}

fn furnish(artefacts: &Path) -> Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("Cannot make mounts private")?;
    let artefacts = File::open(artefacts)?;
    mount(Some("tmpfs"), STAGE, Some("tmpfs"), MsFlags::empty(), none).context("Cannot mount a tmpfs")?;
    let at = |name: &str| format!("{STAGE}/{name}");
    for dir in ["data", "work", "root"] {
        fs::create_dir(at(dir))?;
    }
    let layers = format!("lowerdir=/,upperdir={},workdir={}", at("data"), at("work"));
    let root = at("root");
    mount(Some("overlay"), root.as_str(), Some("overlay"), MsFlags::empty(), Some(layers.as_str()))
        .context("Cannot mount the root")?;
    for dir in ["dev", "sys"] {
        let from = format!("/{dir}");
        let to = format!("{root}/{dir}");
        mount(Some(from.as_str()), to.as_str(), none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
            .with_context(|| format!("Cannot bind {from}"))?;
    }
    mount(Some("proc"), format!("{root}/proc").as_str(), Some("proc"), MsFlags::empty(), none)
        .context("Cannot mount proc")?;
    mount(Some("tmpfs"), format!("{root}/run").as_str(), Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    mount(Some("tmpfs"), format!("{root}/tmp").as_str(), Some("tmpfs"), MsFlags::empty(), Some("mode=1777"))?;
    let kept = format!("{root}{ARTEFACTS}");
    fs::create_dir(&kept)?;
    let source = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&artefacts));
    mount(Some(source.as_str()), kept.as_str(), none, MsFlags::MS_BIND, none).context("Cannot bind the artefacts")?;
    pivot_root(root.as_str(), format!("{root}/mnt").as_str()).or_else(|_| chroot(root.as_str()))?;
    std::env::set_current_dir("/")?;
    // The old root, where it could be moved away.
    let _ = umount2("/mnt", MntFlags::MNT_DETACH);
    Ok(())
}
