//! One command in one nested host: starts the host, passes output on, tells how it ended.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use thiserror::Error;

use super::channel::{Frame, Request};
use super::image::Image;
use super::qemu::{Qemu, Shape};
use super::signals;

/// A nested host that has not said hello by then never will. Boots take 5 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// A nested host that has been silent for so long has stopped. It beats every second.
const SILENCE_LIMIT: Duration = Duration::from_secs(90);

/// How often to look for signals and for the end of QEMU.
const LOOK: Duration = Duration::from_millis(100);

/// The nested host failed, not what ran in it. The reasons that a run may be tried again.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum HostFailure {
    /// Its kernel panicked; the first line that says why.
    #[error("The nested host's kernel panicked: {0}")]
    Panicked(String),
    /// It never came up.
    #[error("The nested host did not boot in {} s", BOOT_LIMIT.as_secs())]
    NoBoot,
    /// Its clock stands still.
    #[error("The nested host was silent for {} s", SILENCE_LIMIT.as_secs())]
    Stopped,
    /// QEMU ended before the command did, and the console does not say why.
    #[error("QEMU ended early with {0}")]
    QemuEnded(ExitStatus),
}

impl HostFailure {
    /// The class's name in summaries.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Panicked(_) => "kernel panic",
            Self::NoBoot => "no boot",
            Self::Stopped => "stopped",
            Self::QemuEnded(_) => "QEMU ended",
        }
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// The command ended with this code.
    Exited(i32),
    /// The command did not end in time.
    TimedOut,
    /// The host failed under the command.
    HostFailed(HostFailure),
    /// We were asked to end by this signal.
    Interrupted(i32),
}

/// Takes the command's output as it comes.
pub trait Output {
    /// A piece of standard output.
    fn stdout(&mut self, piece: &[u8]) -> io::Result<()>;
    /// A piece of standard error.
    fn stderr(&mut self, piece: &[u8]) -> io::Result<()>;
}

/// A run's ending and its times.
#[derive(Debug)]
pub struct Run {
    /// How it ended.
    pub ending: Ending,
    /// From the start of QEMU to the host's hello.
    pub boot: Option<Duration>,
    /// From the start of QEMU to the end.
    pub wall: Duration,
}

/// Runs one command in a nested host of its own. Console and logs are left in `artefacts`.
pub fn run(
    shape: &Shape,
    image: &Image,
    request: &Request,
    limit: Duration,
    artefacts: &Path,
    output: &mut dyn Output,
) -> Result<Run> {
    let started = Instant::now();
    fs::create_dir_all(artefacts).with_context(|| format!("Cannot create {}", artefacts.display()))?;
    let (mut qemu, channel) = Qemu::start(shape, image, artefacts)?;
    let frames = listen(channel.try_clone()?);
    let mut watch = Watch { started, boot: None, heard: started, limit };
    let ending = loop {
        match frames.recv_timeout(LOOK) {
            Ok(frame) => {
                watch.heard = Instant::now();
                match frame {
                    Frame::Hello => {
                        watch.boot = Some(started.elapsed());
                        Frame::Request(request.clone()).write(&mut &channel).context("Cannot send the request")?;
                    }
                    Frame::Stdout(piece) => output.stdout(&piece).context("Cannot write standard output")?,
                    Frame::Stderr(piece) => output.stderr(&piece).context("Cannot write standard error")?,
                    Frame::Exit(code) => break Ending::Exited(code),
                    Frame::Beat(_) | Frame::Request(_) => {}
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            // QEMU is ending: its status comes in a moment.
            Err(RecvTimeoutError::Disconnected) => thread::sleep(LOOK),
        }
        if let Some(status) = qemu.ended() {
            break Ending::HostFailed(why(status, artefacts));
        }
        if let Some(ending) = watch.over() {
            break ending;
        }
    };
    if matches!(ending, Ending::HostFailed(HostFailure::Stopped | HostFailure::NoBoot)) {
        fs::write(artefacts.join("processors.log"), qemu.inspect()).context("Cannot keep what the processors do")?;
    }
    drop(qemu);
    Ok(Run { ending, boot: watch.boot, wall: started.elapsed() })
}

struct Watch {
    started: Instant,
    boot: Option<Duration>,
    heard: Instant,
    limit: Duration,
}

impl Watch {
    fn over(&self) -> Option<Ending> {
        if let Some(signal) = signals::caught() {
            Some(Ending::Interrupted(signal))
        } else if self.boot.is_none() {
            (self.started.elapsed() > BOOT_LIMIT).then_some(Ending::HostFailed(HostFailure::NoBoot))
        } else if self.heard.elapsed() > SILENCE_LIMIT {
            Some(Ending::HostFailed(HostFailure::Stopped))
        } else {
            (self.started.elapsed() > self.limit).then_some(Ending::TimedOut)
        }
    }
}

fn listen(mut channel: UnixStream) -> Receiver<Frame> {
    let (sender, receiver) = mpsc::sync_channel(64);
    thread::spawn(move || {
        while let Ok(frame) = Frame::read(&mut channel) {
            if sender.send(frame).is_err() {
                break;
            }
        }
    });
    receiver
}

/// QEMU has ended by itself: the console tells whether the kernel's panic was the reason.
fn why(status: ExitStatus, artefacts: &Path) -> HostFailure {
    let console = fs::read(artefacts.join("console.log")).unwrap_or_default();
    match panic_line(&String::from_utf8_lossy(&console)) {
        Some(line) => HostFailure::Panicked(line),
        None => HostFailure::QemuEnded(status),
    }
}

/// The first line that tells of a panic's cause.
fn panic_line(console: &str) -> Option<String> {
    const SIGNS: &[&str] = &["BUG: ", "Oops: ", "stack guard page was hit", "general protection fault", "Kernel panic"];
    let line = console.lines().find(|line| SIGNS.iter().any(|sign| line.contains(sign)))?;
    let text = line.split_once("] ").map_or(line, |(_, text)| text);
    Some(text.trim().to_owned())
}

/// The end of the console, for a person who reads why a run failed.
pub fn console_tail(artefacts: &Path, lines: usize) -> String {
    let console = fs::read(artefacts.join("console.log")).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    let all: Vec<&str> = console.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_comes_before_the_panic() {
        let console = "[    9.1] BUG: TASK stack guard page was hit at 0 (stack is 0..1)\n[    9.2] Kernel panic - not syncing: Fatal\n";
        assert_eq!(panic_line(console).unwrap(), "BUG: TASK stack guard page was hit at 0 (stack is 0..1)");
        assert_eq!(panic_line("[ 1.0] all is well\n"), None);
    }
}
