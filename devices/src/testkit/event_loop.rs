//! An event loop in a thread of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use event_manager::{EventManager, RemoteEndpoint, SubscriberId};

use super::eventually;
use crate::{EventLoop, Subscriber};

/// How long the thread must sleep to count as at rest.
const REST: Duration = Duration::from_millis(30);

/// A thread that runs subscribers until it is dropped.
pub struct ThreadLoop {
    endpoint: RemoteEndpoint<Subscriber>,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    refuse: AtomicBool,
    thread: Option<JoinHandle<()>>,
}

impl ThreadLoop {
    /// Starts the thread.
    pub fn start() -> Self {
        let (sender, receiver) = std::sync::mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicU64::new(0));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&rounds));
        let thread = std::thread::spawn(move || {
            let mut manager = EventManager::<Subscriber>::new().expect("An event manager");
            sender.send(manager.remote_endpoint()).expect("A starter that waits");
            while !stopped.load(Ordering::Acquire) {
                manager.run().expect("A round of the event loop");
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        let endpoint = receiver.recv().expect("An endpoint from the thread");
        Self { endpoint, stop, rounds, refuse: AtomicBool::new(false), thread: Some(thread) }
    }

    /// How often the thread woke up. A wake-up is counted when it ends, which may be after what it did was seen.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Waits until nothing wakes the thread any more.
    #[track_caller]
    pub fn wait_rest(&self) {
        eventually("Rest", || {
            let before = self.rounds();
            std::thread::sleep(REST);
            self.rounds() == before
        });
    }

    /// Makes the next subscriber be refused, as by a loop that has ended. It is dropped.
    pub fn refuse_next(&self) {
        self.refuse.store(true, Ordering::Relaxed);
    }

    /// Returns when everything that was readable at the time of the call was looked at once.
    pub fn settle(&self) {
        self.endpoint.call_blocking(|_| Ok::<_, event_manager::Error>(())).expect("A running event loop");
    }
}

impl Default for ThreadLoop {
    fn default() -> Self {
        Self::start()
    }
}

impl EventLoop for ThreadLoop {
    fn add(&self, subscriber: Subscriber) -> event_manager::Result<SubscriberId> {
        if self.refuse.swap(false, Ordering::Relaxed) {
            return Err(event_manager::Error::InvalidId);
        }
        self.endpoint.call_blocking(|loop_| Ok(loop_.add_subscriber(subscriber)))
    }

    fn remove(&self, id: SubscriberId) -> event_manager::Result<Subscriber> {
        self.endpoint.call_blocking(move |loop_| loop_.remove_subscriber(id))
    }
}

impl Drop for ThreadLoop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.endpoint.kick();
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            // A second panic while a failed test unwinds would hide the first.
            if !std::thread::panicking() {
                result.expect("No panic in the event loop");
            }
        }
    }
}
