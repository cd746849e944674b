//! The identity of a process: its id may be used again, its id and start time together not.

use std::fs;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A process that can be recognised later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot: field 22 of `/proc/<pid>/stat` (proc(5)).
    pub start_time: u64,
}

impl ProcessIdentity {
    /// This process.
    pub fn own() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// A child of this process that nobody has waited for.
    pub fn of_child(pid: Pid) -> io::Result<Self> {
        Self::of(pid.as_raw().cast_unsigned())
    }

    fn of(pid: u32) -> io::Result<Self> {
        let start_time = start_time(pid)?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(Self { pid, start_time })
    }

    /// Whether the process still runs. A zombie does not.
    pub fn is_alive(&self) -> bool {
        matches!(start_time(self.pid), Ok(Some(time)) if time == self.start_time)
    }

    /// Kills the process and waits until it is gone, at most `patience`. One that is gone already is success.
    pub fn kill(&self, patience: Duration) -> io::Result<()> {
        self.end(libc::SIGKILL, patience)
    }

    /// As [`kill`](Self::kill), after the process had that long to end by itself.
    pub fn terminate(&self, patience: Duration) -> io::Result<()> {
        match self.end(libc::SIGTERM, patience) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => self.kill(patience),
            ended => ended,
        }
    }

    fn end(&self, signal: libc::c_int, patience: Duration) -> io::Result<()> {
        let Some(pidfd) = self.open()? else { return Ok(()) };
        send(&pidfd, signal)?;
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        // A pidfd becomes readable when its process ends (pidfd_open(2)).
        match nix::poll::poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout)? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }

    /// A pidfd of exactly this process, if it still runs: the identity is checked after the descriptor pins the id.
    pub fn open(&self) -> io::Result<Option<OwnedFd>> {
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        let Ok(fd) = i32::try_from(fd) else { return Err(io::ErrorKind::InvalidData.into()) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::ESRCH) { Ok(None) } else { Err(error) };
        }
        // SAFETY: the kernel just made this descriptor and nobody else owns it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(self.is_alive().then_some(pidfd))
    }
}

fn send(pidfd: &OwnedFd, signal: libc::c_int) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: pidfd_send_signal reads no memory when its third argument is null.
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
}

/// Start time of a process, `None` when there is no such process or it is a zombie.
fn start_time(pid: u32) -> io::Result<Option<u64>> {
    let text = match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    Ok(parse_start_time(&text))
}

/// The name is in parentheses and may hold anything, so fields are counted from the last parenthesis: the state is
/// field 3, the start time field 22.
fn parse_start_time(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_start_time_past_any_name() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21";
        assert_eq!(parse_start_time(&format!("7 (a) b) c) {tail}")), Some(4242));
        assert_eq!(parse_start_time(&format!("7 (x) Z{}", &tail[1..])), None);
        assert_eq!(parse_start_time("7 (x"), None);
    }

    #[test]
    fn a_process_is_itself_and_no_other() {
        let own = ProcessIdentity::own().unwrap();
        assert!(own.is_alive());
        let earlier = ProcessIdentity { start_time: own.start_time - 1, ..own };
        assert!(!earlier.is_alive());
        // A reused id is never killed: this would end the test itself.
        earlier.kill(Duration::from_secs(1)).unwrap();
    }

    #[test]
    fn kills_what_does_not_end() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "trap '' TERM; echo; sleep 60 & wait; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Its first line says that the signal is ignored.
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let identity = ProcessIdentity::of_child(Pid::from_raw(child.id().try_into().unwrap())).unwrap();
        identity.terminate(Duration::from_millis(200)).unwrap();
        assert!(!identity.is_alive());
        child.wait().unwrap();
    }

    #[test]
    fn kills_and_waits() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let start = start_time(child.id()).unwrap().unwrap();
        let identity = ProcessIdentity { pid: child.id(), start_time: start };
        identity.kill(Duration::from_secs(10)).unwrap();
        assert!(!identity.is_alive());
        identity.kill(Duration::from_secs(10)).unwrap();
        child.wait().unwrap();
    }
}
