//! The processes of one nested host: QEMU, and a virtiofsd for each shared directory.
//!
//! They leave nothing behind, however we end: every socket is an inherited descriptor with no
//! name in the file system, every process gets SIGKILL when its parent dies.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::channel::PORT;
use super::image::Image;
use super::inside::ARTEFACTS_TAG;

/// Builds our QEMU; see there why it is not Debian's.
const BUILD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/nested/qemu/build");

/// Where Debian's packages have QEMU's firmware: seabios, and the option ROMs of qemu-system-data.
const FIRMWARE: [&str; 2] = ["/usr/share/seabios", "/usr/share/qemu"];

/// virtiofsd in C, from the package qemu-system-common.
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// virtiofsd holds a descriptor for each file that the nested host knows of. Below the limit of every
/// kernel's `fs.nr_open`, which is 1048576.
const OPEN_FILES: u32 = 1_000_000;

/// `oops=panic` turns every fault of the nested host's kernel into its end, and `panic=-1` with
/// `-no-reboot` its end into QEMU's. Watchdogs would fire on a loaded machine; the beat replaces them. QEMU translates a
/// program anew for each address that it is loaded to, which takes most of a short program's time: `norandmaps`.
const COMMAND_LINE: &str = "console=ttyS0 loglevel=5 oops=panic panic=-1 reboot=t mitigations=off nokaslr norandmaps \
                            nowatchdog no_timer_check random.trust_cpu=on";

/// What the monitor is asked of a host that has stopped.
const INSPECT: &[u8] = b"info registers -a\ncpu 0\ninfo lapic\nx /96gx $rsp\ncpu 1\ninfo lapic\nx /96gx $rsp\n";

/// How often it is asked, and how long its answer may pause.
const INSPECT_LOOKS: u32 = 4;
const INSPECT_PAUSE: Duration = Duration::from_secs(2);

/// How much of one answer is kept.
const INSPECT_BYTES: u64 = 64 << 10;

/// The shape of the machine that QEMU emulates.
#[derive(Clone, Debug)]
pub struct Shape {
    /// QEMU's program.
    pub qemu: PathBuf,
    /// QEMU's CPU model, with features.
    pub cpu: String,
    /// Number of CPUs.
    pub smp: u32,
    /// Memory, in QEMU's notation.
    pub memory: String,
    /// QEMU's accelerator, with its options.
    pub accel: String,
    /// Words for the kernel's command line, after our own.
    pub append: String,
}

/// The path of our QEMU, which is built if the cache does not have it.
pub fn build() -> Result<PathBuf> {
    let output = Command::new(BUILD).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("Cannot run {BUILD}"))?;
    ensure!(output.status.success(), "{BUILD} ended with {}", output.status);
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim_end()))
}

/// A running nested host; dropped, it is gone.
pub struct Qemu {
    /// QEMU first: it is the one whose end matters.
    processes: Vec<Child>,
    /// Our end of QEMU's monitor.
    monitor: UnixStream,
}

impl Qemu {
    /// Starts the processes. The returned stream is the machine's end of the channel.
    ///
    /// Must be called on the main thread: the kernel sends the parent-death signal when the thread
    /// that started a process ends, not when its process does.
    pub fn start(shape: &Shape, image: &Image, artefacts: &Path) -> Result<(Self, UnixStream)> {
        let (monitor, commands) = UnixStream::pair()?;
        let mut host = Self { processes: Vec::new(), monitor };
        let root = host.share("root", Path::new("/"), "always", artefacts)?;
        let output = host.share(ARTEFACTS_TAG, artefacts, "auto", artefacts)?;
        let (ours, theirs) = UnixStream::pair()?;

        let inside = std::env::current_exe().context("Cannot find this program's own path")?;
        let mut command = Command::new(&shape.qemu);
        command.args(["-accel", &shape.accel, "-nodefaults", "-no-user-config", "-no-reboot"]);
        for dir in FIRMWARE {
            command.args(["-L", dir]);
        }
        command.args(["-display", "none", "-machine", "q35,memory-backend=memory"]);
        command.args(["-cpu", &shape.cpu, "-smp", &shape.smp.to_string(), "-m", &shape.memory]);
        command.args(["-object", &format!("memory-backend-memfd,id=memory,size={},share=on", shape.memory)]);
        command.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initrd);
        command.arg("-append").arg(format!("{COMMAND_LINE} {} inlay.inside={}", shape.append, inside.display()));
        command.arg("-serial").arg(joined("file:", &artefacts.join("console.log")));
        command.args([
            "-device",
            "virtio-serial-pci",
            "-chardev",
            &format!("socket,id=channel,fd={}", theirs.as_raw_fd()),
        ]);
        command.args(["-device", &format!("virtserialport,chardev=channel,name={PORT}")]);
        command.args(["-chardev", &format!("socket,id=monitor,fd={}", commands.as_raw_fd()), "-mon", "monitor"]);
        for (tag, socket) in [("root", &root), (ARTEFACTS_TAG, &output)] {
            command.args(["-chardev", &format!("socket,id={tag},fd={}", socket.as_raw_fd())]);
            command.args(["-device", &format!("vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024")]);
        }
        let log = File::create(artefacts.join("qemu.log"))?;
        let fds = [theirs.as_raw_fd(), commands.as_raw_fd(), root.as_raw_fd(), output.as_raw_fd()];
        host.processes.insert(0, spawn(command, &fds, log)?);
        Ok((host, ours))
    }

    /// QEMU's exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.processes.first_mut()?.try_wait().ok()?
    }

    /// What the processors of a host that has stopped are doing: several looks at their registers and stacks.
    pub fn inspect(&self) -> String {
        let mut seen = Vec::new();
        let _ = self.monitor.set_read_timeout(Some(INSPECT_PAUSE));
        for _ in 0..INSPECT_LOOKS {
            let _ = (&self.monitor).write_all(INSPECT);
            let _ = (&self.monitor).take(INSPECT_BYTES).read_to_end(&mut seen);
        }
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Starts a virtiofsd for `source`, and returns a connection to it.
    fn share(&mut self, tag: &str, source: &Path, cache: &str, artefacts: &Path) -> Result<OwnedFd> {
        static SERIAL: AtomicU32 = AtomicU32::new(0);

        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let name = format!("inlay-{}-{serial}-{tag}", process::id());
        let address = SocketAddr::from_abstract_name(name)?;
        let listener = UnixListener::bind_addr(&address)?;
        let stream = UnixStream::connect_addr(&address)?;

        let mut command = Command::new(VIRTIOFSD);
        command.arg(format!("--fd={}", listener.as_raw_fd()));
        command.arg(format!("--rlimit-nofile={OPEN_FILES}"));
        command.arg("-o").arg(joined("source=", source));
        command.args(["-o", &format!("cache={cache}"), "-o", "sandbox=chroot", "-o", "log_level=warn"]);
        let log = File::create(artefacts.join(format!("virtiofsd-{tag}.log")))?;
        self.processes.push(spawn(command, &[listener.as_raw_fd()], log)?);
        Ok(stream.into())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        for process in &mut self.processes {
            if let Ok(id) = i32::try_from(process.id()) {
                let _ = killpg(Pid::from_raw(id), Signal::SIGKILL);
            }
            let _ = process.wait();
        }
    }
}

/// Starts a process in a group of its own that inherits `fds`, writes to `log` and dies with us.
fn spawn(mut command: Command, fds: &[RawFd], log: File) -> Result<Child> {
    let fds = fds.to_vec();
    command.process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let parent = Pid::this();
    // SAFETY: between fork and exec the closure makes system calls only and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(Signal::SIGKILL)?;
            if Pid::parent() != parent {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            for fd in &fds {
                // SAFETY: the descriptors stay open in the parent until the process has started.
                let fd = std::os::fd::BorrowedFd::borrow_raw(*fd);
                fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
            Ok(())
        });
    }
    let program = command.get_program().to_string_lossy().into_owned();
    command.spawn().with_context(|| format!("Cannot start {program}"))
}

fn joined(prefix: &str, path: &Path) -> OsString {
    let mut joined = OsString::from(prefix);
    joined.push(path);
    joined
}
