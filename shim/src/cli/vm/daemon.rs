//! `-daemonize`: the process that runs the machine leaves the terminal, and the one that was called reports how its start
//! went.

use std::error::Error;
use std::fs::{self, OpenOptions};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::path::Path;
use std::process;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{self, ForkResult};

/// What the pipe says when the machine is built; nothing but its end says that it never will be.
const BUILT: u8 = 1;

/// The process that runs the machine, not yet detached.
pub struct Daemon {
    built: PipeWriter,
}

/// Forks. Returns in the new process only: this one waits for it, and ends as its start does.
pub fn fork() -> Result<Daemon, Box<dyn Error>> {
    let (reader, built) = io::pipe()?;
    // SAFETY: no thread has been started, so the new process has all that this one has.
    match unsafe { unistd::fork() }? {
        ForkResult::Child => {
            drop(reader);
            unistd::setsid()?;
            Ok(Daemon { built })
        }
        ForkResult::Parent { child } => {
            drop(built);
            process::exit(if says_built(reader) { 0 } else { exit_status(child) })
        }
    }
}

fn says_built(mut reader: PipeReader) -> bool {
    let mut byte = [0];
    matches!(reader.read(&mut byte), Ok(1)) && byte == [BUILT]
}

/// The status of a process that ends without a machine, after it has said why on standard error.
fn exit_status(child: unistd::Pid) -> i32 {
    match waitpid(child, None) {
        Ok(WaitStatus::Exited(_, status)) if status != 0 => status,
        _ => 1,
    }
}

impl Daemon {
    /// Writes the process's id to `pidfile`, lets go of standard input, output and error, and of the waiting process.
    pub fn detach(mut self, pidfile: Option<&Path>) -> io::Result<()> {
        if let Some(path) = pidfile {
            fs::write(path, format!("{}\n", process::id())).map_err(|error| {
                io::Error::new(error.kind(), format!("Cannot write the process's id to {}: {error}", path.display()))
            })?;
        }
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        unistd::dup2_stdin(&null)?;
        unistd::dup2_stdout(&null)?;
        unistd::dup2_stderr(&null)?;
        self.built.write_all(&[BUILT])
    }
}
