//! GetGuestDetails.

use std::fs;
use std::path::Path;

use agent_proto::agent::{AgentDetails, GuestDetailsRequest, GuestDetailsResponse};
use protobuf::MessageField;

use crate::sandbox::storage;

/// Size of a memory block that can be plugged, in hexadecimal.
const BLOCK_SIZE: &str = "/sys/devices/system/memory/block_size_bytes";
/// Takes the address of plugged memory on machines that do not announce it.
const PROBE: &str = "/sys/devices/system/memory/probe";

/// Describes the guest and this agent.
pub fn details(request: &GuestDetailsRequest) -> GuestDetailsResponse {
    let block_size = || u64::from_str_radix(fs::read_to_string(BLOCK_SIZE).ok()?.trim(), 16).ok();
    GuestDetailsResponse {
        mem_block_size_bytes: if request.mem_block_size { block_size().unwrap_or(0) } else { 0 },
        support_mem_hotplug_probe: request.mem_hotplug_probe && Path::new(PROBE).exists(),
        agent_details: MessageField::some(AgentDetails {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            init_daemon: std::process::id() == 1,
            device_handlers: vec!["blk".to_owned(), "mmioblk".to_owned()],
            storage_handlers: storage::DRIVERS.map(str::to_owned).into(),
            supports_seccomp: true,
            ..Default::default()
        }),
        ..Default::default()
    }
}
