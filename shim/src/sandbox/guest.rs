//! The guest: a machine of the `vmm` crate with what a sandbox needs in it, from its configuration to the agent's
//! answer.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use agent_proto::{AGENT_PORT, LOG_PORT, STDIO_PORT};
use devices::virtio::fs::CachePolicy;
use tokio::io::Interest;
use tokio::sync::{mpsc, oneshot};
use tracing_subscriber::filter::LevelFilter;
use vmm::{
    BASE_CMDLINE, BootConfig, Connector, ExitReason, FsConfig, HostEnd, Machine, MachineConfig, MemoryConfig,
    RngConfig, VsockConfig,
};

use super::agent::{Agent, AgentError};
use super::{Host, guest_log, trace};
use crate::config::{Config, FsCache};
use crate::helper::HelperError;
use crate::ids::Id;
use crate::main_thread::{Ended, MainThread};
use crate::readiness;
use crate::resources::share::TAG;

/// The guest's context id. Every machine has a vsock device of its own, so one number does for all; it is the first
/// that may be a guest's (virtio 1.2 section 5.10.4).
const GUEST_CID: u64 = 3;
/// Request queues of the shared file system. One is served by one thread.
const FS_REQUEST_QUEUES: u16 = 1;
const FS_QUEUE_SIZE: u16 = 128;
/// One thread for what waits for a disk, and one for data.
const FS_WORKERS: u16 = 2;
/// Lines of the guest's console that an error quotes at least, and at most. The log has all that was kept.
const QUOTED_LINES: std::ops::RangeInclusive<usize> = 12..=40;
/// How a kernel begins to say why it gives up; the lines after it say where.
const PANIC: &str = "Kernel panic - not syncing";

/// Why a guest did not come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The machine could not be built.
    #[error("Cannot build the machine of the sandbox")]
    Build(#[source] vmm::BuildError),
    /// The machine could not be set going.
    #[error("Cannot start the machine of the sandbox")]
    Start(#[source] vmm::StateError),
    /// The machine ended before its agent answered.
    #[error("The guest ended before its agent answered: {reason}. Its console ends with:\n{console}")]
    Ended {
        /// Why it ended.
        reason: ExitReason,
        /// The last lines of its console.
        console: String,
    },
    /// Time ran out.
    #[error("The guest's agent did not answer within {milliseconds} ms. The guest's console ends with:\n{console}")]
    Deadline {
        /// The configured time.
        milliseconds: u128,
        /// The last lines of its console.
        console: String,
    },
    /// The agent's port could not be reached.
    #[error("Cannot connect to the guest's agent")]
    Connect(#[from] ConnectError),
    /// The agent answered wrongly.
    #[error("The guest's agent is not well")]
    Agent(#[from] AgentError),
    /// The thread that builds machines is gone.
    #[error("Cannot build the machine of the sandbox")]
    Builder(#[from] Ended),
    /// The helper cannot be told.
    #[error("Cannot start the machine of the sandbox")]
    Helper(#[from] HelperError),
    /// A descriptor of the shim's own.
    #[error("Cannot make a descriptor to wait for the guest")]
    Descriptor(#[from] io::Error),
}

/// Why a connection into the guest was not made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The muxer says why.
    #[error("Cannot connect to port {port} of the guest")]
    Refused {
        /// The port.
        port: u32,
        /// Why.
        source: vmm::ConnectError,
    },
    /// The machine is gone.
    #[error("The machine has ended")]
    Gone,
}

/// A guest that runs, and its agent.
pub struct Guest {
    machine: Arc<Machine>,
    main: MainThread,
    connector: Connector,
    /// The agent.
    pub agent: Agent,
    /// When the agent answered.
    pub answered_at: u64,
}

impl Guest {
    /// Builds a machine for `sandbox` that sees `shared` and, if its debug console is wanted, listens on `socket`,
    /// starts it and waits for its agent. When this fails or is given up, nothing of the machine is left.
    pub async fn boot(
        sandbox: &Id,
        config: &Config,
        shared: &Path,
        socket: &Path,
        host: &Host,
    ) -> Result<Self, BootError> {
        let machine_config = machine_config(sandbox, config, shared, socket);
        let built = host.main.run(move || Machine::build(machine_config)).await?;
        let machine = Arc::new(built.map_err(BootError::Build)?);
        let connector = machine.vsock().ok_or(ConnectError::Gone)?;
        let (announce, mut announced) = mpsc::unbounded_channel();
        connector.listen(LOG_PORT, Box::new(move |stream| drop(announce.send(stream))));
        host.helper.seal()?;
        machine.start().map_err(BootError::Start)?;

        let deadline = config.agent.boot_deadline;
        let come_up = async {
            // The agent connects to the log port when it listens on its own ports. A machine that ends lets go of
            // the port before it says why: that is no answer.
            let log = tokio::select! {
                Some(log) = announced.recv() => log,
                reason = ended(&machine) => return Err(ended_early(&machine, reason?)),
            };
            guest_log::forward(log);
            tokio::spawn(async move {
                while let Some(stream) = announced.recv().await {
                    guest_log::forward(stream);
                }
            });
            let (ours, theirs) = UnixStream::pair()?;
            connect(&connector, AGENT_PORT, HostEnd::Duplex(theirs.into())).await?;
            let agent = Agent::new(ours, config.agent.create_deadline)?;
            tokio::select! {
                checked = agent.check() => checked?,
                reason = ended(&machine) => return Err(ended_early(&machine, reason?)),
            }
            Ok(agent)
        };
        let agent = match tokio::time::timeout(deadline, come_up).await {
            Ok(done) => done?,
            Err(_) => {
                return Err(BootError::Deadline { milliseconds: deadline.as_millis(), console: console(&machine) });
            }
        };
        Ok(Self { connector, agent, answered_at: trace::now(), machine, main: host.main.clone() })
    }

    /// The machine, for its times and its threads.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Ties `end` to a standard stream's port of the guest and returns the host's port, by which the agent knows it.
    pub async fn connect_stream(&self, end: HostEnd) -> Result<u32, ConnectError> {
        connect(&self.connector, STDIO_PORT, end).await
    }

    /// Waits for the machine's end, without keeping the machine.
    pub fn ended(&self) -> impl Future<Output = io::Result<()>> + Send + use<> {
        let event = exit_event(&self.machine);
        async move { wait_readable(event?).await }
    }

    /// Ends the machine.
    pub async fn stop(&self) {
        let machine = Arc::clone(&self.machine);
        // Joins threads of the machine, which may be in the middle of a request.
        if let Err(error) = self.main.run(move || machine.stop()).await {
            tracing::error!(%error, "The machine was not stopped");
        }
    }
}

/// What a sandbox's machine is made of.
fn machine_config(sandbox: &Id, config: &Config, shared: &Path, socket: &Path) -> MachineConfig {
    let hypervisor = &config.hypervisor;
    let boot = BootConfig {
        kernel: hypervisor.kernel.clone(),
        initrd: Some(hypervisor.initrd.clone()),
        cmdline: command_line(config),
    };
    let memory = MemoryConfig::from_size(hypervisor.memory_mib << 20);
    let mut machine = MachineConfig::new(sandbox.as_str(), memory, boot);
    machine.vcpus = u8::try_from(hypervisor.vcpus.get()).unwrap_or(u8::MAX);
    machine.fs = vec![FsConfig {
        tag: TAG.to_owned(),
        shared_dir: shared.to_owned(),
        cache: match hypervisor.fs_cache {
            FsCache::Never => CachePolicy::Never,
            FsCache::Auto => CachePolicy::Auto,
            FsCache::Always => CachePolicy::Always,
        },
        num_request_queues: FS_REQUEST_QUEUES,
        queue_size: FS_QUEUE_SIZE,
        writeback: false,
        workers: FS_WORKERS,
        xattr: true,
        // Nobody but the sandbox writes to its share.
        posix_locks: false,
    }];
    // The shim itself needs no socket; a person needs one to reach the debug console.
    let uds_path = config.agent.debug_console.then(|| socket.to_owned());
    machine.vsock = Some(VsockConfig { guest_cid: GUEST_CID, uds_path });
    machine.rng = Some(RngConfig::default());
    machine.confinement = config.runtime.confinement;
    machine
}

/// The kernel's command line: the machine's own words, the agent's, then what the operator added.
fn command_line(config: &Config) -> String {
    let mut words = vec![BASE_CMDLINE.to_owned()];
    if config.runtime.log_level < LevelFilter::DEBUG {
        // Every line on the serial console costs the guest an exit for each byte.
        words.push("quiet".to_owned());
    }
    if config.agent.debug {
        words.push("agent.log=debug".to_owned());
    }
    if config.agent.debug_console {
        words.push("agent.debug_console".to_owned());
    }
    if !config.hypervisor.kernel_params.is_empty() {
        words.push(config.hypervisor.kernel_params.clone());
    }
    words.join(" ")
}

/// The muxer's callback as a future.
async fn connect(connector: &Connector, port: u32, end: HostEnd) -> Result<u32, ConnectError> {
    let (done, outcome) = oneshot::channel();
    connector.connect(port, end, Box::new(move |result| drop(done.send(result))));
    match outcome.await {
        Ok(result) => result.map_err(|source| ConnectError::Refused { port, source }),
        Err(_) => Err(ConnectError::Gone),
    }
}

async fn ended(machine: &Machine) -> io::Result<ExitReason> {
    wait_readable(exit_event(machine)?).await?;
    Ok(machine.exit_reason().unwrap_or(ExitReason::Stopped))
}

fn exit_event(machine: &Machine) -> io::Result<OwnedFd> {
    machine.exit_fd().try_clone_to_owned()
}

/// The event is readable from the machine's end on, and not read: a second waiter sees it too.
async fn wait_readable(event: OwnedFd) -> io::Result<()> {
    readiness::watch(event, Interest::READABLE)?.readable().await.map(drop)
}

fn ended_early(machine: &Machine, reason: ExitReason) -> BootError {
    BootError::Ended { reason, console: console(machine) }
}

/// Writes what is kept of the console to the log and returns its last lines.
pub fn console(machine: &Machine) -> String {
    let tail = machine.console_tail();
    let text = String::from_utf8_lossy(&tail).replace('\r', "");
    for line in text.lines() {
        tracing::info!(target: "console", "{line}");
    }
    last_lines(&text)
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return "(nothing)".to_owned();
    }
    let (fewest, most) = QUOTED_LINES.into_inner();
    let after_panic =
        lines.iter().rposition(|line| line.contains(PANIC)).map_or(0, |position| lines.len().saturating_sub(position));
    let quoted = after_panic.clamp(fewest, most);
    lines.get(lines.len().saturating_sub(quoted)..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_has_the_agents_and_the_operators_words() {
        let mut config = Config::default();
        assert!(command_line(&config).starts_with(BASE_CMDLINE) && command_line(&config).ends_with(" quiet"));
        config.agent.debug = true;
        config.agent.debug_console = true;
        config.hypervisor.kernel_params = "a=b c".to_owned();
        config.runtime.log_level = LevelFilter::DEBUG;
        assert_eq!(command_line(&config), format!("{BASE_CMDLINE} agent.log=debug agent.debug_console a=b c"));
    }

    #[test]
    fn an_error_quotes_the_end_of_the_console() {
        assert_eq!(last_lines("\n \n"), "(nothing)");
        let lines = |count: usize| (0..count).map(|n| format!("line {n}\n\n")).collect::<String>();
        let (fewest, most) = QUOTED_LINES.into_inner();
        let quoted = last_lines(&lines(fewest + 2));
        assert!(quoted.starts_with("line 2\n") && quoted.ends_with(&format!("line {}", fewest + 1)), "{quoted}");
        let panic = |after| last_lines(&format!("{}{PANIC}: x\n{}", lines(99), lines(after)));
        assert!(panic(fewest).starts_with(PANIC) && panic(most - 1).starts_with(PANIC));
        assert!(panic(most).starts_with("line 0") && panic(0).ends_with(": x"));
    }

    #[test]
    fn the_machine_is_what_the_configuration_says() {
        let mut config = Config::default();
        config.hypervisor.memory_mib = 300;
        let make = |config: &Config| {
            machine_config(&Id::try_from("x").unwrap(), config, Path::new("/s"), Path::new("/socket"))
        };
        let machine = make(&config);
        assert_eq!(machine.vsock.unwrap().uds_path, None);
        assert_eq!((machine.memory.size, machine.vcpus), (300 << 20, 1));
        assert_eq!((machine.fs[0].tag.as_str(), machine.fs[0].shared_dir.as_path()), (TAG, Path::new("/s")));
        config.agent.debug_console = true;
        assert_eq!(make(&config).vsock.unwrap().uds_path.as_deref(), Some(Path::new("/socket")));
    }
}
