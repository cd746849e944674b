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

impl Machine {
    /// Lets the processors run, for the first time or after a pause.
    pub fn start(&self) -> Result<(), StateError> {
        self.unpark();
        self.expect_alive(self.control.run())
    }

    /// Lets devices that came from a snapshot go on.
    fn unpark(&self) {
        let hardware = self.hardware.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(hardware) = hardware.as_ref() {
            hardware.transports.iter().for_each(|transport| transport.unpark());
        }
    }

    pub(super) fn expect_alive(&self, alive: bool) -> Result<(), StateError> {
        if alive { Ok(()) } else { Err(StateError::Ended(self.wait())) }
    }
}
