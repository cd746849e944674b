//! Streams of the host: what a `-chardev` or `-serial` becomes.

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use devices::virtio::console::{self, PortEnd};

use super::{LaunchError, StreamEntry};
use crate::config::SerialConfig;
use crate::stratovirt::command_line::backend::{Chardev, SocketStream};
use crate::stratovirt::command_line::values::Place;

/// Where input for the console on the serial port comes from.
#[derive(Debug)]
pub enum Input {
    /// Standard input.
    Stdin(File),
    /// A pseudo-terminal.
    Terminal {
        /// This process's end.
        master: File,
        /// The other end, held open so that the terminal stays when whoever uses it leaves.
        terminal: File,
    },
    /// Clients of a socket, one at a time.
    Clients {
        /// Where they come.
        listener: OwnedFd,
        /// What the guest's output comes from.
        output: UnixStream,
    },
}

/// Sockets in the file system, removed with this value, and what was opened beside them.
#[derive(Debug, Default)]
pub struct Sockets {
    paths: Vec<PathBuf>,
    streams: Vec<StreamEntry>,
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for path in &self.paths {
            // Gone already, or not ours to remove any more.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Sockets {
    /// Listens at `place`, in place of a socket that a process left there which is gone.
    pub fn listen(&mut self, place: &Place) -> Result<OwnedFd, LaunchError> {
        let failed = |source| LaunchError::Listen { place: format!("{place:?}"), source };
        match place {
            Place::Unix(path) => {
                remove_abandoned(path).map_err(failed)?;
                let listener = UnixListener::bind(path).map_err(failed)?;
                self.paths.push(path.clone());
                Ok(listener.into())
            }
            Place::Tcp(address) => TcpListener::bind(address).map(OwnedFd::from).map_err(failed),
            Place::File(_) => Err(failed(io::ErrorKind::Unsupported.into())),
        }
    }

    /// What was opened, in that order.
    pub fn take_streams(&mut self) -> Vec<StreamEntry> {
        std::mem::take(&mut self.streams)
    }

    /// Opens the stream of `chardev`, which without a name of its own is called `label`. The name of a new pseudo-terminal goes
    /// to standard output and the log.
    pub fn open(&mut self, chardev: &Chardev, label: &str) -> Result<PortEnd, LaunchError> {
        let (end, filename) = self.open_end(chardev)?;
        let label = chardev.id().unwrap_or(label).to_owned();
        self.streams.push(StreamEntry { label, filename });
        Ok(end)
    }

    /// The stream, and what it is in QEMU's words.
    fn open_end(&mut self, chardev: &Chardev) -> Result<(PortEnd, String), LaunchError> {
        Ok(match chardev {
            Chardev::Null(_) => (PortEnd::Streams { input: None, output: None }, "null".into()),
            Chardev::Stdio(_) => {
                let clone = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().map(File::from).map_err(LaunchError::Stdio);
                let (input, output) = (Some(clone(&io::stdin())?), Some(clone(&io::stdout())?));
                (PortEnd::Streams { input, output }, "stdio".into())
            }
            Chardev::Pty(_) => {
                let (end, path) = console::pty().map_err(LaunchError::Stream)?;
                println!("char device redirected to {}", path.display());
                tracing::info!(terminal = %path.display(), "A stream is a pseudo-terminal");
                (end, format!("pty:{}", path.display()))
            }
            Chardev::File(file) => {
                let path = &file.path;
                let file = File::create(path).map_err(|source| LaunchError::File { path: path.clone(), source })?;
                (PortEnd::Streams { input: None, output: Some(file) }, format!("file:{}", path.display()))
            }
            Chardev::Socket(socket) => self.open_socket(socket)?,
        })
    }

    fn open_socket(&mut self, socket: &SocketStream) -> Result<(PortEnd, String), LaunchError> {
        let place = socket.place().ok_or(LaunchError::SocketPlace)?;
        if !socket.server || !socket.nowait {
            return Err(LaunchError::NotServer);
        }
        let filename = match &place {
            Place::Unix(path) | Place::File(path) => format!("unix:{},server", path.display()),
            Place::Tcp(address) => format!("tcp:{address},server"),
        };
        Ok((PortEnd::Listener(self.listen(&place)?), filename))
    }
}

/// Removes the socket at `path` unless somebody listens there.
fn remove_abandoned(path: &Path) -> io::Result<()> {
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        // In use, no socket, or nothing: binding tells.
        _ => Ok(()),
    }
}

/// A stream as the console on the serial port: its output, and where its input comes from.
pub fn serial(end: PortEnd) -> Result<(SerialConfig, Option<Input>), LaunchError> {
    Ok(match end {
        PortEnd::Streams { input: Some(input), output } => {
            (output.map_or(SerialConfig::Null, SerialConfig::Stream), Some(Input::Stdin(input)))
        }
        PortEnd::Streams { input: None, output } => (output.map_or(SerialConfig::Null, SerialConfig::File), None),
        PortEnd::Terminal { master, terminal } => {
            let output = master.try_clone().map_err(LaunchError::Stream)?;
            (SerialConfig::Stream(output), Some(Input::Terminal { master, terminal }))
        }
        PortEnd::Listener(listener) => {
            let (guest, output) = UnixStream::pair().map_err(LaunchError::Stream)?;
            guest.set_nonblocking(true).map_err(LaunchError::Stream)?;
            let guest = File::from(OwnedFd::from(guest));
            (SerialConfig::Stream(guest), Some(Input::Clients { listener, output }))
        }
    })
}
