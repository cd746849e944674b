//! The times of a start, T0 to T6, on one line.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::ids::Id;
use crate::metrics::LazyFigures;

/// In a second.
pub const NANOSECONDS: f64 = 1e9;

/// Nanoseconds of `CLOCK_MONOTONIC` at which a start reached its stations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StartTimes {
    /// Whether the guest was restored from a template: then its init ran long ago, and there is no T3.
    pub restored: bool,
    /// The shim's create request arrived.
    pub t0: u64,
    /// It had its turn in the queue of starts, where there is one.
    pub turn: Option<u64>,
    /// The KVM machine existed.
    pub t1: Option<u64>,
    /// The first vCPU ran.
    pub t2: Option<u64>,
    /// The guest's init ran.
    pub t3: Option<u64>,
    /// The agent answered.
    pub t4: Option<u64>,
    /// The container's process was started.
    pub t5: Option<u64>,
    /// The first byte of output was there for containerd.
    pub t6: Option<u64>,
}

/// One line of the trace file.
#[derive(Serialize)]
struct Line<'a> {
    sandbox: &'a Id,
    #[serde(flatten)]
    times: &'a StartTimes,
    /// What had come of the guest's memory when the line was written, where it comes page by page.
    memory: Option<LazyFigures>,
}

/// The time now.
pub fn now() -> u64 {
    let nanoseconds =
        clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from).map(|time| time.as_nanos());
    nanoseconds.ok().and_then(|time| u64::try_from(time).ok()).unwrap_or_default()
}

impl StartTimes {
    fn is_complete(&self) -> bool {
        (self.restored || self.t3.is_some())
            && [self.t1, self.t2, self.t4, self.t5, self.t6].iter().all(Option::is_some)
    }

    /// Writes the times to the log, and to `file`, if there is one and no time is missing: its readers compute with
    /// the lines. `memory` is what had come of the guest's by then.
    pub fn report(&self, sandbox: &Id, memory: Option<LazyFigures>, file: Option<&Path>) {
        let Ok(json) = serde_json::to_string(&Line { sandbox, times: self, memory }) else { return };
        tracing::info!(times = %json, "Start");
        if let Some(file) = file.filter(|_| self.is_complete()) {
            // One write of a short line with O_APPEND: lines of sandboxes that start together do not mix.
            let written = OpenOptions::new()
                .create(true)
                .append(true)
                .mode(0o644)
                .open(file)
                .and_then(|mut file| file.write_all(format!("{json}\n").as_bytes()));
            if let Err(error) = written {
                tracing::warn!(file = %file.display(), %error, "Cannot write the times of the start");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("trace");
        let silent = StartTimes {
            restored: false,
            t0: 1000,
            turn: None,
            t1: Some(1500),
            t2: Some(2),
            t3: Some(3),
            t4: Some(4),
            t5: Some(5),
            t6: None,
        };
        let complete = StartTimes { t6: Some(9), ..silent };
        let without_init = StartTimes { t3: None, ..complete };
        let restored = StartTimes { restored: true, ..without_init };
        let starts = [("x", complete), ("silent", silent), ("no-init", without_init), ("y", complete), ("z", restored)];
        for (id, times) in starts {
            let memory = times.restored.then(|| LazyFigures { faults: 7, ..LazyFigures::default() });
            times.report(&Id::try_from(id).unwrap(), memory, Some(&file));
        }
        let text = std::fs::read_to_string(&file).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let times = r#""t0":1000,"turn":null,"t1":1500,"t2":2,"t3":3,"t4":4,"t5":5,"t6":9,"memory":"#;
        assert_eq!(lines[0], format!(r#"{{"sandbox":"x","restored":false,{times}null}}"#));
        assert!(lines.len() == 3 && lines[1].contains("\"y\""), "{text}");
        let without_init = times.replace("\"t3\":3", "\"t3\":null");
        let memory = format!(r#"{{"sandbox":"z","restored":true,{without_init}{{"faults":7,"#);
        assert!(lines[2].starts_with(&memory), "{text}");
        assert!(now() > 0 && now() <= now());
    }
}
