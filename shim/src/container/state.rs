//! The life of a process, and what may be done when.
//!
//! ```text
//!             start            pause
//!   created ─────────▶ running ───────▶ paused
//!      │                 │   ◀───────      │
//!      │                 │     resume      │
//!      └──── exit ───────┴───── exit ──────┘
//!                        ▼
//!                     stopped
//! ```
//!
//! The names are those of the OCI runtime specification and of containerd's `Status`.

use std::time::SystemTime;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 and the signal's number.
    pub status: u32,
    /// When the shim learned of it.
    pub at: SystemTime,
}

impl Exit {
    /// An exit that is known now.
    pub fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now() }
    }
}

/// Exit status of a process that went with its machine, as if it was killed: 128 and SIGKILL.
pub const KILLED: u32 = 137;

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Made, not started.
    Created,
    /// Started.
    Running,
    /// Frozen, with its whole container.
    Paused,
    /// Ended.
    Stopped(Exit),
}

/// A step that the state does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The process is {state} and cannot be {step}")]
pub struct IllegalStep {
    state: &'static str,
    step: &'static str,
}

impl State {
    /// Created to running.
    pub fn start(self) -> Result<Self, IllegalStep> {
        self.step("started", |state| (state == Self::Created).then_some(Self::Running))
    }

    /// Running to paused.
    pub fn pause(self) -> Result<Self, IllegalStep> {
        self.step("paused", |state| (state == Self::Running).then_some(Self::Paused))
    }

    /// Paused to running.
    pub fn resume(self) -> Result<Self, IllegalStep> {
        self.step("resumed", |state| (state == Self::Paused).then_some(Self::Running))
    }

    /// Anything to stopped. A process that ended already keeps its first exit.
    pub fn exit(self, exit: Exit) -> Self {
        match self {
            Self::Stopped(_) => self,
            _ => Self::Stopped(exit),
        }
    }

    /// A process may be deleted before its start or after its end.
    pub fn delete(self) -> Result<(), IllegalStep> {
        self.step("deleted", |state| matches!(state, Self::Created | Self::Stopped(_)).then_some(state)).map(drop)
    }

    /// A process may be added beside one that runs.
    pub fn exec(self) -> Result<(), IllegalStep> {
        self.step("joined by another process", |state| (state == Self::Running).then_some(state)).map(drop)
    }

    /// How the process ended, if it has.
    pub fn exited(self) -> Option<Exit> {
        match self {
            Self::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    fn step(self, step: &'static str, next: impl FnOnce(Self) -> Option<Self>) -> Result<Self, IllegalStep> {
        next(self).ok_or(IllegalStep { state: self.name(), step })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_goes_one_way() {
        let running = State::Created.start().unwrap();
        assert_eq!(running, State::Running);
        assert_eq!(running.pause().unwrap().resume().unwrap(), State::Running);
        let (first, second) = (Exit::now(3), Exit::now(4));
        assert_eq!(running.exit(first).exit(second).exited(), Some(first));
        assert_eq!(State::Created.exit(first).exited(), Some(first));
        assert_eq!(State::Paused.exit(first).exited(), Some(first));
    }

    #[test]
    fn each_state_refuses_the_steps_of_the_others() {
        let stopped = State::Stopped(Exit::now(0));
        for state in [State::Running, State::Paused, stopped] {
            assert!(state.start().is_err());
        }
        for state in [State::Created, State::Paused, stopped] {
            assert!(state.pause().is_err() && state.exec().is_err());
        }
        for state in [State::Created, State::Running, stopped] {
            assert!(state.resume().is_err());
        }
        assert!(State::Created.delete().is_ok() && stopped.delete().is_ok());
        assert_eq!(State::Running.delete().unwrap_err().to_string(), "The process is running and cannot be deleted");
        assert!(State::Paused.delete().is_err());
    }
}
