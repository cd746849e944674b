//! The program called `stratovirt` in a directory of its own, with guests of a few bytes.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

pub const SERIAL: u16 = 0x3f8;
pub const LINE_STATUS: u16 = 0x3fd;
pub const EXIT: u16 = 0x505;
pub const SHUTDOWN: u8 = 4;
pub const PANICKED: u8 = 1;
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A guest as a flat kernel: machine code that means the same in 32-bit and 64-bit mode.
#[derive(Clone, Default)]
pub struct Guest(pub Vec<u8>);

impl Guest {
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// `mov dx, port; mov al, value; out dx, al`
    pub fn out(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |guest, byte| guest.out(SERIAL, byte))
    }

    /// Waits for a byte of input, and writes it back: `mov dx, 0x3fd; in al, dx; test al, 1; jz -5; mov dx, 0x3f8;
    /// in al, dx; out dx, al`
    pub fn echo(self) -> Self {
        let [low, high] = LINE_STATUS.to_le_bytes();
        let guest = self.bytes(&[0x66, 0xba, low, high, 0xec, 0xa8, 0x01, 0x74, 0xfb]);
        let [low, high] = SERIAL.to_le_bytes();
        guest.bytes(&[0x66, 0xba, low, high, 0xec, 0xee])
    }

    /// Ends the machine by `how`: `jmp $` after it.
    pub fn end(self, how: u8) -> Self {
        self.out(EXIT, how).bytes(&[0xeb, 0xfe])
    }
}

pub struct Host {
    pub root: tempfile::TempDir,
}

impl Host {
    pub fn new(guest: &Guest) -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("kernel"), &guest.0).unwrap();
        Self { root }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = stratovirt();
        command
            .current_dir(self.root.path())
            .args(["-machine", "microvm", "-m", "128", "-kernel", "kernel"])
            .args(words);
        command.stdin(Stdio::null());
        command
    }

    pub fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }
}

pub fn stratovirt() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_inlay"));
    command.arg0("/usr/bin/stratovirt").env_remove("STRATOVIRT_LOG_LEVEL");
    command
}

pub fn kvm() -> bool {
    let there = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        println!("skipped: this host has no /dev/kvm");
    }
    there
}

/// Waits for a condition of the outside world, at most [`PATIENCE`].
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "{what} has not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
