//! Pseudo-terminals: the process's side is made inside the container, the agent gets the master over a socket.

use std::fs;
use std::io::{self, IoSliceMut};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use nix::unistd::{Uid, fchown};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixListener;

/// By the time this waits the helper has reported success, so the terminal is on its way.
const TERMINAL_DEADLINE: Duration = Duration::from_secs(10);

/// The socket on which a process's terminal arrives, as the runtime's `--console-socket`.
pub struct Console {
    listener: UnixListener,
    path: PathBuf,
}

/// The master of a process's terminal.
pub struct Terminal(AsyncFd<OwnedFd>);

nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);

impl Console {
    /// Listens at `path`.
    pub fn listen(path: PathBuf) -> io::Result<Self> {
        let listener = UnixListener::bind(&path)?;
        Ok(Self { listener, path })
    }

    /// The terminal that the helper's child sent.
    pub async fn receive(self) -> io::Result<Terminal> {
        let receive = async {
            let (stream, _) = self.listener.accept().await?;
            let master = loop {
                stream.readable().await?;
                match stream.try_io(Interest::READABLE, || receive_descriptor(stream.as_raw_fd())) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    result => break result?,
                }
            };
            Terminal::new(master)
        };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no terminal was sent");
        tokio::time::timeout(TERMINAL_DEADLINE, receive).await.map_err(late)?
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn receive_descriptor(socket: i32) -> io::Result<OwnedFd> {
    let mut data = [0; 64];
    let mut vectors = [IoSliceMut::new(&mut data)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let message = recvmsg::<UnixAddr>(socket, &mut vectors, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let first = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
        _ => None,
    });
    let descriptor = first.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no descriptor came"))?;
    // SAFETY: the kernel just installed this descriptor for us (SCM_RIGHTS, unix(7)); nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

impl Terminal {
    fn new(master: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&master, FcntlArg::F_GETFL)?);
        fcntl(&master, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: an OwnedFd's descriptor stays open and the same for as long as the OwnedFd lives, and the AsyncFd owns it.
        Ok(Self(unsafe { AsyncFd::register(master) }?))
    }

    /// Rows and columns, in characters. The processes in the foreground get SIGWINCH.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        // SAFETY: winsize is four integers, for which zero is a value.
        let mut size: libc::winsize = unsafe { mem::zeroed() };
        size.ws_row = rows;
        size.ws_col = columns;
        // SAFETY: the descriptor is a terminal's master and the argument the struct that TIOCSWINSZ reads.
        unsafe { set_window_size(self.0.as_raw_fd(), &raw const size) }?;
        Ok(())
    }

    /// Makes the process's side of the terminal its user's.
    pub fn give_to(&self, user: Uid) -> io::Result<()> {
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: the descriptor is a terminal's master, and the argument of TIOCGPTPEER is flags of open(2).
        let peer = Errno::result(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
        // SAFETY: the ioctl just made this descriptor for us.
        let peer = unsafe { OwnedFd::from_raw_fd(peer) };
        fchown(&peer, Some(user), None)?;
        Ok(())
    }

    /// Reads what the process wrote; 0 once no process has the terminal open (Linux says EIO then).
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| nix::unistd::read(fd, buffer).map_err(io::Error::from)) {
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::EIO as i32) => return Ok(0),
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// Writes what the user typed.
    pub async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|fd| nix::unistd::write(fd, data).map_err(io::Error::from)) {
                Ok(Ok(count)) => data = data.get(count..).unwrap_or_default(),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }
}
