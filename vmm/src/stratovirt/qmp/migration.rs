//! Snapshots, as clients of QEMU ask for them: a migration to a directory. With the capability `background-snapshot` it is one of a machine
//! that runs on.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use serde_json::{Value, json};

use super::arguments::{Migrate, MigrateSetCapabilities};
use super::commands::Answer;
use super::error::CommandError;
use super::monitor::Monitor;
use crate::machine::{LiveSnapshot, Machine, RunState};
use crate::snapshot::SnapshotError;

/// QEMU's name for a snapshot of a machine that runs.
const BACKGROUND: &str = "background-snapshot";

/// What is known of snapshots, on whatever socket they were asked for.
#[derive(Default)]
pub struct Migration(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    background: bool,
    status: Status,
    /// What saves the machine, and the machine.
    thread: Option<(JoinHandle<()>, Arc<Machine>)>,
}

#[derive(Default)]
enum Status {
    #[default]
    None,
    Active,
    Completed(Option<LiveSnapshot>),
    /// Why, where nobody was told by the command's answer.
    Failed(Option<String>),
    Cancelled,
}

impl Migration {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, status: Status) {
        self.lock().status = status;
    }

    /// Saves `machine` in a thread of its own. It can be given up as soon as this returns.
    fn begin(&self, machine: Arc<Machine>, directory: PathBuf) -> Result<(), CommandError> {
        let turn = machine.begin_live()?;
        let mut state = self.lock();
        let (shared, saved_machine) = (Arc::clone(&self.0), Arc::clone(&machine));
        let body = move || {
            let saved = machine.snapshot_in(turn, &directory);
            drop(machine);
            shared.lock().unwrap_or_else(PoisonError::into_inner).status = match saved {
                Ok(taken) => Status::Completed(Some(taken)),
                Err(SnapshotError::Copy(error)) if error.is_wanted() => Status::Cancelled,
                Err(error) => Status::Failed(Some(CommandError::from(error).description())),
            };
        };
        let thread = std::thread::Builder::new().name("snapshot".into()).spawn(body);
        let failed = |source| CommandError::Host { what: "A thread cannot be started".into(), source };
        state.thread = Some((thread.map_err(failed)?, saved_machine));
        state.status = Status::Active;
        Ok(())
    }

    /// Waits until nothing is under way.
    pub fn join(&self) {
        let thread = self.lock().thread.take();
        if let Some((thread, _)) = thread {
            // An error is a panic, which its own message has told.
            let _ = thread.join();
        }
    }
}

impl Drop for Migration {
    /// Nobody is left who could ask what became of it.
    fn drop(&mut self) {
        if let Some((_, machine)) = &self.lock().thread {
            machine.cancel_live_snapshot();
        }
        self.join();
    }
}

impl Monitor {
    /// Saves the machine, which stays stopped; in the background, where that was asked for.
    pub(super) fn migrate(&mut self, arguments: Migrate) -> Answer {
        let directory = arguments.uri.strip_prefix("file:").filter(|directory| !directory.is_empty());
        let directory = directory.ok_or_else(|| {
            CommandError::refused("MicroVM does not support migration: it is saved to file: and a directory")
        })?;
        let migration = self.front.migration();
        let (active, background) = {
            let state = migration.lock();
            (matches!(state.status, Status::Active), state.background)
        };
        if active {
            return Err(CommandError::refused("There's a migration process in progress"));
        }
        if background {
            migration.join();
            migration.begin(self.front.share_machine(), directory.into())?;
            return Ok(json!({}));
        }
        if self.machine().state() == RunState::Running {
            self.stop()?;
        }
        let saved = self.machine().snapshot(Path::new(directory));
        let migration = self.front.migration();
        migration.set(if saved.is_ok() { Status::Completed(None) } else { Status::Failed(None) });
        saved?;
        Ok(json!({}))
    }

    /// Gives up what is under way.
    pub(super) fn migrate_cancel(&mut self) -> Answer {
        self.machine().cancel_live_snapshot();
        Ok(json!({}))
    }

    pub(super) fn migrate_set_capabilities(&mut self, arguments: MigrateSetCapabilities) -> Answer {
        let migration = self.front.migration();
        let mut state = migration.lock();
        if matches!(state.status, Status::Active) {
            return Err(CommandError::refused("There's a migration process in progress"));
        }
        let unknown = arguments.capabilities.iter().find(|item| item.state && item.capability != BACKGROUND);
        if let Some(item) = unknown {
            return Err(CommandError::refused(format!("There is no migration capability {}", item.capability)));
        }
        if let Some(item) = arguments.capabilities.iter().rfind(|item| item.capability == BACKGROUND) {
            state.background = item.state;
        }
        Ok(json!({}))
    }

    pub(super) fn query_migrate_capabilities(&self) -> Value {
        json!([{"capability": BACKGROUND, "state": self.front.migration().lock().background}])
    }

    pub(super) fn query_migrate(&self) -> Value {
        match &self.front.migration().lock().status {
            Status::None => json!({"status": "none"}),
            Status::Active => {
                let (done, total) = self.machine().live_progress().unwrap_or_default();
                let ram = json!({"transferred": done, "remaining": total.saturating_sub(done), "total": total});
                json!({"status": "active", "ram": ram})
            }
            Status::Completed(None) => json!({"status": "completed"}),
            Status::Completed(Some(taken)) => {
                // Milliseconds, a part of one is one.
                let downtime = taken.stood_still.as_micros().div_ceil(1000);
                json!({"status": "completed", "downtime": u64::try_from(downtime).unwrap_or(u64::MAX)})
            }
            Status::Failed(None) => json!({"status": "failed"}),
            Status::Failed(Some(reason)) => json!({"status": "failed", "error-desc": reason}),
            Status::Cancelled => json!({"status": "cancelled"}),
        }
    }
}
