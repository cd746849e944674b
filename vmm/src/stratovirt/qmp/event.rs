//! What the machine tells without being asked.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use vmm_sys_util::eventfd::EventFd;

use crate::machine::ExitReason;

/// Events that wait for the client; StratoVirt keeps as many.
pub const MAX_EVENTS: usize = 50;

/// Something that happened. Written as QMP names it, with its data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", content = "data", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Event {
    /// The machine has ended.
    Shutdown {
        /// Whether the guest wanted it.
        guest: bool,
        /// In QEMU's words.
        reason: &'static str,
    },
    /// The guest asked for a reset, which ends the machine.
    Reset {
        /// Whether the guest wanted it.
        guest: bool,
    },
    /// The machine was told to end.
    Powerdown {},
    /// The processors were stopped.
    Stop {},
    /// The processors run again.
    Resume {},
    /// The guest has given memory back, or taken it.
    BalloonChanged {
        /// Bytes that it is left with.
        actual: u64,
    },
    /// A device was taken out.
    DeviceDeleted {
        /// Its identifier.
        device: String,
        /// The same.
        path: String,
    },
}

impl Event {
    /// What to tell when the machine ended.
    pub fn of_exit(reason: &ExitReason) -> Vec<Self> {
        match reason {
            ExitReason::Shutdown => vec![Self::Shutdown { guest: true, reason: "guest-shutdown" }],
            ExitReason::Reset | ExitReason::TripleFault => {
                vec![Self::Reset { guest: true }, Self::Shutdown { guest: true, reason: "guest-reset" }]
            }
            ExitReason::Panicked(_) => vec![Self::Shutdown { guest: true, reason: "guest-panic" }],
            ExitReason::Stopped => vec![Self::Shutdown { guest: false, reason: "host-signal" }],
            ExitReason::VcpuError { .. } | ExitReason::MemoryLost(_) => {
                vec![Self::Shutdown { guest: false, reason: "host-error" }]
            }
        }
    }
}

/// An event with the time of its happening.
#[derive(Debug, Clone, Serialize)]
pub struct Stamped {
    #[serde(flatten)]
    event: Event,
    timestamp: Timestamp,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Timestamp {
    seconds: u64,
    microseconds: u32,
}

impl Timestamp {
    fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { seconds: since.as_secs(), microseconds: since.subsec_micros() }
    }
}

/// Carries events of any thread to the server's.
#[derive(Debug)]
pub struct EventQueue {
    events: Mutex<VecDeque<Stamped>>,
    /// Readable while there may be events.
    wake: EventFd,
}

impl EventQueue {
    /// An empty queue.
    pub fn new() -> io::Result<Self> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { events: Mutex::default(), wake })
    }

    /// Adds an event that happens now. Where the client has left too many, the oldest is lost.
    pub fn push(&self, event: Event) {
        let mut events = self.lock();
        if events.len() >= MAX_EVENTS {
            events.pop_front();
        }
        events.push_back(Stamped { event, timestamp: Timestamp::now() });
        self.wake();
    }

    /// Takes what there is.
    pub fn take(&self) -> VecDeque<Stamped> {
        // Not readable is what is wanted.
        let _ = self.wake.read();
        std::mem::take(&mut self.lock())
    }

    /// Makes the server look around.
    pub fn wake(&self) {
        // A full counter wakes as well.
        let _ = self.wake.write(1);
    }

    /// What to poll.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the queue owns the descriptor for at least as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.wake.as_raw_fd()) }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Stamped>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn events_look_as_qmp_has_them() {
        for (event, name, data) in [
            (Event::Stop {}, "STOP", json!({})),
            (Event::Resume {}, "RESUME", json!({})),
            (Event::Powerdown {}, "POWERDOWN", json!({})),
            (Event::Reset { guest: true }, "RESET", json!({"guest": true})),
            (
                Event::Shutdown { guest: false, reason: "host-qmp-quit" },
                "SHUTDOWN",
                json!({"guest": false, "reason": "host-qmp-quit"}),
            ),
            (
                Event::DeviceDeleted { device: "d".into(), path: "d".into() },
                "DEVICE_DELETED",
                json!({"device": "d", "path": "d"}),
            ),
        ] {
            let stamped = Stamped { event, timestamp: Timestamp { seconds: 5, microseconds: 6 } };
            let expected = json!({"event": name, "data": data, "timestamp": {"seconds": 5, "microseconds": 6}});
            assert_eq!(serde_json::to_value(stamped).expect("JSON"), expected);
        }
    }

    #[test]
    fn fifty_events_wait_and_then_the_oldest_is_lost() {
        let queue = EventQueue::new().expect("eventfd");
        queue.push(Event::Stop {});
        for _ in 1..MAX_EVENTS {
            queue.push(Event::Resume {});
        }
        assert_eq!(queue.lock().front().map(|first| first.event.clone()), Some(Event::Stop {}));
        queue.push(Event::Resume {});
        let events = queue.take();
        assert_eq!(events.len(), MAX_EVENTS);
        assert!(events.iter().all(|stamped| stamped.event == Event::Resume {}));
        assert!(queue.take().is_empty());
        assert!(queue.wake.read().is_err());
    }

    #[test]
    fn each_end_of_a_machine_has_its_events() {
        let shutdown = |guest, reason| Event::Shutdown { guest, reason };
        assert_eq!(Event::of_exit(&ExitReason::Shutdown), [shutdown(true, "guest-shutdown")]);
        assert_eq!(Event::of_exit(&ExitReason::Reset), [Event::Reset { guest: true }, shutdown(true, "guest-reset")]);
        assert_eq!(Event::of_exit(&ExitReason::Panicked(String::new())), [shutdown(true, "guest-panic")]);
        assert_eq!(Event::of_exit(&ExitReason::Stopped), [shutdown(false, "host-signal")]);
    }
}
