//! The guest's memory: its words, and how much of it can be plugged.

use devices::virtio::mem::MemHandle;
use serde_json::json;

use super::arguments::{GetViomem, QueryMemGpa, SetViomem};
use super::commands::Answer;
use super::error::CommandError;
use super::monitor::Monitor;
use crate::hotplug::HotplugError;

impl Monitor {
    /// Says how much of the memory the guest is to have. It follows when it can.
    pub(super) fn set_viomem(&self, arguments: SetViomem) -> Answer {
        self.pluggable(arguments.id.as_deref())?.set_requested(arguments.requested_size)?;
        Ok(json!({}))
    }

    /// In the words of QEMU's `query-memory-devices`.
    pub(super) fn get_viomem(&self, arguments: GetViomem) -> Answer {
        let memory = self.pluggable(arguments.id.as_deref())?;
        Ok(json!({
            "id": self.front.memory(),
            "memaddr": memory.address(),
            "requested-size": memory.requested(),
            "size": memory.plugged(),
            "max-size": memory.size(),
            "block-size": memory.block_size(),
            "node": memory.node(),
        }))
    }

    /// The memory, if it is the one that is meant.
    fn pluggable(&self, id: Option<&str>) -> Result<MemHandle, CommandError> {
        if let Some(other) = id.filter(|id| self.front.memory() != Some(id)) {
            return Err(HotplugError::NotFound(other.to_owned()).into());
        }
        self.machine().pluggable_memory().ok_or(CommandError::NotActive("virtio-mem"))
    }

    /// The four bytes at an address, as hexadecimal digits.
    pub(super) fn query_mem_gpa(&self, arguments: QueryMemGpa) -> Answer {
        let digits = Some(&arguments.gpa).filter(|gpa| gpa.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let address = digits.and_then(|gpa| u64::from_str_radix(gpa, 16).ok());
        let address =
            address.ok_or_else(|| CommandError::refused(format!("{:?} is not a hexadecimal number", arguments.gpa)))?;
        let word = self.machine().peek(address);
        let word = word.ok_or_else(|| CommandError::refused(format!("The guest has no memory at {address:#x}")))?;
        Ok(json!(format!("{word:X}")))
    }
}
