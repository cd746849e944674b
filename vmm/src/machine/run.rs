//! Letting the guest run.

use std::sync::PoisonError;

use super::{ExitReason, Machine};

/// Why a call does not fit the state that the machine is in.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It has ended.
    #[error("The machine has ended: {0}")]
    Ended(ExitReason),
}

/// Whether the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// Not yet, or not now.
    Held,
    /// It does.
    Running,
    /// Never again.
    Ended,
}

impl Machine {
    /// Whether the guest runs. It may have changed when the caller looks at it.
    pub fn state(&self) -> RunState {
        self.control.state()
    }

    /// Lets the processors run, for the first time or after a pause.
    pub fn start(&self) -> Result<(), StateError> {
        let _moment = self.live.moment();
        self.unpark();
        self.expect_alive(self.control.run())
    }

    /// Lets devices that came from a snapshot go on.
    fn unpark(&self) {
        let mut hardware = self.hardware.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(hardware) = hardware.as_mut() {
            if !hardware.writes.is_kept() {
                // Nobody knows from here on what differs.
                hardware.base = None;
            }
            hardware.transports.iter().for_each(|transport| transport.unpark());
        }
    }

    pub(super) fn expect_alive(&self, alive: bool) -> Result<(), StateError> {
        if alive { Ok(()) } else { Err(StateError::Ended(self.wait())) }
    }
}
