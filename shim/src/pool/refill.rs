//! Having free slots filled. The processes that fill them wait for the end of the start that has sent them: it is told by
//! the end of a pipe, whose other end the starting shim closes, by its death if need be.

use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::fcntl::OFlag;
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{dup, dup2_stdin, pipe2};

use crate::config::Config;

/// The name under which the operator's command runs, whatever the file is called.
const PROGRAM: &str = "inlay";
/// What a spare that waits says first.
pub const READY: &str = "ready";

/// A process that fills a slot when the start is over, which it is told by this value's end.
#[derive(Debug)]
pub struct Refill(OwnedFd);

impl Refill {
    /// Sends one. Best effort: a start does not fail for it.
    pub fn send() -> Option<Self> {
        let (start_is_over, sign) = pipe2(OFlag::O_CLOEXEC).ok()?;
        keeper(None, start_is_over.into(), Stdio::null()).ok()?;
        Some(Self(sign))
    }

    /// What is closed when the start is over.
    pub fn sign(&self) -> &OwnedFd {
        &self.0
    }
}

impl From<Refill> for OwnedFd {
    fn from(refill: Refill) -> Self {
        refill.0
    }
}

/// Whether spares are made. The socket of a debug console has its path in the machine, so such a machine is made for its
/// sandbox.
pub fn has_a_pool(config: &Config) -> bool {
    config.factory.enabled && config.factory.pool_size > 0 && !config.agent.debug_console
}

/// Fills the pool and waits until it is full. Returns how many spares came.
pub fn fill(config_path: Option<&Path>, count: u32) -> io::Result<u32> {
    let keepers: Vec<Child> =
        (0..count).map(|_| keeper(config_path, Stdio::null(), Stdio::piped())).collect::<Result<_, _>>()?;
    let mut ready = 0;
    for mut keeper in keepers {
        let mut line = String::new();
        if let Some(output) = keeper.stdout.take() {
            BufReader::new(output).read_line(&mut line)?;
        }
        match line.trim() {
            READY => ready += 1,
            // Somebody else has taken the slot.
            "" => {}
            why => return Err(io::Error::other(why.to_owned())),
        }
    }
    Ok(ready)
}

fn keeper(config_path: Option<&Path>, start_is_over: Stdio, output: Stdio) -> io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg0(PROGRAM).args(["pool", "keep"]);
    if let Some(path) = config_path {
        command.arg("--config").arg(path);
    }
    command.current_dir("/").stdin(start_is_over).stdout(output).stderr(Stdio::null()).process_group(0).spawn()
}

/// Takes the sign that a shim was started with as its standard input, if it was. Neither the shim's standard input nor a
/// process that is forked later has it then.
pub fn take_sign() -> Option<OwnedFd> {
    let stdin = io::stdin();
    let kind = SFlag::from_bits_truncate(fstat(stdin.as_fd()).ok()?.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFIFO {
        return None;
    }
    let sign = dup(stdin.as_fd()).ok()?;
    nix::fcntl::fcntl(&sign, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).ok()?;
    dup2_stdin(std::fs::File::open("/dev/null").ok()?).ok()?;
    Some(sign)
}
