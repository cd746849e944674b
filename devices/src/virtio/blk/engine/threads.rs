//! Operations are done by a few threads.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use libc::EFD_CLOEXEC;
use seccomp::{Confinement, Role};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Completion, Engine};
use crate::virtio::blk::image::Disk;
use crate::virtio::blk::operation::Operation;

/// Threads of a device: enough to keep a disk busy while one of them waits for a flush.
const THREADS: usize = 4;

pub(super) struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// There is work, or no more.
    work: Condvar,
    /// Something is done.
    done: Condvar,
    event: EventFd,
    disk: Arc<Disk>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(u16, Operation)>,
    /// How many operations threads are busy with.
    running: usize,
    done: Vec<Completion>,
    stop: bool,
}

impl Threads {
    /// Starts the threads. They work on open files, as an event loop does, and are confined like one.
    pub fn new(disk: &Arc<Disk>, confinement: Confinement) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            disk: Arc::clone(disk),
        });
        // What was started before one fails is ended by dropping.
        let mut pool = Self { shared, threads: Vec::with_capacity(THREADS) };
        for _ in 0..THREADS {
            let shared = Arc::clone(&pool.shared);
            pool.threads.push(seccomp::spawn(confinement, Role::Io, "blk".into(), move || shared.run())?);
        }
        Ok(pool)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of a thread.
    fn run(&self) {
        let mut state = self.lock();
        loop {
            if let Some((token, operation)) = state.waiting.pop_front() {
                state.running = state.running.saturating_add(1);
                drop(state);
                let result = self.disk.run(operation);
                state = self.lock();
                state.running = state.running.saturating_sub(1);
                state.done.push(Completion { token, result });
                self.done.notify_one();
                // A full counter is readable already.
                let _ = self.event.write(1);
            } else if state.stop {
                return;
            } else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Engine for Threads {
    fn start(&mut self, token: u16, operation: Operation) {
        self.shared.lock().waiting.push_back((token, operation));
        self.shared.work.notify_one();
    }

    fn submit(&mut self) {}

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        // Before looking: what is done after the look makes it readable again.
        let _ = self.shared.event.read();
        completions.append(&mut self.shared.lock().done);
    }

    fn drain(&mut self, completions: &mut Vec<Completion>) {
        let mut state = self.shared.lock();
        while state.running > 0 || !state.waiting.is_empty() {
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        completions.append(&mut state.done);
    }

    fn event(&self) -> Option<&EventFd> {
        Some(&self.shared.event)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // An error is a panic, which its own message has told.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::virtio::blk::config::ImageFormat;

    /// How many threads of this process have the pool's name and a filter.
    fn confined() -> usize {
        let threads = fs::read_dir("/proc/self/task").unwrap().flatten();
        let status = threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok());
        status.filter(|status| status.starts_with("Name:\tblk\n") && status.contains("Seccomp:\t2\n")).count()
    }

    #[test]
    fn all_threads_of_a_pool_are_confined_before_there_is_work() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let disk = Arc::new(Disk::open(file, ImageFormat::Raw, false, false).unwrap());
        let _pool = Threads::new(&disk, Confinement::On).unwrap();
        // Other tests of this process may have pools too.
        assert!(confined() >= THREADS);
    }
}
