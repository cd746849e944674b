//! The console's input: a thread that carries it from a stream of the host to the guest, and for a socket the output too.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use vmm_sys_util::terminal::Terminal;

use super::launch::Input;
use crate::Machine;

/// Bytes that are read at once. The guest's port has 64: what does not fit waits here until the guest has read.
const BUFFER: usize = 64;

/// Carries input until the machine ends or the stream does.
///
/// A terminal is put in raw mode until the thread is joined.
pub struct Console {
    thread: Option<JoinHandle<()>>,
    raw: bool,
    _held: Option<File>,
}

impl Console {
    /// Starts the thread.
    pub fn start(machine: Arc<Machine>, input: Input) -> io::Result<Self> {
        let (mut raw, mut held) = (false, None);
        let mut carrier = match input {
            Input::Stdin(file) => {
                // Fails on what is no terminal, which needs no mode.
                raw = io::stdin().lock().set_raw_mode().is_ok();
                Carrier { machine, source: Some(file), clients: None, pending: Vec::new() }
            }
            Input::Terminal { master, terminal } => {
                held = Some(terminal);
                Carrier { machine, source: Some(master), clients: None, pending: Vec::new() }
            }
            Input::Clients { listener, output } => {
                Carrier { machine, source: None, clients: Some((listener, output)), pending: Vec::new() }
            }
        };
        let thread = thread::Builder::new().name("console".into()).spawn(move || {
            if let Err(error) = carrier.run() {
                tracing::warn!(%error, "The console takes no more input");
            }
        })?;
        Ok(Self { thread: Some(thread), raw, _held: held })
    }
}

impl Drop for Console {
    /// Waits for the thread, which leaves when the machine has ended.
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // An error is a panic of the thread, which its own message has told.
            let _ = thread.join();
        }
        if self.raw {
            // A terminal that is gone needs no mode.
            let _ = io::stdin().lock().set_canon_mode();
        }
    }
}

struct Carrier {
    machine: Arc<Machine>,
    /// The stream, or the client that is connected.
    source: Option<File>,
    /// Where clients come, and the guest's output for them.
    clients: Option<(OwnedFd, UnixStream)>,
    /// Input that the guest has no room for yet.
    pending: Vec<u8>,
}

impl Carrier {
    fn run(&mut self) -> io::Result<()> {
        while self.source.is_some() || self.clients.is_some() {
            let descriptor = |wanted: bool, fd: Option<RawFd>| libc::pollfd {
                // poll(2) leaves negative ones out.
                fd: if wanted { fd.unwrap_or(-1) } else { -1 },
                events: libc::POLLIN,
                revents: 0,
            };
            let full = !self.pending.is_empty();
            let source = self.source.as_ref().map(AsRawFd::as_raw_fd);
            let listener = self.clients.as_ref().map(|(listener, _)| listener.as_raw_fd());
            let output = self.clients.as_ref().map(|(_, output)| output.as_raw_fd());
            let mut polled = [
                descriptor(true, Some(self.machine.exit_fd().as_raw_fd())),
                descriptor(full, Some(self.machine.console_drained().as_raw_fd())),
                descriptor(!full, source),
                descriptor(source.is_none(), listener),
                descriptor(true, output),
            ];
            wait(&mut polled)?;
            let [ended, drained, input, client, output] = polled.map(|descriptor| descriptor.revents != 0);
            if output {
                self.carry_output()?;
            } else if ended {
                return Ok(());
            }
            if drained {
                // Read so that it is not readable any more.
                let _ = self.machine.console_drained().read();
                self.send();
            }
            if input {
                self.carry_input()?;
            }
            if client && let Some((listener, _)) = &self.clients {
                self.source = accept(listener);
            }
        }
        Ok(())
    }

    fn carry_input(&mut self) -> io::Result<()> {
        let mut buffer = [0; BUFFER];
        let Some(source) = &mut self.source else { return Ok(()) };
        match source.read(&mut buffer) {
            Ok(0) => self.source = None,
            Ok(length) => {
                self.pending.extend(buffer.iter().take(length));
                // What an earlier input left behind is not the end of this one.
                let _ = self.machine.console_drained().read();
                self.send();
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            // A client that is gone; a pseudo-terminal's other end that nobody has open (EIO).
            Err(_) => self.source = None,
        }
        Ok(())
    }

    fn send(&mut self) {
        let taken = self.machine.console_input(&self.pending);
        self.pending.drain(..taken.min(self.pending.len()));
    }

    /// What no client takes is lost, as on a line with nothing at its end.
    fn carry_output(&mut self) -> io::Result<()> {
        let Some((_, output)) = &mut self.clients else { return Ok(()) };
        let mut buffer = [0; 4096];
        let length = output.read(&mut buffer)?;
        let (Some(client), Some(bytes)) = (&mut self.source, buffer.get(..length)) else { return Ok(()) };
        // One try: a client that does not read must hold up neither the guest nor its end.
        match client.write(bytes) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => self.source = None,
            _ => {}
        }
        Ok(())
    }
}

/// The client that has come, unless it has left again; its stream does not block.
fn accept(listener: &OwnedFd) -> Option<File> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the address of the client is not asked for, so nothing is written.
    let fd = unsafe { libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags) };
    // SAFETY: a new descriptor that nobody else owns.
    (fd >= 0).then(|| unsafe { File::from_raw_fd(fd) })
}

fn wait(polled: &mut [libc::pollfd]) -> io::Result<()> {
    let count = libc::nfds_t::try_from(polled.len()).unwrap_or_default();
    // SAFETY: as many entries as are counted, which live through the call.
    if unsafe { libc::poll(polled.as_mut_ptr(), count, -1) } < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
    }
    Ok(())
}
