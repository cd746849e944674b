//! ExecProcess: a further process in a container that runs.

use std::fs;
use std::path::PathBuf;

use agent_proto::agent;

use super::launch::{Launched, launch};
use super::{Container, Error, Phase, Process, failed, off_thread, plan, spec, validate_id};
use crate::helper::{self, ExecRequest};
use crate::sandbox::Sandbox;
use crate::stdio::{Ports, Prepared};

/// Runs a process in a container. It has become its program when this answers.
pub async fn exec(sandbox: &Sandbox, request: agent::ExecProcessRequest) -> Result<(), Error> {
    let (id, name) = (request.container_id.clone(), request.exec_id.clone());
    validate_id(&name)?;
    let place = sandbox.with_container(&id, |container| {
        check(container, &id, &name)?;
        container.starting.insert(name.clone());
        Ok(Place {
            init: container.init.pid.as_raw(),
            cgroup: container.cgroup.directory(),
            directory: container.directory.clone(),
            rootfs: container.rootfs.clone(),
        })
    })?;
    let process = run(sandbox, request, place).await;
    sandbox.with_container(&id, |container| {
        container.starting.remove(&name);
        container.remember(&name, process?);
        Ok(())
    })
}

/// What of the container a further process needs.
struct Place {
    init: i32,
    cgroup: PathBuf,
    directory: PathBuf,
    rootfs: PathBuf,
}

async fn run(sandbox: &Sandbox, request: agent::ExecProcessRequest, place: Place) -> Result<Process, Error> {
    let Place { init, cgroup, directory, rootfs } = place;
    let name = request.exec_id;
    let given = request.process.into_option().ok_or(spec::Error::Missing("process"))?;
    let user = request.string_user.into_option();
    let (process, traits) = off_thread(move || plan::process(given, user.as_ref(), &rootfs)).await?;
    // Dots cannot begin an id, so this is not the name of another file in the directory.
    let file = format!("exec-{name}");
    let console = traits.terminal.then(|| directory.join(format!("{file}.sock")));
    let exec_request = ExecRequest { process, init, cgroup, console: console.clone() };
    let json = serde_json::to_vec(&exec_request).map_err(|error| spec::Error::Invalid(error.to_string()))?;

    let ports = Ports { stdin: request.stdin_port, stdout: request.stdout_port, stderr: request.stderr_port };
    let (ends, waiting) = Prepared::new(sandbox.connections(), ports, console, traits.user).await?.split();
    let description = directory.join(format!("{file}.json"));
    fs::write(&description, json).map_err(failed("Describing the process"))?;
    let launched = launch(sandbox.reaper(), helper::EXEC, &directory, &file, ends).await;
    // Only the helper reads it, and the helper is done.
    let _ = fs::remove_file(&description);
    let Launched { pid, exit, .. } = launched?;
    let streams = waiting.attach(&exit, traits.size).await?;
    Ok(Process { pid, exit, streams })
}

fn check(container: &Container, id: &str, name: &str) -> Result<(), Error> {
    if container.phase != Phase::Running || container.init.has_ended() {
        return Err(Error::State { container: id.to_owned(), state: container.state(), verb: "entered" });
    }
    let runs = container.process(id, name).is_ok_and(|process| !process.has_ended());
    if runs || container.starting.contains(name) { Err(Error::Exists(name.to_owned())) } else { Ok(()) }
}
