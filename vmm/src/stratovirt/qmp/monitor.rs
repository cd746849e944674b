//! What commands work on, and those that start and stop the machine.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, MutexGuard};

use devices::virtio::balloon::BalloonHandle;
use serde_json::{Value, json};

use super::arguments::{Balloon, GetFd};
use super::backends::Backends;
use super::commands::Answer;
use super::connection::Connection;
use super::error::CommandError;
use super::event::{Event, EventQueue};
use super::front::Front;
use crate::machine::{Machine, RunState};

/// Descriptors that `getfd` has named and nothing has used: two queues of each network slot, many times over.
pub const MAX_NAMED_FILES: usize = 64;

/// The machine as the operators of one socket see it.
pub struct Monitor {
    pub(super) front: Front,
    balloon: Option<BalloonHandle>,
    events: Arc<EventQueue>,
    pub(super) files: BTreeMap<String, OwnedFd>,
    /// Why the machine is to end, in QEMU's words.
    ending: Option<&'static str>,
}

impl Monitor {
    /// A monitor of `front` that tells `events`.
    pub fn new(front: Front, events: Arc<EventQueue>) -> Self {
        Self { balloon: front.machine().balloon(), front, events, files: BTreeMap::new(), ending: None }
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        self.front.machine()
    }

    pub(super) fn backends(&self) -> MutexGuard<'_, Backends> {
        self.front.backends()
    }

    /// Why the client asked for the end, if it did.
    pub fn ending(&self) -> Option<&'static str> {
        self.ending
    }

    pub(super) fn tell(&self, event: Event) {
        self.events.push(event);
    }

    pub(super) fn stop(&mut self) -> Answer {
        match self.machine().state() {
            RunState::Running => self.machine().pause()?,
            RunState::Held => return Err(CommandError::refused("The machine is stopped already")),
            RunState::Ended => return Err(ended()),
        }
        self.tell(Event::Stop {});
        Ok(json!({}))
    }

    pub(super) fn cont(&mut self) -> Answer {
        match self.machine().state() {
            RunState::Held => self.machine().resume()?,
            RunState::Running => return Err(CommandError::refused("The machine is running already")),
            RunState::Ended => return Err(ended()),
        }
        self.tell(Event::Resume {});
        Ok(json!({}))
    }

    pub(super) fn quit(&mut self) -> Answer {
        self.ending = Some("host-qmp-quit");
        Ok(json!({}))
    }

    /// There is no firmware that could start the machine over: it ends, as it does when the guest resets itself.
    pub(super) fn system_reset(&mut self) -> Answer {
        self.tell(Event::Reset { guest: false });
        self.ending = Some("host-qmp-system-reset");
        Ok(json!({}))
    }

    /// There is no button that the guest could be told of: the machine ends, as StratoVirt's does.
    pub(super) fn system_powerdown(&mut self) -> Answer {
        self.tell(Event::Powerdown {});
        self.ending = Some("host-qmp-quit");
        Ok(json!({}))
    }

    /// Sets the size of the balloon to what the guest is not to keep.
    pub(super) fn balloon(&mut self, arguments: Balloon) -> Answer {
        let balloon = self.balloon.as_ref().ok_or(CommandError::NotActive("balloon"))?;
        // More than the guest has means all of it.
        balloon.set_target(balloon.memory().saturating_sub(arguments.value))?;
        Ok(json!({}))
    }

    pub(super) fn query_balloon(&self) -> Answer {
        let balloon = self.balloon.as_ref().ok_or(CommandError::NotActive("balloon"))?;
        Ok(json!({"actual": kept(balloon)}))
    }

    /// What is readable when the guest has changed the size of the balloon.
    pub fn balloon_changed(&self) -> Option<BorrowedFd<'_>> {
        let descriptor = self.balloon.as_ref()?.changed().as_raw_fd();
        // SAFETY: the handle owns the descriptor for at least as long as it is borrowed.
        Some(unsafe { BorrowedFd::borrow_raw(descriptor) })
    }

    /// Tells of the size of the balloon, if the guest has changed it.
    pub fn look_at_balloon(&self) {
        if let Some(balloon) = &self.balloon
            && balloon.changed().read().is_ok()
        {
            self.tell(Event::BalloonChanged { actual: kept(balloon) });
        }
    }

    pub(super) fn query_status(&self) -> Value {
        let (running, status) = match self.machine().state() {
            RunState::Running => (true, "running"),
            RunState::Held => (false, "paused"),
            RunState::Ended => (false, "shutdown"),
        };
        json!({"running": running, "singlestep": false, "status": status})
    }

    pub(super) fn getfd(&mut self, client: &mut Connection, arguments: GetFd) -> Answer {
        let GetFd { fdname } = arguments;
        let file =
            client.take_file().ok_or_else(|| CommandError::refused("No file descriptor came with the request"))?;
        if self.files.len() >= MAX_NAMED_FILES && !self.files.contains_key(&fdname) {
            return Err(CommandError::refused(format!("There are {MAX_NAMED_FILES} unused file descriptors already")));
        }
        self.files.insert(fdname, file);
        Ok(json!({}))
    }
}

/// Bytes of memory that the guest is left with.
fn kept(balloon: &BalloonHandle) -> u64 {
    balloon.memory().saturating_sub(balloon.actual())
}

fn ended() -> CommandError {
    CommandError::refused("The machine has ended")
}
