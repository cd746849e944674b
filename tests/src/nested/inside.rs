//! PID 1 of the nested host, once the machine's root is in place: makes a host of it, runs the
//! command that the machine asks for, and says how it ended.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kvm_ioctls::Kvm;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;

use super::channel::{Frame, MAX_PAYLOAD, PORT, Request};

/// Where the machine's directory for artefacts is mounted.
pub const ARTEFACTS: &str = "/run/inlay-artefacts";

/// The virtio-fs tag of that directory.
pub const ARTEFACTS_TAG: &str = "artefacts";

/// How long to wait for the end of the command's output once the command has ended: a process that
/// it left behind may hold the pipes open.
const DRAIN: Duration = Duration::from_secs(2);

type Channel = Arc<Mutex<File>>;

/// Runs as PID 1; returns only if the host could not be made, and then the machine sees a panic.
pub fn run() -> Result<()> {
    let started = Instant::now();
    furnish()?;
    let mut port = open_port()?;
    Frame::Hello.write(&mut port)?;
    let Frame::Request(request) = Frame::read(&mut port)? else {
        bail!("The machine sent something else than a request");
    };
    let channel: Channel = Arc::new(Mutex::new(port));
    beat(Arc::clone(&channel), started);
    let code = match obey(&request, &channel) {
        Ok(code) => code,
        Err(error) => {
            send(&channel, &Frame::Stderr(format!("nested-host: {error:#}\n").into_bytes()));
            // What a shell answers for a command that it cannot run.
            127
        }
    };
    send(&channel, &Frame::Exit(code));
    // The machine ends us as soon as it has read that; power off in case it does not.
    thread::sleep(Duration::from_secs(5));
    reboot(RebootMode::RB_POWER_OFF).context("Cannot power off")?;
    Ok(())
}

/// Mounts and switches on what a host has and the initrd did not make.
fn furnish() -> Result<()> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_at("tmpfs", "/run", "tmpfs", plain, "mode=755")?;
    mount_at("tmpfs", "/tmp", "tmpfs", plain, "mode=1777")?;
    mount_at("devpts", "/dev/pts", "devpts", MsFlags::MS_NOSUID, "mode=620,gid=5,ptmxmode=666")?;
    mount_at("tmpfs", "/dev/shm", "tmpfs", plain, "mode=1777")?;
    mount_at("mqueue", "/dev/mqueue", "mqueue", plain, "")?;
    mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", plain, "")?;
    mount_at("bpf", "/sys/fs/bpf", "bpf", plain, "")?;
    mount_at("debugfs", "/sys/kernel/debug", "debugfs", plain, "")?;
    mount_at(ARTEFACTS_TAG, ARTEFACTS, "virtiofs", plain, "")?;
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    for controller in controllers.split_whitespace() {
        let line = format!("+{controller}");
        let place = "/sys/fs/cgroup/cgroup.subtree_control";
        fs::write(place, line).with_context(|| format!("Cannot enable the {controller} controller"))?;
    }
    fs::write("/proc/sys/kernel/hostname", "nested\n")?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1\n")?;
    hold_a_vm()?;
    loopback()
}

/// Makes a VM that is there as long as the host is. KVM patches the scheduler's code with the first and the last VM of a
/// host, while all processors run it: rarely QEMU keeps a translation from the middle of that (docs/nested-host.md).
fn hold_a_vm() -> Result<()> {
    let kvm = Kvm::new().context("Cannot open /dev/kvm")?;
    std::mem::forget(kvm.create_vm().context("Cannot make a VM to hold")?);
    Ok(())
}

/// Switches the loopback device on.
pub(super) fn loopback() -> Result<()> {
    let args = ["ip", "link", "set", "lo", "up"];
    let status = Command::new("/bin/busybox").args(args).stdin(Stdio::null()).status().context("Cannot run busybox")?;
    ensure!(status.success(), "busybox {} ended with {status}", args.join(" "));
    Ok(())
}

fn mount_at(source: &str, target: &str, kind: &str, flags: MsFlags, data: &str) -> Result<()> {
    fs::create_dir_all(target).or_else(|error| if Path::new(target).is_dir() { Ok(()) } else { Err(error) })?;
    mount(Some(source), target, Some(kind), flags, Some(data))
        .with_context(|| format!("Cannot mount {kind} on {target}"))
}

/// Finds the channel's port by its name; no udev makes `/dev/virtio-ports` here.
fn open_port() -> Result<File> {
    for entry in fs::read_dir("/sys/class/virtio-ports").context("No virtio-serial device is present")? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT {
            let device = PathBuf::from("/dev").join(entry.file_name());
            let file = OpenOptions::new().read(true).write(true).open(&device);
            return file.with_context(|| format!("Cannot open {}", device.display()));
        }
    }
    bail!("No virtio-serial port is named {PORT}")
}

fn beat(channel: Channel, started: Instant) {
    thread::spawn(move || {
        loop {
            thread::sleep(Duration::from_secs(1));
            let ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            send(&channel, &Frame::Beat(ms));
        }
    });
}

/// A lost channel is not reported: there is nobody left to tell.
fn send(channel: &Channel, frame: &Frame) {
    let mut port = channel.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = frame.write(&mut *port);
}

/// Runs the command to its end, and reaps whatever else ends meanwhile.
fn obey(request: &Request, channel: &Channel) -> Result<i32> {
    let (program, args) = request.argv.split_first().context("The request names no command")?;
    let mut command = Command::new(program);
    command.args(args).env_clear().envs(request.env.iter().map(|(k, v)| (k, v)));
    command.current_dir(&request.cwd).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("Cannot run {program}"))?;
    let (done, drained) = mpsc::channel::<()>();
    if let Some(stdout) = child.stdout.take() {
        pump(stdout, Arc::clone(channel), Frame::Stdout, done.clone());
    }
    if let Some(stderr) = child.stderr.take() {
        pump(stderr, Arc::clone(channel), Frame::Stderr, done);
    }
    let code = reap_until(child.id())?;
    // Both pumps drop their sender at the end of the output.
    let deadline = Instant::now() + DRAIN;
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        if drained.recv_timeout(left) == Err(RecvTimeoutError::Disconnected) {
            break;
        }
    }
    Ok(code)
}

/// Reaps whatever ends until `child` does; its exit code, or 128 + the signal that ended it.
pub(super) fn reap_until(child: u32) -> Result<i32> {
    let child = Pid::from_raw(i32::try_from(child)?);
    loop {
        match wait().context("Cannot wait for the command")? {
            WaitStatus::Exited(ended, code) if ended == child => return Ok(code),
            WaitStatus::Signaled(ended, signal, _) if ended == child => return Ok(128 + signal as i32),
            _ => {}
        }
    }
}

fn pump(mut from: impl Read + Send + 'static, channel: Channel, frame: fn(Vec<u8>) -> Frame, done: mpsc::Sender<()>) {
    thread::spawn(move || {
        let mut piece = vec![0; MAX_PAYLOAD];
        while let Ok(size @ 1..) = from.read(&mut piece) {
            send(&channel, &frame(piece[..size].to_vec()));
        }
        drop(done);
    });
}
