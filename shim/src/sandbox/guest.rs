//! The guest: a machine of the `vmm` crate with what a sandbox needs in it, from its configuration to the agent's
//! answer.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent_proto::{AGENT_PORT, LOG_PORT, STDIO_PORT};
use tokio::io::Interest;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{mpsc, oneshot};
use vmm::{Connector, ExitReason, HostEnd, Machine, MachineConfig};

use super::agent::{Agent, AgentError};
use super::machine::{ImageError, drives, machine_config};
use super::saved::Saved;
use super::{guest_log, identity, trace};
use crate::config::Config;
use crate::helper::HelperError;
use crate::ids::Id;
use crate::main_thread::{Ended, MainThread};
use crate::readiness;

/// Lines of the guest's console that an error quotes at least, and at most. The log has all that was kept.
const QUOTED_LINES: std::ops::RangeInclusive<usize> = 12..=40;
/// How long a machine may take to be made, work that was asked for before included: longer than any does, and shorter than a
/// kubelet waits.
const MAKING: Duration = Duration::from_secs(180);
/// How a kernel begins to say why it gives up; the lines after it say where.
const PANIC: &str = "Kernel panic - not syncing";

/// Why a guest did not come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// What its root is on.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The machine could not be built.
    #[error("Cannot build the machine of the sandbox")]
    Build(#[source] vmm::BuildError),
    /// The machine could not be restored.
    #[error("Cannot restore the machine of the sandbox")]
    Restore(#[source] vmm::RestoreError),
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
    /// The thread that builds machines is busy with something that does not end.
    #[error("The machine of the sandbox was not made within {seconds} s: the process's first thread is held up")]
    HeldUp {
        /// How long that was waited for.
        seconds: u64,
    },
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

/// Where a guest belongs.
pub struct Home<'a> {
    /// The sandbox, or the template.
    pub name: &'a Id,
    /// What its machine is to be.
    pub config: &'a Config,
    /// The directory that it sees.
    pub shared: &'a Path,
    /// Where it listens, if its debug console is wanted.
    pub socket: &'a Path,
    /// The thread that makes machines.
    pub main: &'a MainThread,
    /// What is to be done before the guest's first instruction.
    pub before_start: &'a (dyn Fn() -> Result<(), HelperError> + Sync),
}

impl Home<'_> {
    /// What makes a machine's configuration whenever it is called.
    fn machine_config(&self) -> impl Fn() -> Result<MachineConfig, ImageError> + Send + use<> {
        let (name, config) = (self.name.clone(), self.config.clone());
        let (shared, socket) = (self.shared.to_owned(), self.socket.to_owned());
        move || {
            let blk = drives(&config)?;
            Ok(MachineConfig { blk, ..machine_config(&name, &config, &shared, &socket) })
        }
    }
}

/// A guest that runs, and its agent.
pub struct Guest {
    pub(super) machine: Arc<Machine>,
    pub(super) main: MainThread,
    pub(super) connector: Connector,
    /// The agent.
    pub agent: Agent,
    /// When the agent answered.
    pub answered_at: u64,
}

impl Guest {
    /// Builds a machine, starts it and waits for its agent. When this fails or is given up, nothing of the machine is
    /// left.
    pub async fn boot(home: &Home<'_>) -> Result<Self, BootError> {
        let machine_config = home.machine_config();
        let machine =
            make(home.main, MAKING, move || Machine::build(machine_config()?).map_err(BootError::Build)).await?;
        let connector = machine.vsock().ok_or(ConnectError::Gone)?;
        let mut announced = listen_for_log(&connector);
        (home.before_start)()?;
        machine.start().map_err(BootError::Start)?;

        let come_up = async {
            // The agent connects to the log port when it listens on its own ports. A machine that ends lets go of
            // the port before it says why: that is no answer.
            let log = tokio::select! {
                Some(log) = announced.recv() => log,
                reason = ended(&machine) => return Err(ended_early(&machine, reason?)),
            };
            guest_log::forward(log);
            tokio::spawn(forward_logs(announced));
            let agent = dial(&connector, home.config).await?;
            tokio::select! {
                checked = agent.check() => checked?,
                reason = ended(&machine) => return Err(ended_early(&machine, reason?)),
            }
            Ok(agent)
        };
        let agent = within(home.config.agent.boot_deadline, &machine, come_up).await?;
        Ok(Self { connector, agent, answered_at: trace::now(), machine, main: home.main.clone() })
    }

    /// As [`boot`](Self::boot), but the machine goes on from where it was `saved`. Its agent listens already. When this returns,
    /// the guest's random generator is this sandbox's own; [`identity::set_clock`] is left to do.
    pub async fn restore(home: &Home<'_>, saved: Saved) -> Result<Self, BootError> {
        Self::wake(Self::asleep(home, saved).await?, home).await
    }

    /// The machine that was `saved` before it goes on. It takes what a machine takes but for the guest's memory.
    pub async fn asleep(home: &Home<'_>, saved: Saved) -> Result<Arc<Machine>, BootError> {
        let machine_config = home.machine_config();
        make(home.main, MAKING, move || saved.restore(machine_config)).await
    }

    /// Lets a machine that is [`asleep`](Self::asleep) go on.
    pub async fn wake(machine: Arc<Machine>, home: &Home<'_>) -> Result<Self, BootError> {
        let connector = machine.vsock().ok_or(ConnectError::Gone)?;
        tokio::spawn(forward_logs(listen_for_log(&connector)));
        (home.before_start)()?;
        let copied = Arc::clone(&machine);
        home.main.begin(move || copy_ahead(&copied));
        machine.start().map_err(BootError::Start)?;

        let come_up = async {
            tokio::select! {
                agent = reseed(&connector, home.config) => agent,
                reason = ended(&machine) => Err(ended_early(&machine, reason?)),
            }
        };
        // Half of the patience, so that enough of it is left for booting in its stead.
        let agent = within(half(home.config.agent.boot_deadline), &machine, come_up).await?;
        Ok(Self { connector, agent, answered_at: trace::now(), machine, main: home.main.clone() })
    }

    /// The machine, for its times and its threads.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Ties `end` to a standard stream's port of the guest and returns the host's port, by which the agent knows it.
    pub async fn connect_stream(&self, end: HostEnd) -> Result<u32, ConnectError> {
        connect(&self.connector, STDIO_PORT, end).await
    }

    /// Why a call really failed: whose machine has ended does not answer. Of one that runs and does not answer either, the log
    /// gets the console.
    pub fn blame(&self, error: AgentError) -> AgentError {
        match (error, self.machine.exit_reason()) {
            (AgentError::NoAnswer { .. }, Some(reason)) => AgentError::Ended(reason),
            (error @ AgentError::NoAnswer { .. }, None) => {
                console(&self.machine);
                error
            }
            (error, _) => error,
        }
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

/// Has a machine made by the first thread. One that is made after the deadline is dropped there.
async fn make(
    main: &MainThread,
    deadline: Duration,
    make: impl FnOnce() -> Result<Machine, BootError> + Send + 'static,
) -> Result<Arc<Machine>, BootError> {
    match tokio::time::timeout(deadline, main.run(make)).await {
        Ok(made) => Ok(Arc::new(made??)),
        Err(_) => Err(BootError::HeldUp { seconds: deadline.as_secs() }),
    }
}

/// While the guest runs already: it needs none of it to be right.
fn copy_ahead(machine: &Machine) {
    match machine.copy_ahead() {
        Ok(bytes) => tracing::debug!(bytes, "What the guest will write to is copied"),
        Err(error) => tracing::debug!(%error, "What the guest will write to cannot be copied ahead"),
    }
}

/// Connections of the guest to the log's port.
fn listen_for_log(connector: &Connector) -> UnboundedReceiver<UnixStream> {
    let (announce, announced) = mpsc::unbounded_channel();
    connector.listen(LOG_PORT, Box::new(move |stream| drop(announce.send(stream))));
    announced
}

async fn forward_logs(mut connections: UnboundedReceiver<UnixStream>) {
    while let Some(stream) = connections.recv().await {
        guest_log::forward(stream);
    }
}

async fn dial(connector: &Connector, config: &Config) -> Result<Agent, BootError> {
    let (ours, theirs) = UnixStream::pair()?;
    connect(connector, AGENT_PORT, HostEnd::Duplex(theirs.into())).await?;
    Ok(Agent::new(ours, config.agent.create_deadline)?)
}

/// Gives a restored guest random numbers of its own. Its answer is the first sign of life.
///
/// The device holds the connection back until the guest has let go of those of the machine that was saved.
async fn reseed(connector: &Connector, config: &Config) -> Result<Agent, BootError> {
    let agent = dial(connector, config).await?;
    identity::reseed(&agent).await?;
    Ok(agent)
}

fn half(time: Duration) -> Duration {
    time.checked_div(2).unwrap_or_default()
}

async fn within<T>(
    deadline: Duration,
    machine: &Machine,
    work: impl Future<Output = Result<T, BootError>>,
) -> Result<T, BootError> {
    match tokio::time::timeout(deadline, work).await {
        Ok(done) => done,
        Err(_) => Err(BootError::Deadline { milliseconds: deadline.as_millis(), console: console(machine) }),
    }
}

/// The muxer's callback as a future.
pub(super) async fn connect(connector: &Connector, port: u32, end: HostEnd) -> Result<u32, ConnectError> {
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
    fn a_start_does_not_wait_for_a_thread_that_is_held_up() {
        let (main, _work) = crate::main_thread::new();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let made = runtime.block_on(make(&main, Duration::from_millis(20), || unreachable!("nobody does the work")));
        let Err(error) = made else { panic!("it was made") };
        assert!(matches!(error, BootError::HeldUp { .. }), "{error}");
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
}
