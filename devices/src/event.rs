//! The event loop that devices run on, as they see it.

use event_manager::{MutEventSubscriber, SubscriberId};
use virtio_queue::Queue;

/// The active half of a device: what an event loop runs.
pub trait ActiveHalf: MutEventSubscriber + Send {
    /// Ends or takes back what is in flight, and hands the queues back at the places where the
    /// driver finds them, by index, as they came in the [`Activation`](crate::virtio::Activation).
    /// `None` stands for a queue that the driver did not enable, or that the device gave up.
    ///
    /// After it nothing touches guest memory on the device's behalf. Called off the loop, with the
    /// vCPUs stopped; may wait for the host's disks, never for the guest.
    fn park(self: Box<Self>) -> Vec<Option<Queue>>;
}

/// What an event loop runs, as it is handed over.
pub type Subscriber = Box<dyn ActiveHalf>;

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
