//! Stopping the clock of the guest's processors, and letting it go on.

use super::{Machine, StateError};

impl Machine {
    /// Takes all processors out of the guest; they are when this returns. Devices finish what
    /// they were asked to do.
    pub fn pause(&self) -> Result<(), StateError> {
        let _moment = self.live.moment();
        self.expect_alive(self.control.pause())
    }

    /// Lets the processors run on.
    pub fn resume(&self) -> Result<(), StateError> {
        self.start()
    }
}
