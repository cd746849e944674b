//! Threads that devices run on: an event-manager loop in a thread of its own.

use std::io;
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use event_manager::{EventManager, RemoteEndpoint, SubscriberId};

use devices::{EventLoop, Subscriber};
use seccomp::{Confinement, Entering, Post, Role};

/// Why there is no event loop.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// No epoll or event descriptor could be made.
    #[error("Cannot make an event loop")]
    Manager(#[source] event_manager::Error),
    /// No thread could be made.
    #[error("Cannot start an event loop's thread")]
    Thread(#[source] io::Error),
}

/// An event loop and its thread.
pub struct LoopThread {
    endpoint: RemoteEndpoint<Subscriber>,
    role: Role,
    stopping: Arc<AtomicBool>,
    /// 0 until the thread has told.
    id: Arc<AtomicI32>,
    thread: Mutex<Thread>,
}

/// As far as its thread has come.
enum Thread {
    Entering(Entering),
    Confined(JoinHandle<()>),
    Gone,
}

impl LoopThread {
    /// Starts a loop that has nothing to do yet, and does not wait for it: see [`confirm`](Self::confirm). Its thread has the
    /// role's name.
    pub fn start(post: impl Into<Post>, confinement: Confinement) -> Result<Self, EventError> {
        let post = post.into();
        let role = post.role();
        let manager = EventManager::new().map_err(EventError::Manager)?;
        let endpoint = manager.remote_endpoint();
        let (stopping, id) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI32::new(0)));
        let thread = seccomp::start(confinement, post, role.name().to_owned(), {
            let (stopping, id) = (Arc::clone(&stopping), Arc::clone(&id));
            move || {
                // SAFETY: always succeeds, and touches no memory.
                id.store(unsafe { libc::gettid() }, Ordering::Release);
                run(manager, &stopping);
            }
        })
        .map_err(EventError::Thread)?;
        Ok(Self { endpoint, role, stopping, id, thread: Mutex::new(Thread::Entering(thread)) })
    }

    /// Waits until its thread is confined; to be called before there is a guest. When it cannot be, there is no loop.
    pub fn confirm(&self) -> Result<(), EventError> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        *thread = match mem::replace(&mut *thread, Thread::Gone) {
            Thread::Entering(entering) => Thread::Confined(entering.confined().map_err(EventError::Thread)?),
            arrived => arrived,
        };
        Ok(())
    }

    /// What its thread is for.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Its thread's identifier, which it has told when the first device was added.
    pub fn thread_id(&self) -> i32 {
        self.id.load(Ordering::Acquire)
    }

    /// Ends the thread and drops what ran on it. Must not be called from that thread.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        // Fails only when the loop is gone already.
        let _ = self.endpoint.kick();
        // One that could not be confined has ended by itself.
        let _ = self.confirm();
        let thread = mem::replace(&mut *self.thread.lock().unwrap_or_else(PoisonError::into_inner), Thread::Gone);
        if let Thread::Confined(thread) = thread {
            // An error is a panic of the loop, which its own message has told.
            let _ = thread.join();
        }
    }
}

impl Drop for LoopThread {
    fn drop(&mut self) {
        self.stop();
    }
}

impl EventLoop for LoopThread {
    fn add(&self, subscriber: Subscriber) -> event_manager::Result<SubscriberId> {
        self.endpoint.call_blocking(move |ops| Ok(ops.add_subscriber(subscriber)))
    }

    fn remove(&self, id: SubscriberId) -> event_manager::Result<Subscriber> {
        self.endpoint.call_blocking(move |ops| ops.remove_subscriber(id))
    }
}

fn run(mut manager: EventManager<Subscriber>, stopping: &AtomicBool) {
    while !stopping.load(Ordering::Acquire) {
        if let Err(error) = manager.run() {
            // epoll_wait on a valid descriptor: nothing that trying again would change.
            tracing::error!(%error, "An event loop ends");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;
    use virtio_queue::Queue;
    use vmm_sys_util::eventfd::EventFd;

    use devices::ActiveHalf;

    struct Echo {
        event: EventFd,
        seen: Sender<&'static str>,
    }

    impl MutEventSubscriber for Echo {
        fn process(&mut self, _: Events, _: &mut EventOps) {
            self.event.read().expect("readable");
            self.seen.send("event").expect("receiver");
        }

        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.event, EventSet::IN)).expect("add");
            self.seen.send("init").expect("receiver");
        }
    }

    impl ActiveHalf for Echo {
        fn park(self: Box<Self>) -> Vec<Option<Queue>> {
            Vec::new()
        }
    }

    impl Drop for Echo {
        /// Takes its time, as a device does that waits for its disk.
        fn drop(&mut self) {
            std::thread::sleep(Duration::from_millis(20));
            let _ = self.seen.send("dropped");
        }
    }

    #[test]
    fn a_subscriber_is_initialised_called_and_dropped() {
        let (seen, receiver) = channel();
        let event = EventFd::new(0).expect("eventfd");
        let echo = Echo { event: event.try_clone().expect("clone"), seen };
        let looper = LoopThread::start(Role::Io, Confinement::On).expect("start");
        looper.confirm().expect("confined");
        looper.confirm().expect("still confined");
        let id = looper.add(Box::new(echo)).expect("add");
        assert_eq!(receiver.try_recv(), Ok("init"));
        event.write(1).expect("write");
        assert_eq!(receiver.recv(), Ok("event"));
        drop(looper.remove(id).expect("remove"));
        assert_eq!(receiver.recv(), Ok("dropped"));
        assert!(looper.remove(id).is_err());
    }

    #[test]
    fn stopping_waits_until_the_subscribers_are_dropped_and_later_calls_fail() {
        let (seen, receiver) = channel();
        let echo = Echo { event: EventFd::new(0).expect("eventfd"), seen: seen.clone() };
        let looper = LoopThread::start(Role::Fs, Confinement::On).expect("start");
        looper.confirm().expect("confined");
        looper.add(Box::new(echo)).expect("add");
        looper.stop();
        looper.stop();
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), ["init", "dropped"]);
        let echo = Echo { event: EventFd::new(0).expect("eventfd"), seen };
        assert!(looper.add(Box::new(echo)).is_err());
    }
}
