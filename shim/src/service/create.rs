//! Create: a container, and with the first one the sandbox.

use std::path::PathBuf;
use std::sync::Arc;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::topics::TASK_CREATE_EVENT_TOPIC;
use oci_spec::runtime::Spec;

use super::error::ServiceError;
use super::{TaskService, options};
use crate::config::Config;
use crate::container::Container;
use crate::container::stdio::Streams;
use crate::helper::Named;
use crate::ids::Id;
use crate::lock::lock;
use crate::log;
use crate::oci::{self, Role};
use crate::resources::cgroup::CgroupPath;
use crate::resources::mount::Mount;
use crate::sandbox::{ContainerRequest, Sandbox, SandboxRequest, reported_pid, trace};
use crate::start_queue::{self, Turn};

impl TaskService {
    /// Makes a container. When this fails, nothing of it is left, nor of a sandbox that was started for it.
    pub(super) async fn create_task(&self, request: CreateTaskRequest) -> Result<(), ServiceError> {
        let t0 = trace::now();
        if !request.checkpoint.is_empty() {
            return Err(ServiceError::Unsupported("Restoring from a checkpoint"));
        }
        let id = Id::try_from(request.id.as_str())?;
        let bundle = PathBuf::from(&request.bundle);
        let spec = oci::load(&bundle)?;
        let role = Role::of(&spec.annotations().clone().unwrap_or_default())?;

        let container_request = ContainerRequest {
            id,
            bundle,
            spec,
            rootfs: request.rootfs.iter().map(mount).collect(),
            streams: Streams {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
            },
        };
        let starting = self.starting.lock().await;
        let (sandbox, container) = tokio::select! {
            made = self.create_in_sandbox(&role, container_request, &request, t0) => made?,
            () = self.shutdown_requested() => return Err(ServiceError::Ending),
        };
        drop(starting);
        self.publish_create(request);
        sandbox.watch_exit(&container, None, &container.init);
        Ok(())
    }

    /// Finds or starts the sandbox and makes the container in it. Where starts take turns, one lasts until its container
    /// is there: making it takes as much of the host as the sandbox does.
    async fn create_in_sandbox(
        &self,
        role: &Role,
        container: ContainerRequest,
        request: &CreateTaskRequest,
        t0: u64,
    ) -> Result<(Arc<Sandbox>, Arc<Container>), ServiceError> {
        let (sandbox, _turn) = match role {
            Role::Sandbox => self.start_sandbox(&container, request, t0).await?,
            Role::Member { sandbox } => {
                let running = self.sandbox().filter(|running| running.id == *sandbox);
                let missing = || ServiceError::NoSandbox { container: container.id.clone(), sandbox: sandbox.clone() };
                (running.ok_or_else(missing)?, None)
            }
        };
        match sandbox.create_container(container).await {
            Ok(container) => Ok((sandbox, container)),
            Err(error) => {
                if *role == Role::Sandbox {
                    sandbox.stop().await;
                    self.set_sandbox(None);
                }
                Err(error.into())
            }
        }
    }

    async fn start_sandbox(
        &self,
        container: &ContainerRequest,
        request: &CreateTaskRequest,
        t0: u64,
    ) -> Result<(Arc<Sandbox>, Option<Turn>), ServiceError> {
        let ContainerRequest { id, bundle, spec, rootfs, streams } = container;
        if let Some(running) = self.sandbox() {
            return Err(ServiceError::Occupied(running.id.clone()));
        }
        log::set_sandbox(id);
        let path = options::config_path(request.options.as_ref()).map_err(ServiceError::Options)?;
        let (config, notices) = Config::load(path.as_deref())?;
        log::set_level(config.runtime.log_level);
        for notice in notices {
            tracing::warn!("{notice}");
        }
        let cgroups_path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
        let spare = lock(&self.spare).take();
        let turn = match config.runtime.simultaneous_starts {
            // A spare needs none: its sandbox is there. The queue's files are out of the reach of a process that is
            // confined, as one is whose first start has failed.
            Some(most) if spare.is_none() && !seccomp::is_confined() => {
                Some(start_queue::turn(&self.run_dir, most, config.runtime.queue_deadline).await?)
            }
            _ => None,
        };
        let sandbox_request = SandboxRequest {
            id: id.clone(),
            namespace: self.namespace.clone(),
            socket: self.socket.clone(),
            hostname: hostname(spec, id),
            bundles: bundle.parent().unwrap_or(bundle).to_owned(),
            config_path: path,
            cgroup: cgroups_path.and_then(|path| CgroupPath::parse(path.to_str()?)),
            named: Named { rootfs: rootfs.clone(), logger: streams.logger() },
            t0,
            turn: turn.as_ref().map(|_| trace::now()),
        };
        let (host, events) = (self.host.clone(), Arc::clone(&self.events));
        let sandbox = Sandbox::start(sandbox_request, config, &self.run_dir, host, events, spare).await?;
        self.set_sandbox(Some(Arc::clone(&sandbox)));
        Ok((sandbox, turn))
    }

    fn publish_create(&self, request: CreateTaskRequest) {
        let io = TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..TaskIO::default()
        };
        // The event's mounts are another generated type with the same fields; nobody reads them.
        let event = TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            io: Some(io).into(),
            pid: reported_pid(),
            ..TaskCreate::default()
        };
        self.events.publish(TASK_CREATE_EVENT_TOPIC, &event);
    }
}

/// The specification's host name, or the sandbox's name, as far as the kernel takes it (`__NEW_UTS_LEN`).
fn hostname(spec: &Spec, id: &Id) -> String {
    const LONGEST: usize = 64;
    let mut name = spec.hostname().clone().filter(|name| !name.is_empty()).unwrap_or_else(|| id.to_string());
    while name.len() > LONGEST {
        name.pop();
    }
    name
}

fn mount(mount: &containerd_shim_protos::api::Mount) -> Mount {
    Mount { fs_type: mount.type_.clone(), source: mount.source.clone(), options: mount.options.clone() }
}
