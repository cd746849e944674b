//! The thread that waits for a backend, so that nobody else does.
//!
//! The protocol is questions and answers over a socket that is read until an answer is complete. Whoever wants to wait
//! no longer shuts the socket down, which ends every call that is or will be made over it.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use seccomp::{Confinement, Role};
use vmm_sys_util::eventfd::EventFd;

type Task = Box<dyn FnOnce() + Send>;

/// A thread that makes calls, one after the other. It lives as long as its device.
pub struct Caller {
    tasks: Option<Sender<Task>>,
    thread: Option<JoinHandle<()>>,
}

/// A call that is under way.
pub struct Pending<T> {
    result: Receiver<T>,
    socket: UnixStream,
}

impl Caller {
    /// Starts the thread. It has its sockets and nothing else, and is confined as the event loop is that connects them.
    pub fn new(confinement: Confinement) -> io::Result<Self> {
        let (tasks, receiver) = channel::<Task>();
        let thread = seccomp::spawn(confinement, Role::Io, "vhost-user".to_owned(), move || {
            for task in receiver {
                task();
            }
        })?;
        Ok(Self { tasks: Some(tasks), thread: Some(thread) })
    }

    /// Begins a call that waits for nothing but `socket`. `done` becomes readable when it has ended.
    pub fn begin<T: Send + 'static>(
        &self,
        socket: UnixStream,
        done: Option<EventFd>,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Pending<T> {
        let (sender, result) = channel();
        let task = Box::new(move || {
            // Nobody receives it when the device was dropped meanwhile.
            let _ = sender.send(call());
            if let Some(done) = done {
                let _ = done.write(1);
            }
        });
        if let Some(tasks) = &self.tasks {
            // The thread ends after the sender.
            let _ = tasks.send(task);
        }
        Pending { result, socket }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.tasks = None;
        if let Some(thread) = self.thread.take() {
            // An error is a panic of the thread, which its own message has told.
            let _ = thread.join();
        }
    }
}

impl<T> Pending<T> {
    /// The result, if the call has ended.
    pub fn poll(&self) -> Option<T> {
        self.result.try_recv().ok()
    }

    /// Makes the call end soon.
    pub fn give_up(&self) {
        // Fails when the backend has closed it already: the same outcome.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Waits for the result; after `patience` it is given up. `None` when the thread is gone.
    pub fn wait(self, patience: Duration) -> Option<T> {
        match self.result.recv_timeout(patience) {
            Ok(result) => return Some(result),
            Err(RecvTimeoutError::Timeout) => self.give_up(),
            Err(RecvTimeoutError::Disconnected) => return None,
        }
        self.result.recv().ok()
    }
}
