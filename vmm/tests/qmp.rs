//! QMP as its clients speak it, with a machine behind it.

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tempfile::{NamedTempFile, TempDir};

use support::Code;
use vmm::config::SlotConfig;
use vmm::stratovirt::Inventory;
use vmm::stratovirt::qmp::{Front, QmpServer, commands};
use vmm::{BalloonConfig, ExitReason, Machine};

/// A machine of StratoVirt's kind, its server and where that listens.
struct Host {
    machine: Arc<Machine>,
    server: QmpServer,
    directory: TempDir,
    _kernel: NamedTempFile,
}

impl Host {
    fn start(code: Code) -> Self {
        let host = Self::frozen(code);
        host.machine.start().expect("start");
        host
    }

    /// With processors that wait for `cont`.
    fn frozen(code: Code) -> Self {
        let kernel = code.pvh();
        let mut config = support::config(kernel.path());
        config.slots = SlotConfig::STRATOVIRT;
        config.balloon = Some(BalloonConfig::default());
        let machine = Arc::new(Machine::build(config).expect("build"));
        let directory = tempfile::tempdir().expect("directory");
        let listener = UnixListener::bind(directory.path().join("qmp")).expect("bind");
        let server = Front::new(Arc::clone(&machine), Inventory::default()).serve(listener).expect("serve");
        Self { machine, server, directory, _kernel: kernel }
    }

    fn connect(&self) -> UnixStream {
        let client = UnixStream::connect(self.directory.path().join("qmp")).expect("connect");
        client.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        client
    }

    fn client(&self) -> Client {
        let mut client = Client(BufReader::new(self.connect()));
        let greeting = client.next().expect("greeting");
        assert_eq!(greeting["QMP"]["version"]["qemu"], json!({"micro": 1, "minor": 0, "major": 5}));
        assert_eq!(client.call(json!({"execute": "qmp_capabilities"})), json!({"return": {}}));
        client
    }

    fn disk(&self, name: &str) -> String {
        let path = self.directory.path().join(name);
        File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("disk");
        path.to_str().expect("UTF-8").into()
    }
}

struct Client(BufReader<UnixStream>);

impl Client {
    /// The next reply or event, each of which is one line; `None` at the end.
    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("read");
        if line.is_empty() {
            return None;
        }
        assert!(line.ends_with("\r\n"), "{line:?}");
        Some(serde_json::from_str(&line).expect("JSON"))
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).expect("write");
    }

    /// Sends a request and returns its reply, which nothing comes before.
    fn call(&mut self, request: Value) -> Value {
        self.send(request.to_string().as_bytes());
        let reply = self.next().expect("a reply");
        assert!(reply.get("event").is_none(), "{reply}");
        reply
    }

    /// The next event, without its time.
    fn event(&mut self) -> Value {
        let mut event = self.next().expect("an event");
        let stamp = event.as_object_mut().and_then(|event| event.remove("timestamp")).expect("a time");
        assert!(stamp["seconds"].as_u64() > Some(1_600_000_000) && stamp["microseconds"].as_u64() < Some(1_000_000));
        event
    }

    fn fails(&mut self, request: Value) -> String {
        let reply = self.call(request);
        assert!(reply["error"]["desc"].as_str().is_some_and(|desc| !desc.is_empty()), "{reply}");
        reply["error"]["class"].as_str().expect("a class").into()
    }
}

fn ok() -> Value {
    json!({"return": {}})
}

#[test]
fn every_command_is_answered() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let mut client = host.client();
    let listed = client.call(json!({"execute": "query-commands"}));
    let names: Vec<_> =
        listed["return"].as_array().expect("a list").iter().map(|entry| entry["name"].clone()).collect();
    assert_eq!(names.len(), commands::COMMANDS.len());
    for command in commands::COMMANDS {
        assert!(names.contains(&json!(command.name)));
        if ["quit", "system_reset", "system_powerdown"].contains(&command.name) {
            continue;
        }
        // Both are told of, at another place.
        if ["stop", "cont"].contains(&command.name) {
            continue;
        }
        // Some need arguments, and then say so; none is unknown, and each echoes its identifier.
        let reply = client.call(json!({"execute": command.name, "id": command.name}));
        assert_eq!(reply["id"], command.name);
        let refused = command.standing == commands::Standing::Refused;
        match reply.get("error") {
            Some(error) => assert!(error["class"] == "GenericError" || error["class"] == "DeviceNotActive", "{reply}"),
            None => assert!(!refused && reply.get("return").is_some(), "{reply}"),
        }
    }
    for (name, expected) in [
        ("query-kvm", json!({"enabled": true, "present": true})),
        ("query-target", json!({"arch": "x86_64"})),
        ("query-migrate", json!({"status": "none"})),
        ("query-balloon", json!({"actual": 128 << 20})),
    ] {
        assert_eq!(client.call(json!({"execute": name})), json!({"return": expected}), "{name}");
    }
    let cpus = client.call(json!({"execute": "query-cpus"}));
    assert_eq!(
        cpus["return"],
        json!([{
            "current": true, "qom_path": "/machine/unattached/device[0]", "halted": false, "arch": "x86", "CPU": 0,
            "props": {"socket-id": 0, "die_id": 0, "core-id": 0, "thread-id": 0}, "thread_id": host.machine.vcpu_thread_ids()[0],
        }])
    );
}

#[test]
fn stop_and_cont_alternate_and_tell() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let mut client = host.client();
    let event = |name: &str| json!({"event": name, "data": {}});
    let status = |running, status: &str| json!({"return": {"running": running, "singlestep": false, "status": status}});
    for _ in 0..3 {
        assert_eq!(client.call(json!({"execute": "stop"})), ok());
        assert_eq!(client.event(), event("STOP"));
        assert_eq!(client.fails(json!({"execute": "stop"})), "GenericError");
        assert_eq!(client.call(json!({"execute": "query-status"})), status(false, "paused"));
        assert_eq!(client.call(json!({"execute": "cont"})), ok());
        assert_eq!(client.event(), event("RESUME"));
        assert_eq!(client.fails(json!({"execute": "cont"})), "GenericError");
        assert_eq!(client.call(json!({"execute": "query-status"})), status(true, "running"));
    }
}

#[test]
fn quit_is_answered_and_then_the_machine_ends() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let mut client = host.client();
    assert_eq!(client.call(json!({"execute": "quit", "id": 1})), json!({"return": {}, "id": 1}));
    let event = client.next().expect("an event");
    assert_eq!(event["event"], "SHUTDOWN");
    assert_eq!(event["data"], json!({"guest": false, "reason": "host-qmp-quit"}));
    assert_eq!(client.next(), None);
    host.server.join();
    assert_eq!(host.machine.exit_reason(), Some(ExitReason::Stopped));
}

#[test]
fn the_end_of_the_guest_is_told() {
    need_kvm!();
    let host = Host::frozen(Code::new().out(support::I8042_PORT, 0xfe).halt());
    let mut client = host.client();
    assert_eq!(client.call(json!({"execute": "query-status"}))["return"]["status"], "paused");
    assert_eq!(client.call(json!({"execute": "cont"})), ok());
    let mut told = Vec::new();
    while let Some(event) = client.next() {
        told.push((event["event"].clone(), event["data"].clone()));
    }
    assert_eq!(told.remove(0).0, "RESUME");
    let shutdown = (json!("SHUTDOWN"), json!({"guest": true, "reason": "guest-reset"}));
    assert_eq!(told, [(json!("RESET"), json!({"guest": true})), shutdown]);
    host.server.join();
}

#[test]
fn an_end_from_outside_is_told() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let mut client = host.client();
    host.machine.stop();
    let event = client.next().expect("an event");
    assert_eq!((&event["event"], &event["data"]["reason"]), (&json!("SHUTDOWN"), &json!("host-signal")));
    host.server.join();
}

#[test]
fn drives_are_swapped_ten_times_in_both_spellings() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let mut client = host.client();
    for round in 0..10 {
        let id = format!("disk{round}");
        let path = host.disk(&id);
        let node = json!({"execute": "blockdev-add", "arguments": {
            "node-name": id, "driver": "raw", "read-only": false, "file": {"driver": "file", "filename": path, "aio": "native"},
        }});
        assert_eq!(client.call(node), ok());
        let mut device = json!({"id": id, "driver": "virtio-blk-mmio", "addr": "0x1"});
        if round % 2 == 1 {
            device["drive"] = json!(id);
            device["romfile"] = json!("");
            device["addr"] = json!("1");
        }
        assert_eq!(client.call(json!({"execute": "device_add", "arguments": device})), ok());
        assert_eq!(host.machine.slots()[1].occupant.as_deref(), Some(id.as_str()));
        let del = json!({"execute": "device_del", "arguments": {"id": id}});
        let deleted = json!({"event": "DEVICE_DELETED", "data": {"device": id, "path": id}});
        assert_eq!(client.call(del.clone()), ok());
        assert_eq!(client.event(), deleted);
        assert_eq!(client.fails(del), "GenericError");
    }
    assert!(host.machine.slots().iter().all(|slot| slot.occupant.is_none()));
}

#[test]
fn what_cannot_be_plugged_is_refused_and_changes_nothing() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let mut client = host.client();
    let path = host.disk("disk");
    let node = |name: &str, path: &str| json!({"execute": "blockdev-add", "arguments": {"node-name": name, "file": {"driver": "file", "filename": path}}});
    let add = |id: &str, addr: &str| json!({"execute": "device_add", "arguments": {"id": id, "driver": "virtio-blk-mmio", "addr": addr}});
    for name in ["a", "b"] {
        assert_eq!(client.call(node(name, &path)), ok());
    }
    assert_eq!(client.call(add("a", "0x0")), ok());
    for request in [
        node("a", &path),
        node("c", "/nonexistent"),
        add("a", "0x1"),
        add("b", "0x0"),
        add("b", "0x4"),
        add("b", "one"),
        add("c", "0x1"),
        json!({"execute": "device_add", "arguments": {"id": "b", "driver": "virtio-net-mmio"}}),
        json!({"execute": "device_add", "arguments": {"id": "b", "driver": "usb-tablet"}}),
        json!({"execute": "device_add", "arguments": {"id": "b", "driver": "virtio-blk-mmio", "unheard-of": 1}}),
        json!({"execute": "blockdev-del", "arguments": {"node-name": "a"}}),
        json!({"execute": "netdev_add", "arguments": {"id": "n"}}),
        json!({"execute": "netdev_add", "arguments": {"id": "n", "fd": "nothing"}}),
        json!({"execute": "getfd", "arguments": {"fdname": "nothing"}}),
        json!({"execute": "stop", "arguments": {"now": true}}),
    ] {
        assert_eq!(client.fails(request.clone()), "GenericError", "{request}");
    }
    assert_eq!(client.fails(json!({"execute": "fly"})), "GenericError");
    assert_eq!(client.call(add("b", "3")), ok());
    let occupants: Vec<_> = host.machine.slots().into_iter().map(|slot| slot.occupant).collect();
    assert_eq!(occupants, [Some("a".into()), None, None, Some("b".into()), None, None]);
}

#[test]
fn requests_may_come_byte_by_byte_and_without_an_end_of_line() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let mut client = host.client();
    for byte in br#"{"execute":"query-target","id":"slow"}"# {
        client.send(&[*byte]);
    }
    assert_eq!(client.next(), Some(json!({"return": {"arch": "x86_64"}, "id": "slow"})));
    client.send(br#"{"execute":"query-target","id":1}{"execute":"query-target","id":2}"#);
    assert_eq!(client.next().expect("first")["id"], 1);
    assert_eq!(client.next().expect("second")["id"], 2);
    client.send(b"nonsense");
    assert_eq!(client.next().expect("an error")["error"]["class"], "GenericError");
    assert_eq!(client.call(json!({"execute": "query-target"}))["return"]["arch"], "x86_64");
}

#[test]
fn a_request_without_end_ends_the_connection_and_the_next_client_is_served() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let mut client = host.client();
    let mut request = br#"{"execute":""#.to_vec();
    request.resize(80 << 10, b'x');
    // The server may close before all of it is written.
    let _ = client.0.get_mut().write_all(&request);
    let mut replies = String::new();
    let _ = client.0.read_line(&mut replies);
    assert!(replies.is_empty() || replies.contains("longer than 65536 bytes"), "{replies}");
    host.client();
}

#[test]
fn the_second_client_is_served_when_the_first_has_left() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let first = host.client();
    let mut second = Client(BufReader::new(host.connect()));
    second.0.get_ref().set_nonblocking(true).expect("non-blocking");
    assert!(second.0.fill_buf().is_err(), "Nothing is there to read");
    second.0.get_ref().set_nonblocking(false).expect("blocking");
    drop(first);
    assert!(second.next().expect("greeting").get("QMP").is_some());
    assert_eq!(second.call(json!({"execute": "query-target"}))["return"]["arch"], "x86_64");
}

#[test]
fn requests_of_a_client_that_has_closed_its_half_are_served() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let mut client = host.client();
    client.send(br#"{"execute":"stop"}"#);
    client.0.get_ref().shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(client.next(), Some(ok()));
    assert_eq!(client.next().expect("an event")["event"], "STOP");
    assert_eq!(client.next(), None);
}

#[test]
fn migrate_saves_the_machine_and_leaves_it_stopped() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let mut client = host.client();
    let directory = host.directory.path().join("template");
    let migrate = |uri: String| json!({"execute": "migrate", "arguments": {"uri": uri}});
    let status = |client: &mut Client| client.call(json!({"execute": "query-migrate"}))["return"]["status"].clone();
    for uri in ["tcp:127.0.0.1:1", "unix:/tmp/x", "file:", ""] {
        assert_eq!(client.fails(migrate(uri.into())), "GenericError");
        assert_eq!(status(&mut client), "none");
    }
    assert_eq!(client.call(migrate(format!("file:{}", directory.display()))), ok());
    assert_eq!(client.event()["event"], "STOP");
    assert_eq!(status(&mut client), "completed");
    assert!(directory.join("state").exists() && directory.join("memory").exists());
    assert_eq!(client.call(json!({"execute": "query-status"}))["return"]["running"], false);
    assert_eq!(client.call(json!({"execute": "cont"})), ok());
    assert_eq!(client.event()["event"], "RESUME");
    assert_eq!(client.fails(migrate("file:/proc/nowhere".into())), "GenericError");
    assert_eq!(client.event()["event"], "STOP");
    assert_eq!(status(&mut client), "failed");
}

/// Asks until the snapshot in the background has ended, and returns what is told of it then.
fn outcome(client: &mut Client) -> Value {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let told = client.call(json!({"execute": "query-migrate"}))["return"].clone();
        if told["status"] != "active" {
            return told;
        }
        assert!(told["ram"]["transferred"].as_u64() <= told["ram"]["total"].as_u64(), "{told}");
        assert!(Instant::now() < deadline, "{told}");
        // Less often than a client may ask.
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_machine_is_saved_in_the_background_and_runs_on() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let mut client = host.client();
    let directory = host.directory.path().join("template");
    let capability = |state: bool| {
        let capabilities = json!([{"capability": "background-snapshot", "state": state}]);
        json!({"execute": "migrate-set-capabilities", "arguments": {"capabilities": capabilities}})
    };
    let migrate = |uri: String| json!({"execute": "migrate", "arguments": {"uri": uri}});
    assert_eq!(client.call(capability(true)), ok());
    assert_eq!(client.call(migrate(format!("file:{}", directory.display()))), ok());
    // A second one, where the first is not done yet.
    if client.call(json!({"execute": "query-migrate"}))["return"]["status"] == "active" {
        let said = client.call(migrate("file:/nowhere".into()));
        assert!(said["error"]["desc"] == "There's a migration process in progress" || said == ok(), "{said}");
    }
    let told = outcome(&mut client);
    assert_eq!(told["status"], "completed", "{told}");
    assert!(told["downtime"].as_u64() > Some(0), "{told}");
    vmm::snapshot::verify(&directory).expect("sound");
    assert_eq!(client.call(json!({"execute": "query-status"}))["return"]["running"], true);
    assert_eq!(client.call(migrate("file:/proc/nowhere".into())), ok());
    let told = outcome(&mut client);
    assert_eq!(told["status"], "failed", "{told}");
    assert!(told["error-desc"].as_str().is_some_and(|text| text.starts_with("Cannot write /proc/nowhere")), "{told}");
    assert_eq!(client.call(json!({"execute": "query-status"}))["return"]["running"], true);
    // Given up, or too late for that.
    assert_eq!(client.call(migrate(format!("file:{}", directory.display()))), ok());
    assert_eq!(client.call(json!({"execute": "migrate_cancel"})), ok());
    let told = outcome(&mut client);
    assert!(told["status"] == "cancelled" || told["status"] == "completed", "{told}");
    vmm::snapshot::verify(&directory).expect("the old one or a new one");
    // As before.
    assert_eq!(client.call(capability(false)), ok());
    assert_eq!(client.call(migrate(format!("file:{}", directory.display()))), ok());
    assert_eq!(client.event()["event"], "STOP");
}

#[test]
fn a_descriptor_is_named_by_getfd() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let mut client = host.client();
    let request = br#"{"execute":"getfd","arguments":{"fdname":"tap0"}}"#;
    let null = File::open("/dev/null").expect("open");
    let files = [null.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&files)];
    let socket = client.0.get_ref().as_raw_fd();
    sendmsg::<()>(socket, &[IoSlice::new(request)], &rights, MsgFlags::empty(), None).expect("send");
    assert_eq!(client.next(), Some(ok()));
    assert_eq!(client.call(json!({"execute": "netdev_add", "arguments": {"id": "net0", "fd": "tap0"}})), ok());
    // It is no tap interface, which is found out when it is needed.
    let device = json!({"id": "net0", "driver": "virtio-net-mmio", "addr": "0x1"});
    let reply = client.call(json!({"execute": "device_add", "arguments": device}));
    assert!(reply["error"]["desc"].as_str().is_some_and(|desc| desc.contains("tap")), "{reply}");
    assert_eq!(client.call(json!({"execute": "netdev_del", "arguments": {"id": "net0"}})), ok());
}

#[test]
fn more_than_a_hundred_requests_in_a_second_are_throttled() {
    need_kvm!();
    let host = Host::start(Code::new().spin());
    let mut client = host.client();
    // Faster than a second wherever the test runs: they come in one piece.
    let burst = br#"{"execute":"query-target"}"#.repeat(250);
    client.send(&burst);
    let throttled = (0..250).filter(|_| {
        let reply = client.next().expect("a reply");
        reply.get("error").is_some_and(|error| error["class"] == "OperationThrottled")
    });
    assert!(throttled.count() >= 50, "250 requests fall into two windows at most");
}

/// Writes the table anew where `INLAY_UPDATE_DOCS` is set.
#[test]
fn the_documents_table_is_the_servers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/qmp.md");
    let document = std::fs::read_to_string(path).expect("docs/qmp.md");
    let (head, _) = document.split_once("\n| command |").expect("a table at the end");
    let mut expected = format!("{head}\n| command | compared with StratoVirt | what it does |\n| --- | --- | --- |\n");
    for command in commands::COMMANDS {
        let standing = format!("{:?}", command.standing).to_lowercase();
        expected += &format!("| `{}` | {standing} | {} |\n", command.name, command.summary);
    }
    if std::env::var_os("INLAY_UPDATE_DOCS").is_some() {
        std::fs::write(path, &expected).expect("write");
    }
    assert_eq!(std::fs::read_to_string(path).expect("docs/qmp.md"), expected, "INLAY_UPDATE_DOCS=1 writes it");
}
