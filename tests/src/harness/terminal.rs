//! A program on a terminal, and a dialogue with it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::pty::{Winsize, openpty};
use nix::unistd::setsid;

/// Runs `command` on a new terminal of the given size. Whenever the next `expected` text has come,
/// the text beside it is typed. Answers all that the program wrote, and how it ended.
pub fn converse(
    mut command: Command,
    (rows, columns): (u16, u16),
    dialogue: &[(&str, &str)],
    limit: Duration,
) -> Result<(String, ExitStatus)> {
    let started = Instant::now();
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None).context("Cannot open a terminal")?;
    let slave = File::from(pty.slave);
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave.try_clone()?);
    let fd = slave.as_raw_fd();
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing; the
    // descriptor is open until the command has been started.
    unsafe {
        command.pre_exec(move || {
            setsid()?;
            if libc::ioctl(fd, libc::TIOCSCTTY, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn().context("Cannot start")?;
    // The command holds copies of the slave; without them the master sees the program's end.
    drop(command);
    drop(slave);

    let mut master = File::from(pty.master);
    let output = read_on(master.try_clone()?);
    let mut seen = String::new();
    let mut scanned = 0;
    let mut dialogue = dialogue.iter();
    let mut next = dialogue.next();
    loop {
        while let Some((expected, answer)) = next
            && let Some(at) = seen[scanned..].find(expected)
        {
            scanned += at + expected.len();
            master.write_all(answer.as_bytes()).context("Cannot type")?;
            next = dialogue.next();
        }
        let left = limit.saturating_sub(started.elapsed());
        match output.recv_timeout(left) {
            Ok(piece) => seen.push_str(&String::from_utf8_lossy(&piece)),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                child.kill()?;
                child.wait()?;
                bail!("The dialogue stopped at {next:?} after {} s: {seen}", limit.as_secs());
            }
        }
    }
    Ok((seen, child.wait()?))
}

fn read_on(mut master: File) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut piece = [0; 4096];
        // A master answers EIO when the last process has left the terminal.
        while let Ok(size @ 1..) = master.read(&mut piece) {
            if sender.send(piece[..size].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dialogue() {
        let mut command = Command::new("sh");
        command.args(["-c", "stty size; printf 'name? '; read name; echo hello $name; exit 3"]);
        let (seen, status) = converse(command, (7, 40), &[("name? ", "Ann\n")], Duration::from_secs(20)).unwrap();
        assert!(seen.starts_with("7 40"), "{seen:?}");
        assert!(seen.contains("hello Ann"), "{seen:?}");
        assert_eq!(status.code(), Some(3));
    }
}
