//! What a sandbox tells about itself, in numbers.
//!
//! | file | what |
//! | --- | --- |
//! | `families` | the metrics: names, meanings, and where in [`Figures`] they come from |
//! | `process` | what a sandbox's process takes of the host's memory |
//! | `server` | a shim's socket |
//! | `node` | all sandboxes of the node, asked at once |
//!
//! A shim answers `GET /metrics` with text for Prometheus, and `GET /figures` with the same as JSON, from which
//! `inlay metrics` makes one text for the node: a sandbox is named by whoever asks, not by its shim.

pub mod families;
pub mod node;
pub mod process;
pub mod server;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmm::LazyHandle;

use crate::sandbox::trace::StartTimes;
use process::ProcessMemory;

/// A shim's socket, in its sandbox's directory.
pub const SOCKET: &str = "metrics";
/// Where the text for Prometheus is.
const TEXT: &str = "/metrics";
/// Where the JSON is.
const JSON: &str = "/figures";

/// Everything that is told of a sandbox. A newer shim may say more, an older one less.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// Where it is in its life.
    pub state: Stage,
    /// Its containers, by where they are in theirs.
    pub containers: Containers,
    /// How it has started.
    pub start: StartTimes,
    /// Bytes of memory that its guest has.
    pub guest_memory: u64,
    /// What its process takes; `None` where the host does not tell.
    pub process: Option<ProcessMemory>,
    /// Bytes of a mapped template that were copied before the guest wrote to them.
    pub copied_ahead: u64,
    /// How the guest's memory came, where it comes page by page.
    pub lazy: Option<LazyFigures>,
}

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The machine runs.
    #[default]
    Running,
    /// It is being stopped.
    Stopping,
    /// It has ended.
    Stopped,
}

/// How many containers are where in their lives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Containers {
    /// Made, not started.
    pub created: u64,
    /// Started.
    pub running: u64,
    /// Frozen.
    pub paused: u64,
    /// Ended, not deleted.
    pub stopped: u64,
}

/// What was brought of a guest's memory: see [`vmm::LazyMetrics`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LazyFigures {
    /// Faults that were served.
    pub faults: u64,
    /// Nanoseconds that serving them took.
    pub fault_nanoseconds: u64,
    /// Bytes that were copied, asked for or not.
    pub copied_bytes: u64,
    /// Bytes that came before they were asked for.
    pub prefetched_bytes: u64,
    /// Pages of zeros that were given.
    pub zero_pages: u64,
    /// Bytes that the guest has given back.
    pub returned_bytes: u64,
    /// Faults for pages of the working set that were asked for first.
    pub working_set_late: u64,
    /// Faults for pages that the working set does not have.
    pub working_set_misses: u64,
    /// The part of the needed pages that the working set had.
    pub hit_ratio: f64,
}

impl LazyFigures {
    /// What the memory's counters say now.
    pub fn of(memory: &LazyHandle) -> Self {
        let counters = memory.metrics();
        Self {
            faults: counters.faults.get(),
            fault_nanoseconds: counters.fault_nanoseconds.get(),
            copied_bytes: counters.bytes_copied.get(),
            prefetched_bytes: counters.prefetched_bytes.get(),
            zero_pages: counters.zero_pages.get(),
            returned_bytes: counters.removed_bytes.get(),
            working_set_late: counters.working_set_late.get(),
            working_set_misses: counters.working_set_misses.get(),
            hit_ratio: counters.hit_ratio(memory.page_size()),
        }
    }
}

/// The way to the socket of the sandbox whose directory this is. Short enough for a Unix address (108 bytes) whatever the
/// sandbox is called.
fn socket_in(directory: &File) -> PathBuf {
    format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_version_says_is_understood_as_far_as_it_goes() {
        let figures: Figures = serde_json::from_str(r#"{"guest_memory":1,"later":{}}"#).unwrap();
        assert_eq!(figures, Figures { guest_memory: 1, ..Figures::default() });
        let json = serde_json::to_string(&figures).unwrap();
        assert_eq!(serde_json::from_str::<Figures>(&json).unwrap(), figures);
    }
}
