//! A further process in a container that runs.
//!
//! By hand and not by libcontainer's tenant builder: that drops the container's seccomp profile, so an exec would
//! escape what confines the container's own processes.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use libcontainer::syscall::syscall::{SyscallType, create_syscall};
use libcontainer::{capabilities, seccomp, tty};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Gid, Uid, chdir, fchown, pipe2, setgroups, setresgid, setresuid, setsid};
use oci_spec::runtime::{LinuxSeccomp, Process, Spec};
use serde::{Deserialize, Serialize};

use super::entrypoint::{become_program, find};
use super::{CONFIG, chain};

/// What the agent writes to `NAME.json` in the container's directory.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The process, as the runtime specification describes it.
    pub process: Process,
    /// The container's first process, whose namespaces are joined.
    pub init: i32,
    /// The container's cgroup.
    pub cgroup: PathBuf,
    /// Where the terminal goes, if the process has one.
    pub console: Option<PathBuf>,
}

/// Namespaces in the order in which they are joined: the mount namespace last, since `/proc` is needed until then.
const NAMESPACES: [(&str, CloneFlags); 7] = [
    ("user", CloneFlags::CLONE_NEWUSER),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("net", CloneFlags::CLONE_NEWNET),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ("mnt", CloneFlags::CLONE_NEWNS),
];

/// Runs the process that `NAME.json` in the container's directory describes; answers its number once it is the program.
pub fn exec(directory: &Path, name: &str) -> Result<i32, String> {
    let request: ExecRequest = read_json(&directory.join(format!("{name}.json")))?;
    let spec: Spec = read_json(&directory.join(CONFIG))?;
    let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    let console = request.console.as_ref().map(UnixStream::connect).transpose().map_err(|error| error.to_string())?;

    let failed = |what: &'static str| move |error: std::io::Error| format!("{what}: {error}");
    // First into the cgroup: what is made from here on is counted, and killed, with the container.
    join_cgroup(&request).map_err(failed("Joining the container's cgroup failed"))?;
    if let Some(score) = request.process.oom_score_adj() {
        fs::write("/proc/self/oom_score_adj", score.to_string()).map_err(failed("Setting the OOM score failed"))?;
    }
    let syscall = create_syscall();
    for limit in request.process.rlimits().iter().flatten() {
        syscall.set_rlimit(limit).map_err(|error| chain(&error))?;
    }
    join_namespaces(request.init)?;

    let (errors, child_errors) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| errno.to_string())?;
    // SAFETY: this process has one thread, so no lock can be held by another at the clone and the child may run any
    // code. No stack is given: the child gets a copy of this one, as after fork(2).
    let pid =
        unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_PARENT | libc::SIGCHLD, 0usize, 0usize, 0usize, 0usize) };
    match pid {
        -1 => Err(format!("Making the process failed: {}", Errno::last().desc())),
        0 => {
            drop(errors);
            let Err(error) = run(&request.process, profile, console);
            let _ = File::from(child_errors).write_all(error.as_bytes());
            std::process::exit(1)
        }
        pid => {
            drop(child_errors);
            let mut error = String::new();
            File::from(errors).read_to_string(&mut error).map_err(|error| error.to_string())?;
            if error.is_empty() { i32::try_from(pid).map_err(|error| error.to_string()) } else { Err(error) }
        }
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, String> {
    let bytes = fs::read(path).map_err(|error| format!("Reading {} failed: {error}", path.display()))?;
    serde_json::from_slice(&bytes).map_err(|error| format!("{} is not understood: {error}", path.display()))
}

/// A container that made cgroups of its own below its cgroup takes no process in the latter (cgroup v2's "no internal
/// processes" rule, EBUSY); then its first process shows where there is room.
fn join_cgroup(request: &ExecRequest) -> std::io::Result<()> {
    match fs::write(request.cgroup.join("cgroup.procs"), "0") {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let membership = fs::read_to_string(format!("/proc/{}/cgroup", request.init))?;
            let path = membership.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
            fs::write(Path::new("/sys/fs/cgroup").join(path).join("cgroup.procs"), "0")
        }
        result => result,
    }
}

fn join_namespaces(init: i32) -> Result<(), String> {
    let open = |(name, kind)| -> Result<Option<(OwnedFd, CloneFlags)>, String> {
        let theirs = format!("/proc/{init}/ns/{name}");
        let ours = fs::read_link(format!("/proc/self/ns/{name}"));
        let link = fs::read_link(&theirs).map_err(|_| "The container is not running".to_owned())?;
        if ours.is_ok_and(|ours| ours == link) {
            return Ok(None);
        }
        let file = File::open(&theirs).map_err(|_| "The container is not running".to_owned())?;
        Ok(Some((file.into(), kind)))
    };
    // All are opened before any is joined: afterwards /proc may be another one.
    let namespaces = NAMESPACES.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
    for (fd, kind) in namespaces.into_iter().flatten() {
        setns(fd, kind).map_err(|errno| format!("Joining the container's namespaces failed: {}", errno.desc()))?;
    }
    Ok(())
}

/// In the child: everything between the container's namespaces and the program. The order is that of runc's
/// `setns_init_linux.go`, and for the same reasons: see the comments.
fn run(
    process: &Process,
    profile: Option<&LinuxSeccomp>,
    console: Option<UnixStream>,
) -> Result<std::convert::Infallible, String> {
    let errno = |what: &'static str| move |errno: Errno| format!("{what}: {}", errno.desc());
    let syscall = SyscallType::default().create_syscall();
    setsid().map_err(errno("Making a session failed"))?;
    if let Some(console) = console {
        tty::setup_console(syscall.as_ref(), console.into_raw_fd(), false).map_err(|error| chain(&error))?;
        // The user must be able to open its own terminal. For a container's first process the agent sees to that, since
        // there is time until the start.
        fchown(io::stdin(), Some(Uid::from_raw(process.user().uid())), None)
            .map_err(errno("Giving the terminal to the user failed"))?;
    }
    // Nothing but 0, 1 and 2 survives the exec. Before the filter, which need not allow this.
    syscall.close_range(0).map_err(|error| chain(&error))?;
    let no_new_privileges = process.no_new_privileges().unwrap_or(false);
    if no_new_privileges {
        nix::sys::prctl::set_no_new_privs().map_err(errno("Setting no_new_privs failed"))?;
    }
    // Without no_new_privs, loading a filter needs CAP_SYS_ADMIN (seccomp(2)), which goes with the next steps. With
    // it, the filter is loaded last, so that it need not allow what those steps do.
    if !no_new_privileges {
        load(profile)?;
    }
    // Before the user changes: root may enter a directory that the user may not; after it, the user's own rights count.
    let cwd = process.cwd();
    let early = chdir(cwd);
    if let Err(error) = early
        && error != Errno::EACCES
    {
        return Err(cwd_error(cwd, error));
    }
    nix::sys::prctl::set_keepcaps(true).map_err(errno("Keeping capabilities failed"))?;
    let user = process.user();
    let gids: Vec<Gid> = user.additional_gids().iter().flatten().map(|&gid| Gid::from_raw(gid)).collect();
    setgroups(&gids).map_err(errno("Setting the additional groups failed"))?;
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setresgid(gid, gid, gid).map_err(errno("Setting the group failed"))?;
    setresuid(uid, uid, uid).map_err(errno("Setting the user failed"))?;
    if let Some(umask) = user.umask() {
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(umask));
    }
    capabilities::reset_effective(syscall.as_ref()).map_err(|error| chain(&error))?;
    if let Some(wanted) = process.capabilities() {
        capabilities::drop_privileges(wanted, syscall.as_ref()).map_err(|error| chain(&error))?;
    }
    if early.is_err() {
        chdir(cwd).map_err(|error| cwd_error(cwd, error))?;
    }
    find(process)?;
    if no_new_privileges {
        load(profile)?;
    }
    become_program(process)
}

fn load(profile: Option<&LinuxSeccomp>) -> Result<(), String> {
    let Some(profile) = profile else { return Ok(()) };
    seccomp::initialize_seccomp(profile).map(drop).map_err(|error| chain(&error))
}

fn cwd_error(cwd: &Path, errno: Errno) -> String {
    format!("chdir to cwd ({cwd:?}) set in config.json failed: {}", errno.desc().to_lowercase())
}
