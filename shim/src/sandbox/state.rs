//! The life of a sandbox.
//!
//! ```text
//!             first container             stop, or the machine ends
//!   (nothing) ───────────────▶ running ────────────────────────────▶ stopped
//! ```
//!
//! A start that fails leaves nothing, so there is no state for it: a [`Sandbox`](super::Sandbox) is one that has
//! started.

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The machine runs and the agent answers.
    Running,
    /// Somebody stops it: no new container, no new process.
    Stopping,
    /// The machine has ended.
    Stopped,
}

impl State {
    /// Running to stopping. `false` when somebody else stops it or did.
    pub fn begin_stop(&mut self) -> bool {
        let first = *self == Self::Running;
        if first {
            *self = Self::Stopping;
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_stops_a_sandbox() {
        let mut state = State::Running;
        assert!(state.begin_stop());
        assert!(!state.begin_stop());
        assert!(!State::Stopped.begin_stop());
    }
}
