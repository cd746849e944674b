//! What clients say over QMP, to a machine on the host's own KVM, byte by byte as they come. Skipped where there is no KVM.
//!
//! Clients name files and directories, so the machine and whoever serves it can write below one directory only.

#![no_main]

use std::fs::{self, File};
use std::io::{IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread;

use arbitrary::Arbitrary;
use inlay_fuzz::{leave_network, write_only_below};
use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Map, Value, json};
use vmm::config::SlotConfig;
use vmm::stratovirt::Inventory;
use vmm::stratovirt::qmp::{Front, commands};
use vmm::{BalloonConfig, BootConfig, Machine, MachineConfig, MemConfig, MemoryConfig};

/// Most bytes that a client can be told before it has read any: more is a reply that nothing bounds.
const MOST_HEARD: usize = 16 << 20;

const KEYS: [&str; 30] = [
    "id",
    "driver",
    "addr",
    "lun",
    "drive",
    "netdev",
    "chardev",
    "serial",
    "mac",
    "node-name",
    "file",
    "filename",
    "aio",
    "cache",
    "direct",
    "read-only",
    "throttling.iops-total",
    "backing",
    "ifname",
    "fd",
    "fds",
    "queues",
    "fdname",
    "value",
    "uri",
    "gpa",
    "requested-size",
    "typename",
    "option",
    "romfile",
];

const WORDS: [&str; 24] = [
    "disk",
    "disk2",
    "a",
    "b",
    "raw",
    "file",
    "host_device",
    "native",
    "threads",
    "io_uring",
    "off",
    "virtio-blk-mmio",
    "virtio-net-mmio",
    "tap",
    "tap0",
    "fd0",
    "fd0:fd0",
    "0x1",
    "3",
    "file:snapshot",
    "tcp:1.2.3.4:5",
    "52:54:00:12:34:56",
    "100000",
    "on",
];

#[derive(Arbitrary, Debug)]
enum Part {
    /// A request that may well be meant.
    Request { command: u8, arguments: Vec<(u8, Thing)>, id: Option<Thing> },
    /// Anything.
    Bytes(Vec<u8>),
    /// A descriptor, with the byte that it needs.
    Descriptor,
}

#[derive(Arbitrary, Debug)]
enum Thing {
    Word(u8),
    Number(i64),
    Bool(bool),
    Text(String),
    Null,
    List(Vec<Thing>),
    Object(Vec<(u8, Thing)>),
}

impl Thing {
    fn value(&self) -> Value {
        match self {
            Self::Word(index) => WORDS[usize::from(*index) % WORDS.len()].into(),
            Self::Number(number) => (*number).into(),
            Self::Bool(value) => (*value).into(),
            Self::Text(text) => text.as_str().into(),
            Self::Null => Value::Null,
            Self::List(things) => things.iter().map(Self::value).collect(),
            Self::Object(fields) => object(fields),
        }
    }
}

fn object(fields: &[(u8, Thing)]) -> Value {
    let fields = fields.iter().map(|(key, value)| (KEYS[usize::from(*key) % KEYS.len()].to_owned(), value.value()));
    Value::Object(fields.collect::<Map<_, _>>())
}

impl Part {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Request { command, arguments, id } => {
                let name = commands::COMMANDS[usize::from(*command) % commands::COMMANDS.len()].name;
                let mut request = json!({"execute": name});
                if !arguments.is_empty() {
                    request["arguments"] = object(arguments);
                }
                if let Some(id) = id {
                    request["id"] = id.value();
                }
                request.to_string().into_bytes()
            }
            Self::Bytes(bytes) => bytes.clone(),
            Self::Descriptor => b" ".to_vec(),
        }
    }
}

/// The thread that has the machine, and what it says when a client has been served.
type Worker = (Sender<Vec<Part>>, Receiver<()>);

static WORKER: LazyLock<Option<Mutex<Worker>>> = LazyLock::new(|| {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        println!("skipped: there is no /dev/kvm for this user");
        return None;
    }
    leave_network();
    let (send, parts) = channel();
    let (done, wait) = channel();
    thread::spawn(move || work(&parts, &done));
    Some(Mutex::new((send, wait)))
});

fn work(parts: &Receiver<Vec<Part>>, done: &Sender<()>) {
    let directory = tempfile::tempdir().expect("A directory");
    let place = directory.path().to_owned();
    // Relative names of files are below it.
    std::env::set_current_dir(&place).expect("A directory");
    for disk in ["disk", "disk2"] {
        File::create(place.join(disk)).and_then(|file| file.set_len(1 << 20)).expect("A disk");
    }
    // `jmp $`, where a flat kernel starts.
    fs::write(place.join("kernel"), [0xeb, 0xfe]).expect("A kernel");
    write_only_below(&place);
    let mut machine = build(&place);
    while let Ok(parts) = parts.recv() {
        if converse(&machine, &place, &parts) {
            machine = build(&place);
        }
        done.send(()).expect("The main thread");
    }
}

fn build(place: &Path) -> Arc<Machine> {
    let boot = BootConfig { kernel: place.join("kernel"), initrd: None, cmdline: String::new() };
    let mut config = MachineConfig::new("fuzz", MemoryConfig::from_mib(32), boot);
    config.slots = SlotConfig::STRATOVIRT;
    config.balloon = Some(BalloonConfig::default());
    config.pluggable = Some(MemConfig { size: 64 << 20, block_size: 2 << 20, requested: 0, node: 0 });
    Arc::new(Machine::build(config).expect("A machine"))
}

/// One client from its coming to its leaving; true when the machine has ended by it.
fn converse(machine: &Arc<Machine>, place: &Path, parts: &[Part]) -> bool {
    let socket: PathBuf = place.join("qmp");
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).expect("A socket");
    // A server of its own for each client: requests of a second are counted.
    let server = Front::new(Arc::clone(machine), Inventory::default()).serve(listener).expect("A server");
    let client = UnixStream::connect(&socket).expect("A client");
    for part in parts {
        let null = File::open("/dev/null").expect("/dev/null");
        let files = [null.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&files)];
        let rights: &[_] = if matches!(part, Part::Descriptor) { &rights } else { &[] };
        // The server hangs up on a client that goes too far.
        let _ = sendmsg::<()>(client.as_raw_fd(), &[IoSlice::new(&part.bytes())], rights, MsgFlags::MSG_NOSIGNAL, None);
    }
    let _ = client.shutdown(Shutdown::Write);
    let mut heard = Vec::new();
    let _ = (&client).take(MOST_HEARD as u64).read_to_end(&mut heard);
    assert!(heard.len() < MOST_HEARD, "The client was told too much");
    drop(server);
    let ended = machine.exit_reason().is_some();
    if !ended {
        // What it has plugged is not the next one's business.
        let plugged: Vec<_> = machine.slots().into_iter().filter_map(|slot| slot.occupant).collect();
        plugged.iter().for_each(|device| machine.unplug(device).expect("A device that is there"));
        let _ = machine.pause();
    }
    ended
}

fuzz_target!(|parts: Vec<Part>| {
    let Some(worker) = &*WORKER else { return };
    let (send, wait) = &*worker.lock().expect("No panic before");
    send.send(parts).expect("The worker");
    wait.recv().expect("The worker");
});
