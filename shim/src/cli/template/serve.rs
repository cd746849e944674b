//! `inlay template serve`: chunks of an exported template, for nodes whose sandboxes are restored from it.

use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use seccomp::Confinement;
use vmm::memory::source::{Address, ChunkServer, Listener};
use vmm_sys_util::eventfd::EventFd;

use crate::config::Config;
use crate::log;
use crate::template::transfer::{Exported, open_chunks};

/// Serves the chunks in `directory` until SIGTERM or SIGINT. The process is confined as a machine is, once it has
/// opened what it serves, and each client's thread as one that talks to the outside.
pub fn serve(directory: &Path, address: &Address, config: &Config) -> Result<(), Box<dyn Error>> {
    log::init(None, config.runtime.log_level);
    crate::bootstrap::raise_file_limit();
    let exported = Exported::read(directory)?;
    let index = exported.index(directory)?;
    let chunks = open_chunks(directory)?;
    let stop = Arc::new(stop_on_signals()?);
    let confinement = config.runtime.confinement;
    let server = ChunkServer::new(&index, chunks, stop, confinement)?;
    let bound = Bound::at(address).map_err(|error| format!("Cannot listen on {address}: {error}"))?;
    if confinement == Confinement::On {
        seccomp::confine_machine()?;
    }
    // Whoever has started this may wait for the line, or have closed the pipe.
    let _ = writeln!(io::stdout(), "The chunks of the template {} are served on {address}", exported.name);
    Ok(server.run(&bound.listener)?)
}

/// Readable once a signal asks for the end. The server looks at its readiness alone, so a signalfd(2) does.
fn stop_on_signals() -> io::Result<EventFd> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    let descriptor = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    // SAFETY: the descriptor is nobody else's from here on.
    Ok(unsafe { EventFd::from_raw_fd(std::os::fd::OwnedFd::from(descriptor).into_raw_fd()) })
}

/// A listener; its socket file goes with it.
struct Bound {
    listener: Listener,
    file: Option<PathBuf>,
}

impl Bound {
    fn at(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(name) => Ok(Self { listener: Listener::Tcp(TcpListener::bind(name.as_str())?), file: None }),
            Address::Unix(path) => {
                let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
                let is_refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
                // What a killed server has left.
                if is_socket && UnixStream::connect(path).is_err_and(is_refused) {
                    fs::remove_file(path)?;
                }
                Ok(Self { listener: Listener::Unix(UnixListener::bind(path)?), file: Some(path.clone()) })
            }
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            let _ = fs::remove_file(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_was_left_is_no_hindrance_and_a_server_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let address = Address::Unix(path.clone());
        drop(UnixListener::bind(&path).unwrap());
        let bound = Bound::at(&address).unwrap();
        assert_eq!(Bound::at(&address).err().map(|error| error.kind()), Some(io::ErrorKind::AddrInUse));
        drop(bound);
        assert!(!path.exists());
        // Another file is left alone.
        fs::write(&path, "file").unwrap();
        assert!(Bound::at(&address).is_err() && fs::read_to_string(&path).unwrap() == "file");
    }
}
