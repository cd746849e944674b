//! Making a container in a sandbox.

use std::path::PathBuf;
use std::sync::Arc;

use agent_proto::NULL_STREAM_PORT;
use agent_proto::agent::CreateContainerRequest;
use oci_spec::runtime::Spec;
use vmm::HostEnd;

use super::agent::AgentError;
use super::first_output::FirstOutput;
use super::guest::{ConnectError, Guest};
use super::memory::MemoryError;
use super::{Sandbox, SandboxError, State};
use crate::container::stdio::{GuestEnds, Stdio, StdioError, Streams};
use crate::container::{Container, Process};
use crate::helper::Place;
use crate::ids::Id;
use crate::lock::lock;
use crate::oci::{self, MemoryLimit, SpecError};
use crate::resources::mount::Mount;
use crate::resources::{ResourceError, volumes};

/// What a container is to be.
pub struct ContainerRequest {
    /// Its name.
    pub id: Id,
    /// Its bundle directory.
    pub bundle: PathBuf,
    /// Its specification.
    pub spec: Spec,
    /// Mounts that make its root file system; none when it is in the bundle.
    pub rootfs: Vec<Mount>,
    /// Where its standard streams go.
    pub streams: Streams,
}

impl ContainerRequest {
    /// Bytes of memory that it may use, if that is limited.
    fn memory_limit(&self) -> Option<u64> {
        let resources = self.spec.linux().as_ref()?.resources().as_ref()?;
        oci::memory_limit(resources).and_then(|MemoryLimit(limit)| limit)
    }
}

/// Why a container was not made: the stage that failed, and its cause.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The machine has ended, or is about to.
    #[error("The sandbox takes no more containers")]
    Ended,
    /// The name is taken.
    #[error("A container {0} exists already")]
    Exists(Id),
    /// The root file system.
    #[error("Cannot mount the container's root file system")]
    Rootfs(#[source] ResourceError),
    /// A volume.
    #[error("Cannot mount a volume of the container")]
    Volume(#[source] ResourceError),
    /// The specification.
    #[error("OCI runtime create failed")]
    Spec(#[from] SpecError),
    /// Memory for its limit.
    #[error("The sandbox does not get the memory that the container may use")]
    Memory(#[from] MemoryError),
    /// A standard stream.
    #[error("Cannot set up the container's standard streams")]
    Stdio(#[from] StdioError),
    /// A standard stream's connection.
    #[error("Cannot set up the container's standard streams")]
    Stream(#[from] ConnectError),
    /// The agent, in runc's words.
    #[error("OCI runtime create failed")]
    Agent(#[source] AgentError),
}

/// The host's ports by which the agent knows the streams of a process; `NULL_STREAM_PORT` where there is none.
pub(super) struct Ports {
    pub(super) stdin: u32,
    pub(super) stdout: u32,
    pub(super) stderr: u32,
}

impl Sandbox {
    /// Makes a container. When this fails, nothing of the container is left.
    pub async fn create_container(self: &Arc<Self>, request: ContainerRequest) -> Result<Arc<Container>, CreateError> {
        let guest = self.guest().map_err(|_| CreateError::Ended)?;
        if *self.state.borrow() != State::Running {
            return Err(CreateError::Ended);
        }
        if self.container(&request.id).is_some() {
            return Err(CreateError::Exists(request.id));
        }
        // The guest plugs it while the host does its part.
        let limit = request.memory_limit();
        let claim = self.claim_memory(&request.id, limit);
        let sandbox = Arc::clone(self);
        // Mounting may wait for a file system.
        let prepared =
            tokio::task::spawn_blocking(move || sandbox.prepare(&request).map(|prepared| (request, prepared)));
        let (request, (share, mut guest_request)) = prepared.await.map_err(|_| CreateError::Ended)??;
        let helper = &self.host.helper;
        let (stdio, ends) = Stdio::open(&request.streams, request.id.as_str(), &self.namespace, helper).await?;
        // Before the process is made: a terminal may echo its client's first words.
        let first_output = request.streams.fifo_of_stdout().and_then(|fifo| FirstOutput::watch(&fifo));
        let ports = connect_streams(&guest, ends).await?;
        guest_request.stdin_port = ports.stdin;
        guest_request.stdout_port = ports.stdout;
        guest_request.stderr_port = ports.stderr;
        self.memory_is_there(&guest).await?;
        let created = guest.agent.create_container(&guest_request).await;
        created.map_err(|error| CreateError::Agent(guest.blame(error)))?;

        let process = Process::new(request.streams, None);
        process.keep_stdio(Arc::new(stdio));
        let container = Arc::new(Container::new(request.id.clone(), request.bundle, process, share));
        // Before anybody can remove it, which gives the memory back.
        claim.settle(limit);
        lock(&self.containers).insert(request.id, Arc::clone(&container));
        if self.is_made_by(&container.id) {
            self.report_start(&container, first_output);
        }
        Ok(container)
    }

    /// The host's part: root file system and volumes in the share, and the specification in the guest's terms.
    fn prepare(&self, request: &ContainerRequest) -> Result<(Place, CreateContainerRequest), CreateError> {
        let resources = lock(&self.resources);
        let share = &resources.as_ref().ok_or(CreateError::Ended)?.share;
        let mut share = share.add_container(&request.id).map_err(CreateError::Rootfs)?;
        drop(resources);
        if request.spec.root().is_none() {
            return Err(SpecError::Missing("root").into());
        }
        let rootfs = share.mount_rootfs(request.rootfs.clone()).map_err(CreateError::Rootfs)?;
        let mounts = request.spec.mounts().as_deref().unwrap_or_default();
        let mounts = volumes::translate(mounts, &mut share).map_err(CreateError::Volume)?;
        let with_seccomp = !self.config.runtime.disable_guest_seccomp;
        let translated = oci::for_guest(&request.spec, &request.id, rootfs, mounts, with_seccomp)?;
        if !translated.left_out.is_empty() {
            tracing::warn!(container = %request.id, parts = translated.left_out.join(", "), "Not in the guest");
        }
        let guest_request = CreateContainerRequest {
            container_id: request.id.to_string(),
            exec_id: request.id.to_string(),
            OCI: Some(translated.spec).into(),
            sandbox_pidns: translated.sandbox_pidns,
            ..CreateContainerRequest::default()
        };
        Ok((share, guest_request))
    }

    /// Opens and ties the streams of an added process.
    pub(super) async fn open_streams(
        &self,
        guest: &Guest,
        container: &Id,
        streams: &Streams,
    ) -> Result<(Stdio, Ports), SandboxError> {
        let (stdio, ends) = Stdio::open(streams, container.as_str(), &self.namespace, &self.host.helper).await?;
        Ok((stdio, connect_streams(guest, ends).await?))
    }
}

/// Ties descriptors to connections of their own, all at once.
async fn connect_streams(guest: &Guest, ends: GuestEnds) -> Result<Ports, ConnectError> {
    let connect = async |end: Option<HostEnd>| match end {
        Some(end) => guest.connect_stream(end).await,
        None => Ok(NULL_STREAM_PORT),
    };
    let (stdin, stdout, stderr) = tokio::try_join!(
        connect(ends.stdin.map(HostEnd::Source)),
        connect(ends.stdout.map(HostEnd::Sink)),
        connect(ends.stderr.map(HostEnd::Sink)),
    )?;
    Ok(Ports { stdin, stdout, stderr })
}
