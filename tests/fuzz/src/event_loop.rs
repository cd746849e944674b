//! An event loop without a thread: it runs when it is told to, so that an input does the same each time.

use std::sync::{Mutex, MutexGuard};

use devices::{EventLoop, Subscriber};
use event_manager::{EventManager, SubscriberId, SubscriberOps};

/// Rounds within which a device must come to rest. What can be asked of it at once is a full ring, which takes a few.
const MAX_ROUNDS: u32 = 10_000;

/// Subscribers that run on the thread of their driver.
pub struct SteppedLoop(Mutex<EventManager<Subscriber>>);

impl SteppedLoop {
    /// A loop with nobody in it.
    pub fn new() -> Self {
        Self(Mutex::new(EventManager::new().expect("An event manager")))
    }

    /// Runs until nothing is left to do. A device for which there always is has been made to spin, which is a finding.
    pub fn settle(&self) {
        for _ in 0..MAX_ROUNDS {
            if self.lock().run_with_timeout(0).expect("A round of the event loop") == 0 {
                return;
            }
        }
        panic!("The device does not come to rest within {MAX_ROUNDS} rounds of its event loop");
    }

    fn lock(&self) -> MutexGuard<'_, EventManager<Subscriber>> {
        self.0.lock().expect("No panic on the event loop")
    }
}

impl Default for SteppedLoop {
    fn default() -> Self {
        Self::new()
    }
}

impl EventLoop for SteppedLoop {
    fn add(&self, subscriber: Subscriber) -> event_manager::Result<SubscriberId> {
        Ok(self.lock().add_subscriber(subscriber))
    }

    fn remove(&self, id: SubscriberId) -> event_manager::Result<Subscriber> {
        self.lock().remove_subscriber(id)
    }
}
