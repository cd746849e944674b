//! The host's end of a port.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a port is connected to. The descriptors become non-blocking, and with them whatever else
/// shares their open file description, such as the terminal that a program was started from.
#[derive(Debug)]
pub enum PortEnd {
    /// Files, pipes, a terminal. `None` is an end that says nothing or takes everything.
    Streams {
        /// Read for the guest.
        input: Option<File>,
        /// Written by the guest.
        output: Option<File>,
    },
    /// A listening stream socket, Unix or TCP, that serves one client at a time. Without a client
    /// the guest's output is lost.
    Listener(OwnedFd),
    /// A pseudo-terminal, see [`pty`].
    Terminal {
        /// The side of the port.
        master: File,
        /// The side of a user, held open: the mode lasts as long as somebody has it open, and a
        /// master whose terminal nobody has hangs up.
        terminal: File,
    },
}

/// Makes a pseudo-terminal in raw mode: the end for a port, and the path for a user's program.
pub fn pty() -> io::Result<(PortEnd, PathBuf)> {
    let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    // SAFETY: no pointers.
    let master = check(unsafe { libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) })?;
    // SAFETY: a descriptor that was just made and that nobody else has.
    let master = unsafe { File::from_raw_fd(master) };
    let mut name = [0; 64];
    // SAFETY: no pointers but to `name`, whose size is told.
    unsafe {
        check(libc::grantpt(master.as_raw_fd()))?;
        check(libc::unlockpt(master.as_raw_fd()))?;
        match libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr(), name.len()) {
            0 => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
    // SAFETY: `ptsname_r` ended the name with a NUL.
    let path = PathBuf::from(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned());
    // Not as the controlling terminal of a daemon, which its end would kill.
    let terminal = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&path)?;
    // SAFETY: all zeros are a `termios`, which `tcgetattr` then fills.
    let mut mode: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: `mode` lives through the calls.
    unsafe {
        check(libc::tcgetattr(terminal.as_raw_fd(), &mut mode))?;
        libc::cfmakeraw(&mut mode);
        check(libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &mode))?;
    }
    Ok((PortEnd::Terminal { master, terminal }, path))
}

/// The host's end as both halves of the device use it. It outlives resets.
#[derive(Debug)]
pub(super) struct Host {
    listener: Option<OwnedFd>,
    ends: Mutex<Ends>,
    /// The user's side of a pseudo-terminal.
    _terminal: Option<File>,
}

#[derive(Clone, Debug, Default)]
struct Ends {
    input: Option<Arc<File>>,
    output: Option<Arc<File>>,
}

impl Host {
    pub(super) fn new(end: PortEnd) -> io::Result<Self> {
        let (listener, input, output, terminal) = match end {
            PortEnd::Streams { input, output } => (None, input, output, None),
            PortEnd::Listener(listener) => (Some(listener), None, None, None),
            PortEnd::Terminal { master, terminal } => {
                // Each direction is watched by a descriptor of its own.
                let output = master.try_clone()?;
                (None, Some(master), Some(output), Some(terminal))
            }
        };
        for fd in [input.as_ref().map(File::as_raw_fd), output.as_ref().map(File::as_raw_fd)]
            .into_iter()
            .chain([listener.as_ref().map(OwnedFd::as_raw_fd)])
            .flatten()
        {
            set_nonblocking(fd)?;
        }
        let ends = Ends { input: input.map(Arc::new), output: output.map(Arc::new) };
        Ok(Self { listener, ends: Mutex::new(ends), _terminal: terminal })
    }

    fn lock(&self) -> MutexGuard<'_, Ends> {
        // Two pointers: a panic elsewhere leaves them as good as they were.
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What input comes from.
    pub(super) fn input(&self) -> Option<Arc<File>> {
        self.lock().input.clone()
    }

    /// What output goes to.
    pub(super) fn output(&self) -> Option<Arc<File>> {
        self.lock().output.clone()
    }

    /// The socket that clients come to.
    pub(super) fn listener(&self) -> Option<&OwnedFd> {
        self.listener.as_ref()
    }

    /// Whether somebody is there. An end of streams always is.
    pub(super) fn is_connected(&self) -> bool {
        let ends = self.lock();
        self.listener.is_none() || ends.input.is_some() || ends.output.is_some()
    }

    /// Takes a client from the listener; false when none is there.
    pub(super) fn accept(&self) -> io::Result<bool> {
        let Some(listener) = self.listener.as_ref().filter(|_| !self.is_connected()) else { return Ok(false) };
        let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: no address is asked for.
        let client = unsafe { libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags) };
        if client < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(false) } else { Err(error) };
        }
        // SAFETY: a descriptor that was just made and that nobody else has.
        let client = unsafe { File::from_raw_fd(client) };
        let output = client.try_clone()?;
        *self.lock() = Ends { input: Some(Arc::new(client)), output: Some(Arc::new(output)) };
        Ok(true)
    }

    /// Nothing more comes from the input: a client is gone; a stream has ended, but can still take
    /// output.
    pub(super) fn end_of_input(&self) {
        let mut ends = self.lock();
        ends.input = None;
        if self.listener.is_some() {
            ends.output = None;
        }
    }

    /// The output takes no more.
    pub(super) fn end_of_output(&self) {
        let mut ends = self.lock();
        ends.output = None;
        if self.listener.is_some() {
            ends.input = None;
        }
    }

    /// Writes a byte if the output takes it at once.
    pub(super) fn write_byte(&self, byte: u8) {
        if let Some(output) = self.output() {
            // A byte that is not taken is lost: whoever sends it has no way to learn that.
            let _ = (&*output).write(&[byte]);
        }
    }
}

fn set_nonblocking(fd: libc::c_int) -> io::Result<()> {
    // SAFETY: flags of an open descriptor; no pointers.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
