//! A program's run: wall clock, processor time, what it printed.

use std::io::{self, Read};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// One run of a program.
#[derive(Debug, Clone)]
pub struct Run {
    /// From before its start until its parent learnt of its end.
    pub wall: Duration,
    /// User and system time.
    pub cpu: Duration,
    /// Standard output.
    pub output: String,
    /// Whether it ended with status 0.
    pub success: bool,
}

/// Runs `command` to its end.
pub fn run(command: &mut Command) -> io::Result<Run> {
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut output = String::new();
    if let Some(stdout) = child.stdout.as_mut() {
        stdout.read_to_string(&mut output)?;
    }
    let (status, cpu) = wait(child.id().cast_signed())?;
    Ok(Run { wall: start.elapsed(), cpu, output, success: status == 0 })
}

/// Reaps the child and returns its wait status and processor time.
fn wait(pid: libc::pid_t) -> io::Result<(i32, Duration)> {
    let mut status = 0;
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: both pointers are to variables that live through the call.
    let reaped = unsafe { libc::wait4(pid, &mut status, 0, usage.as_mut_ptr()) };
    if reaped != pid {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zero is a valid rusage, and the call has filled it.
    let usage = unsafe { usage.assume_init() };
    let duration = |time: libc::timeval| {
        let microseconds = time.tv_sec * 1_000_000 + time.tv_usec;
        Duration::from_micros(microseconds.cast_unsigned())
    };
    Ok((status, duration(usage.ru_utime) + duration(usage.ru_stime)))
}
