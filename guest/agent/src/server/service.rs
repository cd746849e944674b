//! The AgentService: each call finds its verb, or answers UNIMPLEMENTED with its own name.

use std::future::Future;
use std::io;
use std::time::Duration;

use agent_proto::agent_ttrpc::AgentService;
use agent_proto::{Empty, agent, types};
use async_trait::async_trait;
use protobuf::MessageField;
use ttrpc::r#async::TtrpcContext;

use super::status::{Coded, status};
use crate::container::{self, Process, stats};
use crate::reaper::ended;
use crate::sandbox::Sandbox;
use crate::{guest, net};

type Answer<T> = ttrpc::Result<T>;

/// The service.
pub struct Service {
    sandbox: Sandbox,
}

impl Service {
    /// Serves this sandbox.
    pub fn new(sandbox: Sandbox) -> Self {
        Self { sandbox }
    }

    fn process(&self, id: &str, exec: &str) -> Answer<Process> {
        let look = self.sandbox.with_container(id, |container| container.process(id, exec).cloned());
        look.map_err(|error| status(&error))
    }
}

fn empty<E: Coded>(result: Result<(), E>) -> Answer<Empty> {
    match result {
        Ok(()) => Ok(Empty::new()),
        Err(error) => {
            let status = status(&error);
            tracing::info!(%status, "A call is answered with an error");
            Err(status)
        }
    }
}

/// Runs a verb to its end even when the caller gives up: ttrpc drops a call at its deadline, and what is half done
/// would stay so.
async fn detached<T: Send + 'static>(verb: impl Future<Output = T> + Send + 'static) -> Answer<T> {
    tokio::spawn(verb).await.map_err(|error| status(&io::Error::other(error)))
}

/// Runs what may block beside the agent's thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Answer<T> {
    let result = tokio::task::spawn_blocking(work).await.map_err(io::Error::other).and_then(|result| result);
    result.map_err(|error| status(&error))
}

fn unserved<T>(call: &str) -> Answer<T> {
    let text = format!("{call} is not implemented by this agent");
    Err(ttrpc::error::get_rpc_status(ttrpc::Code::UNIMPLEMENTED, text))
}

fn length(request: &agent::ReadStreamRequest) -> usize {
    usize::try_from(request.len).unwrap_or(usize::MAX)
}

#[async_trait]
impl AgentService for Service {
    async fn create_sandbox(&self, _: &TtrpcContext, request: agent::CreateSandboxRequest) -> Answer<Empty> {
        empty(self.sandbox.create(&request).await)
    }

    async fn destroy_sandbox(&self, _: &TtrpcContext, _: agent::DestroySandboxRequest) -> Answer<Empty> {
        let sandbox = self.sandbox.clone();
        detached(async move { sandbox.destroy().await }).await?;
        Ok(Empty::new())
    }

    async fn create_container(&self, _: &TtrpcContext, request: agent::CreateContainerRequest) -> Answer<Empty> {
        let sandbox = self.sandbox.clone();
        empty(detached(async move { container::create(&sandbox, request).await }).await?)
    }

    async fn start_container(&self, _: &TtrpcContext, request: agent::StartContainerRequest) -> Answer<Empty> {
        empty(container::start(&self.sandbox, &request.container_id).await)
    }

    async fn exec_process(&self, _: &TtrpcContext, request: agent::ExecProcessRequest) -> Answer<Empty> {
        let sandbox = self.sandbox.clone();
        empty(detached(async move { container::exec(&sandbox, request).await }).await?)
    }

    async fn signal_process(&self, _: &TtrpcContext, request: agent::SignalProcessRequest) -> Answer<Empty> {
        empty(container::signal(&self.sandbox, &request.container_id, &request.exec_id, request.signal))
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: agent::WaitProcessRequest,
    ) -> Answer<agent::WaitProcessResponse> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let status = ended(process.exit).await;
        Ok(agent::WaitProcessResponse { status, ..Default::default() })
    }

    async fn remove_container(&self, _: &TtrpcContext, request: agent::RemoveContainerRequest) -> Answer<Empty> {
        let timeout = (request.timeout != 0).then(|| Duration::from_secs(request.timeout.into()));
        let sandbox = self.sandbox.clone();
        empty(detached(async move { container::remove(&sandbox, &request.container_id, timeout).await }).await?)
    }

    async fn update_container(&self, _: &TtrpcContext, request: agent::UpdateContainerRequest) -> Answer<Empty> {
        empty(container::update(&self.sandbox, &request.container_id, &request.resources).await)
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        request: agent::StatsContainerRequest,
    ) -> Answer<agent::StatsContainerResponse> {
        let look = self.sandbox.with_container(&request.container_id, |container| Ok(container.cgroup.directory()));
        let directory = look.map_err(|error| status(&error))?;
        let read = move || (stats::cgroup(&directory), stats::network());
        let (cgroup_stats, network_stats) = blocking(move || Ok(read())).await?;
        let cgroup_stats = MessageField::some(cgroup_stats);
        Ok(agent::StatsContainerResponse { cgroup_stats, network_stats, ..Default::default() })
    }

    async fn pause_container(&self, _: &TtrpcContext, request: agent::PauseContainerRequest) -> Answer<Empty> {
        empty(container::set_paused(&self.sandbox, &request.container_id, true).await)
    }

    async fn resume_container(&self, _: &TtrpcContext, request: agent::ResumeContainerRequest) -> Answer<Empty> {
        empty(container::set_paused(&self.sandbox, &request.container_id, false).await)
    }

    async fn write_stdin(
        &self,
        _: &TtrpcContext,
        request: agent::WriteStreamRequest,
    ) -> Answer<agent::WriteStreamResponse> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        process.streams.write_stdin(&request.data).await.map_err(|error| status(&error))?;
        let len = u32::try_from(request.data.len()).unwrap_or(u32::MAX);
        Ok(agent::WriteStreamResponse { len, ..Default::default() })
    }

    async fn read_stdout(
        &self,
        _: &TtrpcContext,
        request: agent::ReadStreamRequest,
    ) -> Answer<agent::ReadStreamResponse> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let data = process.streams.read_stdout(length(&request)).await.map_err(|error| status(&error))?;
        Ok(agent::ReadStreamResponse { data, ..Default::default() })
    }

    async fn read_stderr(
        &self,
        _: &TtrpcContext,
        request: agent::ReadStreamRequest,
    ) -> Answer<agent::ReadStreamResponse> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let data = process.streams.read_stderr(length(&request)).await.map_err(|error| status(&error))?;
        Ok(agent::ReadStreamResponse { data, ..Default::default() })
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: agent::CloseStdinRequest) -> Answer<Empty> {
        self.process(&request.container_id, &request.exec_id)?.streams.close_stdin().await;
        Ok(Empty::new())
    }

    async fn tty_win_resize(&self, _: &TtrpcContext, request: agent::TtyWinResizeRequest) -> Answer<Empty> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let side = |characters| u16::try_from(characters).unwrap_or(u16::MAX);
        empty(process.streams.resize(side(request.row), side(request.column)))
    }

    async fn update_interface(
        &self,
        _: &TtrpcContext,
        request: agent::UpdateInterfaceRequest,
    ) -> Answer<types::Interface> {
        let wanted = request.interface.unwrap_or_default();
        blocking(move || net::update_interface(&wanted)).await
    }

    async fn update_routes(&self, _: &TtrpcContext, request: agent::UpdateRoutesRequest) -> Answer<agent::Routes> {
        let wanted = request.routes.unwrap_or_default().Routes;
        let routes = blocking(move || net::update_routes(&wanted)).await?;
        Ok(agent::Routes { Routes: routes, ..Default::default() })
    }

    async fn list_interfaces(&self, _: &TtrpcContext, _: agent::ListInterfacesRequest) -> Answer<agent::Interfaces> {
        let interfaces = blocking(net::list_interfaces).await?;
        Ok(agent::Interfaces { Interfaces: interfaces, ..Default::default() })
    }

    async fn list_routes(&self, _: &TtrpcContext, _: agent::ListRoutesRequest) -> Answer<agent::Routes> {
        let routes = blocking(net::list_routes).await?;
        Ok(agent::Routes { Routes: routes, ..Default::default() })
    }

    async fn add_arp_neighbors(&self, _: &TtrpcContext, request: agent::AddARPNeighborsRequest) -> Answer<Empty> {
        let neighbors = request.neighbors.unwrap_or_default().ARPNeighbors;
        blocking(move || net::add_neighbors(&neighbors)).await?;
        Ok(Empty::new())
    }

    async fn get_guest_details(
        &self,
        _: &TtrpcContext,
        request: agent::GuestDetailsRequest,
    ) -> Answer<agent::GuestDetailsResponse> {
        Ok(guest::details(&request))
    }

    async fn reseed_random_dev(&self, _: &TtrpcContext, request: agent::ReseedRandomDevRequest) -> Answer<Empty> {
        // Here and not beside the agent's thread: it waits for nothing, and a guest that was restored has no such thread.
        guest::reseed(&request.data).map_err(|error| status(&error))?;
        Ok(Empty::new())
    }

    async fn set_guest_date_time(&self, _: &TtrpcContext, request: agent::SetGuestDateTimeRequest) -> Answer<Empty> {
        // Here, as what it would wait for would be missing from the time.
        guest::set_time(request.Sec, request.Usec).map_err(|error| status(&error))?;
        Ok(Empty::new())
    }

    async fn online_cpu_mem(&self, _: &TtrpcContext, request: agent::OnlineCPUMemRequest) -> Answer<Empty> {
        let count = blocking(move || guest::online(request.nb_cpus, request.cpu_only)).await?;
        tracing::debug!(count, wanted = request.nb_cpus, "CPUs are in use");
        Ok(Empty::new())
    }

    async fn get_oom_event(&self, _: &TtrpcContext, _: agent::GetOOMEventRequest) -> Answer<agent::OOMEvent> {
        let ended = || ttrpc::error::get_rpc_status(ttrpc::Code::UNAVAILABLE, "The agent is ending");
        let container_id = self.sandbox.oom().next().await.ok_or_else(ended)?;
        Ok(agent::OOMEvent { container_id, ..Default::default() })
    }

    // Not served. Said here and not left to the generated trait, whose answer is NOT_FOUND.

    async fn add_swap(&self, _: &TtrpcContext, _: agent::AddSwapRequest) -> Answer<Empty> {
        unserved("AddSwap")
    }

    async fn add_swap_path(&self, _: &TtrpcContext, _: agent::AddSwapPathRequest) -> Answer<Empty> {
        unserved("AddSwapPath")
    }

    async fn copy_file(&self, _: &TtrpcContext, _: agent::CopyFileRequest) -> Answer<Empty> {
        unserved("CopyFile")
    }

    async fn get_diagnostic_data(
        &self,
        _: &TtrpcContext,
        _: agent::GetDiagnosticDataRequest,
    ) -> Answer<agent::GetDiagnosticDataResponse> {
        unserved("GetDiagnosticData")
    }

    async fn get_ip_tables(
        &self,
        _: &TtrpcContext,
        _: agent::GetIPTablesRequest,
    ) -> Answer<agent::GetIPTablesResponse> {
        unserved("GetIPTables")
    }

    async fn get_metrics(&self, _: &TtrpcContext, _: agent::GetMetricsRequest) -> Answer<agent::Metrics> {
        unserved("GetMetrics")
    }

    async fn get_volume_stats(
        &self,
        _: &TtrpcContext,
        _: agent::VolumeStatsRequest,
    ) -> Answer<agent::VolumeStatsResponse> {
        unserved("GetVolumeStats")
    }

    async fn mem_agent_compact_set(&self, _: &TtrpcContext, _: agent::MemAgentCompactConfig) -> Answer<Empty> {
        unserved("MemAgentCompactSet")
    }

    async fn mem_agent_memcg_set(&self, _: &TtrpcContext, _: agent::MemAgentMemcgConfig) -> Answer<Empty> {
        unserved("MemAgentMemcgSet")
    }

    async fn mem_hotplug_by_probe(&self, _: &TtrpcContext, _: agent::MemHotplugByProbeRequest) -> Answer<Empty> {
        unserved("MemHotplugByProbe")
    }

    async fn remove_stale_virtiofs_share_mounts(
        &self,
        _: &TtrpcContext,
        _: agent::RemoveStaleVirtiofsShareMountsRequest,
    ) -> Answer<Empty> {
        unserved("RemoveStaleVirtiofsShareMounts")
    }

    async fn resize_volume(&self, _: &TtrpcContext, _: agent::ResizeVolumeRequest) -> Answer<Empty> {
        unserved("ResizeVolume")
    }

    async fn set_ip_tables(
        &self,
        _: &TtrpcContext,
        _: agent::SetIPTablesRequest,
    ) -> Answer<agent::SetIPTablesResponse> {
        unserved("SetIPTables")
    }

    async fn set_policy(&self, _: &TtrpcContext, _: agent::SetPolicyRequest) -> Answer<Empty> {
        unserved("SetPolicy")
    }

    async fn update_ephemeral_mounts(&self, _: &TtrpcContext, _: agent::UpdateEphemeralMountsRequest) -> Answer<Empty> {
        unserved("UpdateEphemeralMounts")
    }
}
