//! Threads of a role.

use std::io;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};

use crate::{ConfineError, Confinement, Role, filter, privileges, trap};

/// Starts a thread that does `body` in its role, and returns when it is confined. When it cannot be, there is no thread.
pub fn spawn<F>(confinement: Confinement, role: Role, name: String, body: F) -> io::Result<JoinHandle<()>>
where
    F: FnOnce() + Send + 'static,
{
    let builder = Builder::new().name(name);
    if confinement == Confinement::Off {
        return builder.spawn(body);
    }
    let (report, confined) = sync_channel(1);
    let thread = builder.spawn(move || {
        let entered = enter(role);
        let go_on = entered.is_ok();
        // The other end waits for it.
        let _ = report.send(entered);
        drop(report);
        if go_on {
            body();
        }
    })?;
    confined.recv().map_err(io::Error::other)?.map_err(io::Error::other)?;
    Ok(thread)
}

/// The order matters: the filter comes last, as it forbids the other steps.
pub(crate) fn enter(role: Role) -> Result<(), ConfineError> {
    trap::install_handler()?;
    trap::set_role(role);
    privileges::give_up(role)?;
    filter::install(role)
}
