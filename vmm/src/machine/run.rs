//! Letting the guest run.

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
        self.expect_alive(self.control.run())
    }

    pub(super) fn expect_alive(&self, alive: bool) -> Result<(), StateError> {
        if alive { Ok(()) } else { Err(StateError::Ended(self.wait())) }
    }
}
