//! The thread of a lazy memory.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use super::fill::{Filler, Loss};
use super::handler::{Handler, Next};
use super::{LazyConfig, Shared};
use crate::memory::source::Source;
use crate::memory::uffd::{Faults, Message, Placed};

/// What the thread does.
pub struct Body {
    handler: Handler<Kernel>,
    shared: Arc<Shared>,
}

impl Body {
    /// For the memory of `shared`, of which nothing is there yet.
    pub fn new(shared: Arc<Shared>, mut source: Box<dyn Source>, config: LazyConfig, zero_pages: bool) -> Self {
        let LazyConfig { source: _, working_set, record, fill } = config;
        source.give_up_on(Arc::clone(&shared.ended));
        let filler = Filler::new(
            Kernel(Arc::clone(&shared)),
            Arc::clone(&shared.layout),
            source,
            zero_pages,
            Arc::clone(&shared.record),
        );
        let handler = Handler::new(filler, Arc::clone(&shared.record), working_set.as_ref(), record, fill);
        Self { handler, shared }
    }

    /// Until all memory is there, it is lost, or it is stopped.
    pub fn run(mut self) {
        let last_words = LastWords(&self.shared);
        let loss = loop {
            if !self.shared.is_serving() {
                break None;
            }
            match self.handler.turn() {
                Ok(Next::Turn) => {}
                Ok(Next::Wait(timeout)) => {
                    if let Err(error) = wait(&self.shared, timeout) {
                        break Some(Loss::Messages(error));
                    }
                }
                Ok(Next::Done) => {
                    self.shared.finish();
                    break None;
                }
                Err(loss) => break Some(loss),
            }
        };
        std::mem::forget(last_words);
        if let Some(loss) = loss {
            self.shared.lose(&loss);
        }
    }
}

/// Loses the memory when the thread panics.
struct LastWords<'a>(&'a Shared);

impl Drop for LastWords<'_> {
    fn drop(&mut self) {
        self.0.lose(&Loss::Thread);
    }
}

/// Waits for a message of the kernel, or for somebody's wish.
fn wait(shared: &Shared, timeout: Option<Duration>) -> io::Result<()> {
    let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut entries = [entry(shared.uffd.as_raw_fd()), entry(shared.wake.as_raw_fd())];
    let milliseconds =
        timeout.map_or(-1, |timeout| libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX));
    // SAFETY: two entries, which live through the call.
    if unsafe { libc::poll(entries.as_mut_ptr(), 2, milliseconds) } < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
    }
    let [_, wake] = entries;
    if wake.revents != 0 {
        // Somebody else may have read it: nobody has, and it would not matter.
        let _ = shared.wake.read();
    }
    Ok(())
}

/// The kernel, by the descriptor that is shared.
pub struct Kernel(Arc<Shared>);

impl Faults for Kernel {
    fn read(&self, messages: &mut Vec<Message>) -> io::Result<()> {
        self.0.uffd.read(messages)
    }

    fn copy(&self, to: u64, contents: &[u8]) -> Placed {
        self.0.uffd.copy(to, contents)
    }

    fn zero(&self, to: u64, length: u64) -> Placed {
        self.0.uffd.zero(to, length)
    }

    fn wake(&self, start: u64, length: u64) {
        self.0.uffd.wake(start, length);
    }
}
