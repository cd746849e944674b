//! Reading a word of guest memory from outside.

use std::sync::PoisonError;

use vm_memory::{Bytes, GuestAddress};

use super::Machine;

impl Machine {
    /// The four bytes at guest physical address `address`; `None` where there is no memory, or no machine any more. The guest may
    /// change them meanwhile.
    pub fn peek(&self, address: u64) -> Option<u32> {
        let hardware = self.hardware.lock().unwrap_or_else(PoisonError::into_inner);
        hardware.as_ref()?.memory.read_obj(GuestAddress(address)).ok()
    }
}
