//! The thread that copies while the guest runs.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use seccomp::{Confinement, Role};

use super::{AtRest, Copier, CopyError, Protection};

type Order = Copier<Protection, AtRest>;

/// A thread that waits until it is told what to copy. Without that it ends when this is dropped.
pub(crate) struct CopierThread {
    orders: SyncSender<Order>,
    outcome: Receiver<Result<(), CopyError>>,
    thread: JoinHandle<()>,
}

impl CopierThread {
    /// Starts it: that takes longer than the guest is to stand still.
    pub fn start(confinement: Confinement) -> io::Result<Self> {
        let (orders, next) = sync_channel(1);
        let (told, outcome) = sync_channel(1);
        let body = move || work(&next, &told);
        let thread = seccomp::spawn(confinement, Role::Uffd, Role::Uffd.name().to_owned(), body)?;
        Ok(Self { orders, outcome, thread })
    }

    /// Begins, with memory that is protected.
    pub fn begin(self, copier: Order) -> Result<Copying, CopyError> {
        let Self { orders, outcome, thread } = self;
        // What cannot be sent is dropped, and with it the protection.
        orders.send(copier).map_err(|_| CopyError::Thread(None))?;
        Ok(Copying { outcome, thread })
    }
}

/// A thread that copies.
pub(crate) struct Copying {
    outcome: Receiver<Result<(), CopyError>>,
    thread: JoinHandle<()>,
}

impl Copying {
    /// Waits until all is copied, or cannot be. Nothing is protected then, and the thread has ended.
    pub fn wait(self) -> Result<(), CopyError> {
        // Without an outcome it has panicked, which its own message has told.
        let outcome = self.outcome.recv().unwrap_or(Err(CopyError::Thread(None)));
        let _ = self.thread.join();
        outcome
    }
}

fn work(orders: &Receiver<Order>, told: &SyncSender<Result<(), CopyError>>) {
    let Ok(mut copier) = orders.recv() else { return };
    let outcome = copier.run();
    copier.writes().end();
    // The memory and the descriptor are let go of before anybody hears of it.
    drop(copier);
    let _ = told.send(outcome);
}
