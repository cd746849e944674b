//! A guest's shell on its serial console: the host's end of `guest/tools/init`.

use std::cell::Cell;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// A guest that has just booted says this.
const READY: u32 = 0;

/// What a line of the console's may have in the guest (`N_TTY_BUF_SIZE`), less a number and its end.
const MAX_LINE: usize = 4000;

/// What a guest's command answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// Its exit code.
    pub code: i32,
    /// Standard output and error together.
    pub output: String,
}

/// A console that commands go in at.
pub struct Console {
    stream: UnixStream,
    lines: Receiver<String>,
    transcript: Arc<Mutex<String>>,
    number: Cell<u32>,
}

impl Console {
    /// Talks over `stream`, the console's socket.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        let (sender, lines) = mpsc::channel();
        let transcript = Arc::new(Mutex::new(String::new()));
        let (mut from, kept) = (stream.try_clone()?, Arc::clone(&transcript));
        // Ends with the machine. It reads on while nobody waits: the console throws away what is not read.
        thread::spawn(move || {
            let mut unfinished = Vec::new();
            let mut piece = [0; 4096];
            while let Ok(size @ 1..) = from.read(&mut piece) {
                kept.lock().unwrap_or_else(PoisonError::into_inner).push_str(&String::from_utf8_lossy(&piece[..size]));
                unfinished.extend_from_slice(&piece[..size]);
                while let Some(end) = unfinished.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = unfinished.drain(..=end).collect();
                    let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
                }
            }
        });
        Ok(Self { stream, lines, transcript, number: Cell::new(READY) })
    }

    /// Waits until the guest listens.
    pub fn wait_ready(&self, limit: Duration) -> Result<()> {
        self.answer(READY, limit).map(|_| ())
    }

    /// Runs a shell command in the guest, to its end.
    pub fn run(&self, command: &str, limit: Duration) -> Result<Said> {
        let number = self.number.get() + 1;
        self.number.set(number);
        let line = format!("{number} {}\n", BASE64_STANDARD.encode(command));
        ensure!(line.len() <= MAX_LINE, "The command is too long for a line of the console: {command}");
        (&self.stream).write_all(line.as_bytes()).context("The console takes no more input")?;
        self.answer(number, limit).with_context(|| format!("The guest was asked to run: {command}"))
    }

    /// All that the guest has said.
    pub fn transcript(&self) -> String {
        self.transcript.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn answer(&self, number: u32, limit: Duration) -> Result<Said> {
        let deadline = Instant::now() + limit;
        let begin = format!("<{number} ");
        loop {
            let line = match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => bail!("The guest says nothing in {} s", limit.as_secs()),
                Err(RecvTimeoutError::Disconnected) => bail!("The console has ended"),
            };
            // A line that the kernel began may stand before it.
            let Some(answer) =
                line.find(&begin).and_then(|start| line[start + begin.len()..].trim_end().strip_suffix('>'))
            else {
                continue;
            };
            let (code, output) = answer.split_once(' ').context("The guest's answer has no output")?;
            let output =
                BASE64_STANDARD.decode(output).with_context(|| format!("The guest's answer is damaged: {line}"))?;
            return Ok(Said { code: code.parse()?, output: String::from_utf8_lossy(&output).into_owned() });
        }
    }
}
