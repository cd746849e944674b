//! The event loop that devices run on, as they see it.

use event_manager::{MutEventSubscriber, SubscriberId};

/// What an event loop runs: the active half of a device.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// A handle on an event loop that runs in a thread of its own.
///
/// Both calls wait until the loop's thread has done the work, so they must not be made from
/// that thread.
pub trait EventLoop: Send + Sync {
    /// Moves `subscriber` into the loop, which calls its `init` before this returns.
    fn add(&self, subscriber: Subscriber) -> event_manager::Result<SubscriberId>;

    /// Takes a subscriber out of the loop. When this returns it is not being called any more.
    fn remove(&self, id: SubscriberId) -> event_manager::Result<Subscriber>;
}
