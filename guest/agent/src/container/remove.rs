//! RemoveContainer: nothing of the container is left afterwards.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::{Error, failed, off_thread};
use crate::helper;
use crate::reaper::ended;
use crate::sandbox::Sandbox;

/// Kills what runs, waits for its end up to `timeout` (no timeout: without limit) and takes away the container's
/// cgroup, mounts and files.
pub async fn remove(sandbox: &Sandbox, id: &str, timeout: Option<Duration>) -> Result<(), Error> {
    let (exit, cgroup) = sandbox.with_container(id, |container| {
        container.cgroup.kill().map_err(failed("Killing the container's processes"))?;
        Ok((container.init.exit.clone(), container.cgroup.clone()))
    })?;
    match timeout {
        None => {
            ended(exit).await;
        }
        Some(timeout) => {
            tokio::time::timeout(timeout, ended(exit)).await.map_err(|_| Error::Timeout(id.to_owned()))?;
        }
    }
    off_thread(move || cgroup.remove().map_err(failed("Removing the container's cgroup"))).await?;
    let Some(container) = sandbox.take(id) else { return Ok(()) };
    sandbox.oom().forget(id);
    let state = Path::new(helper::STATE_ROOT).join(id);
    let directory = container.directory;
    let mounts = container.mounts;
    off_thread(move || {
        mounts.unmount();
        for path in [state, directory] {
            match fs::remove_dir_all(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("Removing the container's files")(error));
                }
                _ => {}
            }
        }
        Ok(())
    })
    .await
}
