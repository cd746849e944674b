//! Every child of PID 1 ends here: processes of containers are told to whoever waits for them, orphans are forgotten.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// An exit code, or 128 + the number of the signal that ended the process.
pub type ExitCode = i32;

/// Yields the exit code once the process has ended.
pub type Exit = watch::Receiver<Option<ExitCode>>;

/// Exits remembered for processes that nobody knows yet. A helper makes a handful of processes; the bound only keeps
/// a storm of orphans from growing the map.
const MAX_EARLY: usize = 4096;

#[derive(Default)]
struct Book {
    watched: HashMap<i32, watch::Sender<Option<ExitCode>>>,
    /// Exits of unknown processes, kept only while a helper is at work: the process it makes may end before the helper
    /// has told its number. Kept longer, a number could be one that has been used again.
    early: HashMap<i32, ExitCode>,
    helpers: usize,
}

/// The book of children. Cheap to clone.
#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<Book>>);

/// As long as this lives, exits of processes not yet watched are remembered.
pub struct HelperAtWork(Reaper);

impl Reaper {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called before a helper is started.
    pub fn helper_at_work(&self) -> HelperAtWork {
        self.book().helpers += 1;
        HelperAtWork(self.clone())
    }

    /// Watches a child. The number must come from a child that a [`HelperAtWork`] covers or that was just started in
    /// this same poll, so that its exit cannot have been forgotten.
    pub fn watch(&self, pid: Pid) -> Exit {
        let mut book = self.book();
        let early = book.early.remove(&pid.as_raw());
        let (sender, receiver) = watch::channel(early);
        if early.is_none() {
            book.watched.insert(pid.as_raw(), sender);
        }
        receiver
    }

    fn record(&self, pid: Pid, code: ExitCode) {
        let mut book = self.book();
        match book.watched.remove(&pid.as_raw()) {
            Some(sender) => {
                sender.send_replace(Some(code));
            }
            None if book.helpers > 0 && book.early.len() < MAX_EARLY => {
                book.early.insert(pid.as_raw(), code);
            }
            None => {}
        }
    }

    fn reap_all(&self) {
        loop {
            let mut status = 0;
            // By libc, not nix: nix reaps a child that a real-time signal ended and then answers EINVAL, losing it.
            // SAFETY: waitpid writes one int to the pointer, which is a live local.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            match pid {
                0 => return,
                -1 if Errno::last() == Errno::EINTR => {}
                -1 => return,
                pid => self.record(Pid::from_raw(pid), exit_code(status)),
            }
        }
    }

    /// Reaps for as long as the agent runs.
    pub async fn run(self) -> std::io::Result<()> {
        let mut child_signals = signal(SignalKind::child())?;
        // A child may have ended before the handler was in place.
        self.reap_all();
        while child_signals.recv().await.is_some() {
            self.reap_all();
        }
        Ok(())
    }
}

impl Drop for HelperAtWork {
    fn drop(&mut self) {
        let mut book = self.0.book();
        book.helpers -= 1;
        if book.helpers == 0 {
            book.early.clear();
        }
    }
}

fn exit_code(status: i32) -> ExitCode {
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) }
}

/// Waits until the process has ended.
pub async fn ended(mut exit: Exit) -> ExitCode {
    loop {
        if let Some(code) = *exit.borrow_and_update() {
            return code;
        }
        // The sender goes only after the code is set, so the next look finds it; if the book itself is gone, so is the
        // agent.
        if exit.changed().await.is_err() {
            return exit.borrow().unwrap_or(255);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_exit_before_the_watch_is_not_lost_while_a_helper_is_at_work() {
        let reaper = Reaper::default();
        let at_work = reaper.helper_at_work();
        reaper.record(Pid::from_raw(10), 7);
        assert_eq!(ended(reaper.watch(Pid::from_raw(10))).await, 7);
        drop(at_work);
        assert!(reaper.book().early.is_empty());
    }

    #[tokio::test]
    async fn exits_of_strangers_are_forgotten() {
        let reaper = Reaper::default();
        reaper.record(Pid::from_raw(11), 1);
        let exit = reaper.watch(Pid::from_raw(11));
        assert_eq!(*exit.borrow(), None);
        reaper.record(Pid::from_raw(11), 2);
        assert_eq!(ended(exit).await, 2);
    }

    #[test]
    fn a_storm_of_orphans_does_not_grow_the_book() {
        let reaper = Reaper::default();
        let _at_work = reaper.helper_at_work();
        for pid in 0..10_000 {
            reaper.record(Pid::from_raw(pid), 0);
        }
        assert_eq!(reaper.book().early.len(), MAX_EARLY);
    }
}
