//! Threads for requests that wait for a disk.
//!
//! The device's loop takes the requests and answers by itself those that this host's memory answers: names, attributes,
//! opening and closing, short reads and writes. In the order in which they came, one after the other. Two classes go to
//! the pool, where they run side by side and end in any order:
//!
//! - *syncs* (FSYNC, FSYNCDIR, FALLOCATE), which last as long as the disk likes. They never have the last free thread.
//! - *transfers* (READ and WRITE of much data), which are worth a second processor.
//!
//! Both work on files that are open: no path is open to the pool's threads.
//!
//! A driver that wants one request done before another waits for the first one's answer, as FUSE has it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::engine::{Serve, SharedChain};
use seccomp::{Confinement, Role};

/// Which requests wait for which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Answered by the loop itself.
    Prompt,
    /// READ and WRITE of much data.
    Transfer,
    /// What makes data stable or reserves its place.
    Sync,
}

/// A request on its way to a thread. Their number is bounded by the queues: each takes a descriptor.
pub struct Job {
    /// Index of its queue.
    pub queue: usize,
    /// Its buffers.
    pub chain: SharedChain,
}

/// A request that was answered.
#[derive(Debug)]
pub struct Answered {
    /// Index of its queue.
    pub queue: usize,
    /// First descriptor of its chain.
    pub head: u16,
    /// Bytes of the answer.
    pub len: u32,
}

/// A bounded number of threads that live as long as the device.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    work: Mutex<Work>,
    /// There is a job, or the end.
    arrived: Condvar,
    /// A job was done.
    done: Condvar,
    /// Readable when there are answers.
    event: EventFd,
    /// Syncs that may run at a time.
    syncs: usize,
}

#[derive(Default)]
struct Work {
    transfers: VecDeque<Job>,
    syncs: VecDeque<Job>,
    running_transfers: usize,
    running_syncs: usize,
    answered: Vec<Answered>,
    ended: bool,
}

impl Pool {
    /// Starts `threads` threads that answer requests with `serve`.
    pub fn new(threads: u16, serve: &Serve, confinement: Confinement) -> io::Result<Self> {
        let threads = usize::from(threads);
        let shared = Arc::new(Shared {
            work: Mutex::default(),
            arrived: Condvar::new(),
            done: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            syncs: threads.saturating_sub(1).max(1),
        });
        let mut pool = Self { shared, threads: Vec::with_capacity(threads) };
        for index in 0..threads {
            let (shared, serve) = (Arc::clone(&pool.shared), Arc::clone(serve));
            let body = move || run(&shared, &serve);
            pool.threads.push(seccomp::spawn(confinement, Role::Fs, format!("fs-{index}"), body)?);
        }
        Ok(pool)
    }

    /// Whether requests of `class` are for the pool. A single thread is for syncs alone.
    pub fn takes(&self, class: Class) -> bool {
        match class {
            Class::Prompt => false,
            Class::Transfer => self.threads.len() > 1,
            Class::Sync => !self.threads.is_empty(),
        }
    }

    /// Readable when [`take_answered`](Self::take_answered) has something.
    pub fn event(&self) -> &EventFd {
        &self.shared.event
    }

    /// Hands over a request.
    pub fn submit(&self, class: Class, job: Job) {
        let mut work = self.shared.work();
        match class {
            Class::Sync => work.syncs.push_back(job),
            Class::Transfer | Class::Prompt => work.transfers.push_back(job),
        }
        drop(work);
        self.shared.arrived.notify_one();
    }

    /// What was answered since the last call.
    pub fn take_answered(&self) -> Vec<Answered> {
        // Nothing to read when the answers were taken meanwhile.
        let _ = self.shared.event.read();
        std::mem::take(&mut self.shared.work().answered)
    }

    /// Waits until nothing is in flight. Nothing may be submitted meanwhile.
    pub fn drain(&self) {
        let mut work = self.shared.work();
        while !work.is_idle() {
            work = self.shared.done.wait(work).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.work().ended = true;
        self.shared.arrived.notify_all();
        for thread in self.threads.drain(..) {
            // An error is a panic of the thread, which its own message has told.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Work {
    fn is_idle(&self) -> bool {
        let waiting = self.transfers.len().saturating_add(self.syncs.len());
        waiting.saturating_add(self.running_transfers).saturating_add(self.running_syncs) == 0
    }

    /// The next job that may run, and its class. A transfer first: it is short.
    fn next(&mut self, syncs: usize) -> Option<(Class, Job)> {
        if let Some(job) = self.transfers.pop_front() {
            self.running_transfers = self.running_transfers.saturating_add(1);
            return Some((Class::Transfer, job));
        }
        if self.running_syncs >= syncs {
            return None;
        }
        let job = self.syncs.pop_front()?;
        self.running_syncs = self.running_syncs.saturating_add(1);
        Some((Class::Sync, job))
    }

    fn finish(&mut self, class: Class, answered: Answered) {
        let running = if class == Class::Sync { &mut self.running_syncs } else { &mut self.running_transfers };
        *running = running.saturating_sub(1);
        self.answered.push(answered);
    }
}

fn run(shared: &Shared, serve: &Serve) {
    let mut work = shared.work();
    loop {
        let Some((class, job)) = work.next(shared.syncs) else {
            if work.ended {
                return;
            }
            work = shared.arrived.wait(work).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(work);
        let Job { queue, chain } = job;
        let head = chain.head_index();
        let len = serve(&chain);
        work = shared.work();
        work.finish(class, Answered { queue, head, len });
        // A full counter is readable already.
        let _ = shared.event.write(1);
        shared.done.notify_all();
    }
}
