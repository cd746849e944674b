//! Conversations over QMP as they go, word for word but for what differs from run to run: `transcripts/` has what a client
//! sends (`->`), what it hears (`<-`), and what it is about (`#`).
//!
//! `INLAY_UPDATE_DOCS=1` writes what was heard into the files.

mod support;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use support::Code;
use vmm::Machine;
use vmm::stratovirt::launch::Sockets;
use vmm::stratovirt::qmp::{Front, QmpServer, commands};
use vmm::stratovirt::{CommandLine, Inventory, Launch, Request};

/// What a client of StratoVirt's test suite reads at once.
const READ_AT_ONCE: usize = 1024;

/// Keys whose values differ from run to run, from host to host, or from release to release.
const VARYING: [&str; 6] = ["seconds", "microseconds", "thread_id", "thread-id", "package", "memaddr"];

/// A machine of two processors that spin, made of `words`, and where its QMP socket is.
fn host(words: &[&str]) -> (TempDir, UnixStream, impl Drop) {
    let directory = tempfile::tempdir().expect("directory");
    for disk in ["disk", "disk2"] {
        File::create(directory.path().join(disk)).and_then(|file| file.set_len(1 << 20)).expect("disk");
    }
    let kernel = directory.path().join("kernel");
    fs::write(&kernel, support::elf(Code::new().spin().as_bytes(), true)).expect("kernel");
    let place = directory.path().to_str().expect("UTF-8").to_owned();
    let common = ["-kernel", "DIR/kernel", "-smp", "2", "-m", "128"];
    let words = common.iter().chain(words).map(|word| word.replace("DIR", &place).into());
    let Ok(Request::Run(line)) = CommandLine::parse(words) else { panic!("a command line") };
    let Launch { machine, inventory, sockets, .. } = Launch::open(*line).expect("opened");
    let machine = Arc::new(Machine::build(machine).expect("build"));
    let server = serve(&machine, inventory, &directory.path().join("qmp"));
    machine.start().expect("start");
    let client = UnixStream::connect(directory.path().join("qmp")).expect("connect");
    client.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    (directory, client, Running(Some(server), machine, sockets))
}

fn serve(machine: &Arc<Machine>, inventory: Inventory, path: &Path) -> QmpServer {
    let listener = UnixListener::bind(path).expect("bind");
    Front::new(Arc::clone(machine), inventory).serve(listener).expect("serve")
}

struct Running(Option<QmpServer>, Arc<Machine>, #[allow(dead_code)] Sockets);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.take());
        self.1.stop();
    }
}

/// The lines that a client hears, read as StratoVirt's clients do.
struct Lines {
    client: UnixStream,
    heard: String,
}

impl Lines {
    /// `None` at the end of the connection.
    fn next(&mut self) -> Option<Value> {
        let mut bytes = [0; READ_AT_ONCE];
        loop {
            if let Some((line, rest)) = self.heard.split_once("\r\n") {
                assert!(!line.contains('\n'), "{line}");
                let message = serde_json::from_str(line).expect("JSON");
                self.heard = rest.to_owned();
                return Some(message);
            }
            let count = self.client.read(&mut bytes).expect("a message");
            if count == 0 {
                assert_eq!(self.heard, "");
                return None;
            }
            self.heard += std::str::from_utf8(&bytes[..count]).expect("UTF-8");
        }
    }
}

/// Replaces what varies.
fn mask(message: &mut Value, place: &str) {
    match message {
        Value::Object(fields) => {
            for (name, value) in fields {
                if VARYING.contains(&name.as_str()) && *value != 0 {
                    *value = Value::from("*");
                } else {
                    mask(value, place);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| mask(item, place)),
        Value::String(text) => *text = text.replace(place, "DIR"),
        _ => {}
    }
}

/// Plays the client of a transcript, and compares what it hears.
fn play(name: &str, words: &[&str]) {
    let path = format!("{}/tests/transcripts/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    let script = fs::read_to_string(&path).expect("a transcript");
    let (directory, client, running) = host(words);
    let place = directory.path().to_str().expect("UTF-8").to_owned();
    let mut lines = Lines { client, heard: String::new() };
    let mut played = String::new();
    let hear = |lines: &mut Lines, played: &mut String| -> Option<bool> {
        let mut message = lines.next()?;
        let is_event = message.get("event").is_some();
        mask(&mut message, &place);
        writeln!(played, "<- {message}").expect("text");
        Some(is_event)
    };
    let mut script_lines = script.lines().peekable();
    while let Some(line) = script_lines.next() {
        match line.split_once(' ') {
            _ if line.starts_with('#') || line.is_empty() => writeln!(played, "{line}").expect("text"),
            // Told without being asked for, or once more; those that are expected are in the file.
            Some(("<-", _)) => {}
            Some(("->", request)) => {
                writeln!(played, "{line}").expect("text");
                lines.client.write_all(request.replace("DIR", &place).as_bytes()).expect("write");
                // The reply, and then the events that the file has.
                while hear(&mut lines, &mut played) == Some(true) {}
                let expected = script_lines.clone().take_while(|line| line.starts_with("<-"));
                for _ in expected.filter(|line| line.contains(r#""event":"#)) {
                    assert_eq!(hear(&mut lines, &mut played), Some(true), "{played}");
                }
            }
            Some(("=>", "connected")) => {
                writeln!(played, "{line}").expect("text");
                assert_eq!(hear(&mut lines, &mut played), Some(false));
            }
            Some(("=>", "closed")) => {
                writeln!(played, "{line}").expect("text");
                assert_eq!(hear(&mut lines, &mut played), None, "{played}");
            }
            _ => panic!("{line}"),
        }
    }
    if std::env::var_os("INLAY_UPDATE_DOCS").is_some() {
        fs::write(&path, &played).expect("write");
    }
    // Nothing else was said.
    drop(running);
    while lines.next().is_some_and(|message| {
        assert_eq!(message["event"], "SHUTDOWN", "{message}");
        true
    }) {}
    assert_eq!(played, script, "INLAY_UPDATE_DOCS=1 writes what was heard to {path}");
}

/// No command is left out of the files.
#[test]
fn each_command_is_in_a_transcript() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/transcripts");
    let files = fs::read_dir(directory).expect("transcripts").map(|file| file.expect("a file").path());
    let said: String = files.map(|path| fs::read_to_string(path).expect("a transcript")).collect();
    for command in commands::COMMANDS {
        assert!(said.contains(&format!(r#"-> {{"execute":"{}""#, command.name)), "{}", command.name);
    }
}

#[test]
fn stratovirts_own_conversation() {
    need_kvm!();
    play("conversation", &[]);
}

#[test]
fn what_is_told_about_a_machine() {
    need_kvm!();
    play(
        "queries",
        &[
            "-drive",
            "id=root,file=DIR/disk,readonly=on,direct=off",
            "-device",
            "virtio-blk-device,drive=root,id=blk0,serial=s",
            "-object",
            "iothread,id=io1",
            "-chardev",
            "file,id=log,path=DIR/log",
            "-serial",
            "chardev:log",
            "-device",
            "virtio-balloon-device,id=balloon0",
            "-object",
            "memory-backend-ram,id=more,size=64M",
            "-device",
            "virtio-mem-device,id=mem0,memdev=more,requested-size=0",
        ],
    );
}

#[test]
fn drives_and_interfaces_that_come_and_go() {
    need_kvm!();
    play("devices", &[]);
}

#[test]
fn what_is_refused() {
    need_kvm!();
    play("refusals", &[]);
}

#[test]
fn a_machine_that_is_powered_down() {
    need_kvm!();
    play("powerdown", &[]);
}

#[test]
fn a_machine_that_is_reset() {
    need_kvm!();
    play("reset", &[]);
}
