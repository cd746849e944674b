//! Work for the process's first thread.
//!
//! The thread keeps the capabilities that files of other users take, because the threads of the shared file system get
//! theirs from whoever starts them, and because the roots of the hierarchies of control groups are nobody's to write to
//! (mode 0555). It is not in the role of the service's threads, because it builds machines. It runs nothing else, so what
//! the outside says never reaches it.

use std::sync::mpsc::{Receiver, Sender, channel};

use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

/// Hands work to the first thread.
#[derive(Clone)]
pub struct MainThread(Sender<Option<Job>>);

/// What the first thread does.
pub struct Work(Receiver<Option<Job>>);

/// The first thread has ended, or has panicked in the middle of the work.
#[derive(Debug, thiserror::Error)]
#[error("The process's first thread has ended")]
pub struct Ended;

/// A handle for other threads, and the work that comes through it.
pub fn new() -> (MainThread, Work) {
    let (sender, receiver) = channel();
    (MainThread(sender), Work(receiver))
}

impl MainThread {
    /// Has `work` done, after what was asked for before, and waits for its result. It is done also when nobody waits any
    /// more, and its result is dropped there.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Ended> {
        let (answer, result) = oneshot::channel();
        let job: Job = Box::new(move || drop(answer.send(work())));
        self.0.send(Some(job)).map_err(|_| Ended)?;
        result.await.map_err(|_| Ended)
    }

    /// Has `work` done, after what was asked for before, and does not wait for it.
    pub fn begin(&self, work: impl FnOnce() + Send + 'static) {
        // Nobody can be told when there is nobody.
        let _ = self.0.send(Some(Box::new(work)));
    }

    /// Has `value` dropped there, after what was asked for before; here, if the thread has ended.
    pub fn give_back(&self, value: impl Send + 'static) {
        self.begin(move || drop(value));
    }

    /// There is no work any more.
    pub fn end(&self) {
        // Fails when it has ended already.
        let _ = self.0.send(None);
    }
}

impl Work {
    /// Does what is asked for until the end.
    pub fn run(self) {
        while let Ok(Some(job)) = self.0.recv() {
            job();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn work_is_done_by_the_thread_that_runs_it_until_it_is_told_to_end() {
        let (main, work) = new();
        let here = thread::current().id();
        let client = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let there = runtime.block_on(main.run(|| thread::current().id())).unwrap();
            let kept = main.clone();
            main.end();
            (there, kept)
        });
        work.run();
        let (there, kept) = client.join().unwrap();
        assert_eq!(there, here);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert!(runtime.block_on(kept.run(|| ())).is_err());
    }
}
