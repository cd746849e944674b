//! Where the processors of a machine wait for leave to run.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::machine::RunState;

/// What a processor reads at the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Run; `waited` says that it stood at the gate meanwhile.
    Run {
        /// Whether it had to wait.
        waited: bool,
    },
    /// Leave the thread.
    End,
}

/// ```text
///   held ──open()──▶ open ──hold()──▶ held      end() from anywhere, for good
/// ```
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    position: Position,
    /// Processors whose thread has not come to the gate yet.
    expected: usize,
    /// Processors whose thread has not left.
    alive: usize,
    /// Those of them that stand at the gate.
    waiting: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Position {
    Held,
    Open,
    Ended,
}

impl Gate {
    /// A closed gate for `processors` threads.
    pub fn new(processors: usize) -> Self {
        let state = State { position: Position::Held, expected: processors, alive: processors, waiting: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Lets the processors run. False when the machine has ended.
    pub fn open(&self) -> bool {
        self.set(Position::Open)
    }

    /// Lets no processor pass any more. Those that run must be kicked. False when the machine has
    /// ended.
    pub fn hold(&self) -> bool {
        self.set(Position::Held)
    }

    /// Sends the processors away for good. Those that run must be kicked.
    pub fn end(&self) {
        self.set(Position::Ended);
    }

    /// Where the gate is.
    pub fn state(&self) -> RunState {
        match self.lock().position {
            Position::Held => RunState::Held,
            Position::Open => RunState::Running,
            Position::Ended => RunState::Ended,
        }
    }

    /// Waits until every processor that is left stands at the gate, or the gate is not held any
    /// more.
    pub fn wait_until_held(&self) {
        let mut state = self.lock();
        while state.position == Position::Held && state.waiting < state.alive {
            state = self.wait(state);
        }
    }

    /// Waits until every processor's thread has come to the gate once.
    pub fn wait_until_arrived(&self) {
        let mut state = self.lock();
        while state.position != Position::Ended && state.expected > 0 {
            state = self.wait(state);
        }
    }

    /// What a processor's thread calls first.
    pub fn arrive(&self) {
        self.lock().expected -= 1;
        self.changed.notify_all();
    }

    /// What a processor calls whenever it may have been kicked.
    pub fn pass(&self) -> Pass {
        let mut state = self.lock();
        let mut waited = false;
        loop {
            match state.position {
                Position::Open => return Pass::Run { waited },
                Position::Ended => return Pass::End,
                Position::Held => {
                    waited = true;
                    state.waiting += 1;
                    self.changed.notify_all();
                    state = self.wait(state);
                    state.waiting -= 1;
                }
            }
        }
    }

    /// What a processor calls when its thread leaves.
    pub fn leave(&self) {
        self.lock().alive -= 1;
        self.changed.notify_all();
    }

    fn set(&self, position: Position) -> bool {
        let mut state = self.lock();
        if state.position == Position::Ended {
            return false;
        }
        state.position = position;
        self.changed.notify_all();
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    #[test]
    fn processors_run_only_while_the_gate_is_open() {
        let gate = Arc::new(Gate::new(2));
        let rounds = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (gate, rounds) = (Arc::clone(&gate), Arc::clone(&rounds));
                thread::spawn(move || {
                    gate.arrive();
                    while gate.pass() != Pass::End {
                        rounds.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                    }
                    gate.leave();
                })
            })
            .collect();
        gate.wait_until_arrived();
        gate.wait_until_held();
        assert_eq!(rounds.load(Ordering::SeqCst), 0);
        for _ in 0..10 {
            assert!(gate.open());
            assert!(gate.hold());
            gate.wait_until_held();
            let before = rounds.load(Ordering::SeqCst);
            thread::yield_now();
            assert_eq!(rounds.load(Ordering::SeqCst), before);
        }
        gate.end();
        for thread in threads {
            thread.join().expect("join");
        }
        assert!(!gate.open());
        assert!(!gate.hold());
    }

    #[test]
    fn a_processor_that_left_is_not_waited_for() {
        let gate = Gate::new(1);
        gate.leave();
        gate.wait_until_held();
    }
}
