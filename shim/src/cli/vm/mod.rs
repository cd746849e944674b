//! `inlay vm`, and the program called `stratovirt`: a machine with StratoVirt's command line.

mod daemon;
mod footprint;

use std::error::Error;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::IntoRawFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use seccomp::Confinement;
use tracing_subscriber::filter::LevelFilter;
use vmm::stratovirt::qmp::{Front, QmpServer};
use vmm::stratovirt::{CommandLine, Console, Launch, Request};
use vmm::{ExitReason, Machine};

/// Says how much is logged, as for StratoVirt: off, error, warn, info, debug or trace.
const LOG_LEVEL: &str = "STRATOVIRT_LOG_LEVEL";

/// Runs the machine that `words` describe, to its end; the program's name is not among them.
pub fn main(words: impl Iterator<Item = OsString>) -> ExitCode {
    match run(words) {
        Ok(code) => code,
        Err(error) => {
            complain(&*error);
            ExitCode::FAILURE
        }
    }
}

fn run(words: impl Iterator<Item = OsString>) -> Result<ExitCode, Box<dyn Error>> {
    let line = match CommandLine::parse(words)? {
        Request::Print(text) => {
            // Nobody reads it, if it cannot be written.
            let _ = writeln!(io::stdout(), "{}", text.trim_end());
            return Ok(ExitCode::SUCCESS);
        }
        Request::Run(line) => *line,
    };
    start_log(line.log.as_ref().map(Option::as_deref))?;
    let pidfile = line.pidfile.clone();
    // Before anything is opened and any thread started: neither outlives a fork whole.
    let daemon = if line.daemonize { Some(daemon::fork()?) } else { None };

    let log_is_seen = matches!(line.log, Some(None));
    let Launch { machine, incoming, input, monitors, inventory, freeze, sockets: _sockets } = Launch::open(line)?;
    confine(machine.confinement, log_is_seen)?;
    let machine = Arc::new(match incoming {
        Some(directory) => Machine::restore(machine, &directory)?,
        None => Machine::build(machine)?,
    });
    let _console = match input {
        Some(input) => Some(Console::start(Arc::clone(&machine), input)?),
        None => None,
    };
    let front = Front::new(Arc::clone(&machine), inventory);
    let servers = monitors.into_iter().map(|listener| front.serve(listener)).collect::<io::Result<Vec<_>>>()?;
    if let Some(daemon) = daemon {
        daemon.detach(pidfile.as_deref())?;
    }
    if !freeze {
        machine.start()?;
    }
    let reason = machine.wait_for(footprint::START).unwrap_or_else(|| {
        footprint::let_go_of_the_start();
        machine.wait()
    });
    // Its clients are told of the end.
    servers.into_iter().for_each(QmpServer::join);
    machine.stop();
    tracing::info!(%reason, "The machine has ended");
    Ok(match reason {
        ExitReason::Shutdown | ExitReason::Reset | ExitReason::Stopped => ExitCode::SUCCESS,
        ExitReason::Panicked(_)
        | ExitReason::TripleFault
        | ExitReason::VcpuError { .. }
        | ExitReason::MemoryLost(_) => {
            complain(&reason);
            ExitCode::FAILURE
        }
    })
}

/// Puts the process under its ceiling: what the command line names is open, and nothing has been made of it yet. Threads come
/// under it too, and have filters of their own on top.
fn confine(confinement: Confinement, log_is_seen: bool) -> Result<(), seccomp::ConfineError> {
    match confinement {
        Confinement::On => seccomp::confine_machine(),
        Confinement::Off => {
            // The log has the same, for whoever reads it.
            if !log_is_seen {
                let _ = writeln!(io::stderr(), "SECCOMP IS DISABLED: this process and its guest are not confined");
            }
            Ok(())
        }
    }
}

/// Prints an error with its causes as one line.
fn complain(error: &(dyn Error + 'static)) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    tracing::error!("{text}");
    // There is nobody to tell that standard error is gone.
    let _ = writeln!(io::stderr(), "{text}");
}

/// Logs to `target`: a file, or standard error where none is named; without `-D` nowhere.
fn start_log(target: Option<Option<&Path>>) -> io::Result<()> {
    let level = std::env::var(LOG_LEVEL).ok().and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::INFO);
    let log = tracing_subscriber::fmt().with_max_level(level).with_ansi(false);
    match target {
        None => {}
        Some(None) => log.with_writer(io::stderr).init(),
        Some(Some(path)) => {
            let file: File = OpenOptions::new().create(true).append(true).open(path).map_err(|error| {
                io::Error::new(error.kind(), format!("Cannot open the log {}: {error}", path.display()))
            })?;
            // Standard error is gone when the process is a daemon. The descriptor stays open as long as the process.
            seccomp::report_to(file.try_clone()?.into_raw_fd());
            log.with_writer(Mutex::new(file)).init();
        }
    }
    Ok(())
}
