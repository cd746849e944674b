//! The trace lines that the shim writes: the seven moments of each start.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

/// The moments of one start, in nanoseconds of the monotonic clock.
#[derive(Clone, Debug, Deserialize)]
pub struct Start {
    /// Whether the guest was restored from a template.
    #[serde(default)]
    pub restored: bool,
    t0: u64,
    /// Where starts take turns.
    #[serde(default)]
    turn: Option<u64>,
    t1: u64,
    t2: u64,
    /// A guest that was restored has none: its init ran long ago.
    t3: Option<u64>,
    t4: u64,
    t5: u64,
    t6: u64,
    /// What had come of the guest's memory, where it comes page by page.
    #[serde(default)]
    pub memory: Option<Memory>,
}

/// What comes page by page of a guest's memory.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Memory {
    /// Page faults that were served.
    pub faults: u64,
    /// What came before it was asked for.
    pub prefetched_bytes: u64,
}

/// What happens between one moment and the next.
pub const STAGES: [&str; 6] = [
    "T0→T1 request to KVM VM",
    "T1→T2 to the first guest instruction",
    "T2→T3 to the guest's init",
    "T3→T4 to the agent's answer",
    "T4→T5 to the started process",
    "T5→T6 to its first output",
];

/// The time now, by the clock of the trace lines.
pub fn now() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Duration::from);
    time.map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

impl Start {
    /// Every start that the file has a line of.
    pub fn read(path: &Path) -> Result<Vec<Self>> {
        let text = fs::read_to_string(path).with_context(|| format!("Cannot read {}", path.display()))?;
        let parse = |line| serde_json::from_str(line).with_context(|| format!("Not a trace line: {line}"));
        text.lines().map(parse).collect()
    }

    /// Length of each of the [`STAGES`]. Where there is no T3, it is taken to be T2.
    pub fn stages(&self) -> [Duration; 6] {
        let moments = [self.t0, self.t1, self.t2, self.t3.unwrap_or(self.t2), self.t4, self.t5, self.t6];
        std::array::from_fn(|n| between(moments[n], moments[n + 1]))
    }

    /// From its turn, or T0 where there are no turns, to T4: until the agent answers, without having waited for others.
    pub fn turn_to_agent(&self) -> Duration {
        between(self.turn.unwrap_or(self.t0), self.t4)
    }

    /// T1 to T4, in nanoseconds of the monotonic clock: the machine is there, and its agent has not answered yet.
    pub fn coming_up(&self) -> Range<u64> {
        self.t1..self.t4
    }

    /// T0 to T4: until the agent answers.
    pub fn to_agent(&self) -> Duration {
        between(self.t0, self.t4)
    }

    /// T0 to T6: until the first byte of output.
    pub fn to_output(&self) -> Duration {
        between(self.t0, self.t6)
    }
}

/// The moments come from several threads: a later one may be recorded a moment too early.
fn between(from: u64, to: u64) -> Duration {
    Duration::from_nanos(to.saturating_sub(from))
}
