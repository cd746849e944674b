//! An event loop in a thread of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use event_manager::{EventManager, RemoteEndpoint, SubscriberId};

use crate::{EventLoop, Subscriber};

/// A thread that runs subscribers until it is dropped.
pub struct ThreadLoop {
    endpoint: RemoteEndpoint<Subscriber>,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
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
        Self { endpoint, stop, rounds, thread: Some(thread) }
    }

    /// How often the thread woke up: it should not grow while nothing happens.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
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
