//! What a machine was given on its command line, for those who ask over QMP.

use super::drive::HostDrive;

/// Drives, streams and threads by name.
#[derive(Debug, Default)]
pub struct Inventory {
    /// Drives in slots, by the names of their devices.
    pub drives: Vec<(String, HostDrive)>,
    /// Streams.
    pub streams: Vec<StreamEntry>,
    /// The device of memory that can be plugged.
    pub memory: Option<String>,
    /// Threads that devices were to run on.
    pub iothreads: Vec<String>,
}

/// A stream of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamEntry {
    /// The name of its `-chardev`, or that of the port that it was made for.
    pub label: String,
    /// What it is, in QEMU's words.
    pub filename: String,
}
