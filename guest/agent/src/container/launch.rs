//! Starting the helper that makes a process, and hearing from it.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Pid, pipe2};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

use super::{Error, failed};
use crate::helper::{self, Report};
use crate::reaper::{Exit, Reaper, ended};
use crate::stdio::ProcessEnds;

/// A report is a number or a sentence; more than this is not read.
const MAX_REPORT: usize = 64 << 10;

/// A process that the helper made.
pub struct Launched {
    /// Its number.
    pub pid: Pid,
    /// Its end.
    pub exit: Exit,
    /// Its way to its program.
    pub program: Program,
}

/// Ends when a process has become its program, or has ended without. The process holds the other end of this pipe,
/// which the kernel closes at the exec.
pub struct Program(Receiver);

impl Program {
    /// Waits for that.
    pub async fn begun(mut self) {
        // Nothing is written after the report; whatever the read says, there is no more to wait for.
        let _ = self.0.read_u8().await;
    }
}

/// Makes a process by the helper: `verb` and `name` as in [`crate::helper`].
pub async fn launch(
    reaper: &Reaper,
    verb: &str,
    directory: &Path,
    name: &str,
    ends: ProcessEnds,
) -> Result<Launched, Error> {
    let at_work = reaper.helper_at_work();
    let (report, helper_exit) = spawn(reaper, verb, directory, name, ends).map_err(failed("Starting the helper"))?;
    let mut report = Receiver::from_owned_fd(report).map_err(failed("Reading the helper's report"))?;
    let mut line = Vec::new();
    // The report ends with a newline, not with the end of the pipe: a helper that was killed may leave children that
    // hold it open. So its end is waited for as well, and then what is in the pipe is all there will be.
    tokio::select! {
        biased;
        read = read_line(&mut report, &mut line) => read.map_err(failed("Reading the helper's report"))?,
        _ = ended(helper_exit) => drain(&report, &mut line),
    }
    let pid = match serde_json::from_slice(&line) {
        Ok(Report::Pid(pid)) => Pid::from_raw(pid),
        Ok(Report::Error(text)) => return Err(Error::Process(text)),
        Err(_) => return Err(Error::Process("the helper ended without a word".to_owned())),
    };
    let exit = reaper.watch(pid);
    drop(at_work);
    Ok(Launched { pid, exit, program: Program(report) })
}

async fn read_line(report: &mut Receiver, line: &mut Vec<u8>) -> io::Result<()> {
    while line.last() != Some(&b'\n') && line.len() < MAX_REPORT {
        if report.read_buf(line).await? == 0 {
            break;
        }
    }
    Ok(())
}

/// Reads what is in the pipe now. By the system call itself: the runtime's own non-blocking read answers "nothing there"
/// until it has seen the pipe's event, and the helper's end may be seen before that.
fn drain(report: &Receiver, line: &mut Vec<u8>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = nix::unistd::read(report, &mut buffer) {
        line.extend_from_slice(buffer.get(..count).unwrap_or_default());
    }
}

fn spawn(
    reaper: &Reaper,
    verb: &str,
    directory: &Path,
    name: &str,
    ProcessEnds([stdin, stdout, stderr]): ProcessEnds,
) -> io::Result<(OwnedFd, Exit)> {
    fs::create_dir_all(helper::STATE_ROOT)?;
    let (report, helper_report) = pipe2(OFlag::O_CLOEXEC)?;
    // The one descriptor that is to survive the exec. Nothing else can inherit it: the agent starts programs on one
    // thread only, and this copy is closed before that thread does anything else.
    let inherited = fcntl(&helper_report, FcntlArg::F_DUPFD(0))?;
    // SAFETY: F_DUPFD just made this descriptor for us.
    let inherited = unsafe { OwnedFd::from_raw_fd(inherited) };
    // The second is for an agent that did not boot the machine it runs on.
    let program = [helper::PROGRAM, "/proc/self/exe"].into_iter().find(|path| Path::new(path).exists());
    let child = Command::new(program.unwrap_or(helper::PROGRAM))
        .arg(helper::VERB)
        .arg(verb)
        .arg(inherited.as_raw_fd().to_string())
        .arg(directory)
        .arg(name)
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::from(stdout))
        .stderr(Stdio::from(stderr))
        .spawn()?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    Ok((report, reaper.watch(Pid::from_raw(pid))))
}
