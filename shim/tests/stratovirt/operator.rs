//! The real binary, and whoever talks to it over QMP.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use devices::virtio::net::Tap;
use serde_json::{Value, json};

use crate::host::{Guest, Host, PATIENCE, SHUTDOWN, eventually, kvm};

/// A client of a machine's QMP socket.
struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(host: &Host, socket: &str) -> Self {
        let stream = eventually("the socket", || UnixStream::connect(host.path(socket)).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self(BufReader::new(stream));
        assert!(client.next()["QMP"].is_object());
        client
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Sends a command that succeeds, and returns its answer.
    fn call(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        self.0.get_mut().write_all(request.to_string().as_bytes()).unwrap();
        let mut reply = self.next();
        assert!(reply.get("return").is_some(), "{command}: {reply}");
        reply["return"].take()
    }

    /// The name of the next event.
    fn event(&mut self) -> String {
        let event = self.next();
        event["event"].as_str().unwrap_or_else(|| panic!("{event}")).to_owned()
    }
}

fn frozen(host: &Host, words: &[&str]) -> Child {
    let words = [&["-S", "-qmp", "unix:qmp,server,nowait"], words].concat();
    host.command(&words).stderr(Stdio::inherit()).spawn().unwrap()
}

/// Everything that an operator does, to a process under its ceiling: a call that the ceiling does not allow ends it.
#[test]
fn an_operator_plugs_stops_saves_and_restores_under_the_ceiling() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().print("up").echo().end(SHUTDOWN));
    fs::write(host.path("disk"), vec![0; 1 << 20]).unwrap();
    let words = [
        "-serial",
        "socket,path=console,server,nowait",
        "-device",
        "virtio-balloon-device",
        "-object",
        "iothread,id=io1",
        "-D",
        "log",
    ];
    let mut child = frozen(&host, &words);
    let mut client = Client::connect(&host, "qmp");
    let mut console = UnixStream::connect(host.path("console")).unwrap();
    for (aio, direct) in [("native", true), ("threads", false), ("io_uring", true), ("off", false)] {
        let file = json!({"driver": "file", "filename": host.path("disk"), "aio": aio});
        let cache = json!({"direct": direct});
        client.call("blockdev-add", json!({"node-name": "d", "file": file, "cache": cache}));
        client.call("device_add", json!({"id": "d", "driver": "virtio-blk-mmio", "addr": "0x1"}));
        client.call("device_del", json!({"id": "d"}));
        assert_eq!(client.event(), "DEVICE_DELETED");
    }
    assert_ne!(client.call("query-iothreads", json!({}))[0]["thread-id"], 0);
    assert_eq!(client.call("query-chardev", json!({}))[0]["label"], "serial0");
    client.call("balloon", json!({"value": 64 << 20}));
    client.call("cont", json!({}));
    assert_eq!(client.event(), "RESUME");
    let mut said = [0; 2];
    console.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"up");
    // The balloon has no driver, and is no obstacle for that.
    client.call("migrate", json!({"uri": format!("file:{}", host.path("saved").display())}));
    assert_eq!(client.event(), "STOP");
    assert_eq!(client.call("query-migrate", json!({}))["status"], "completed");
    client.call("quit", json!({}));
    assert_eq!(client.event(), "SHUTDOWN");
    assert!(child.wait().unwrap().success(), "{}", fs::read_to_string(host.path("log")).unwrap());

    let mut child = frozen(&host, &[&words[..], &["-incoming", "file:saved"]].concat());
    let mut client = Client::connect(&host, "qmp");
    let mut console = UnixStream::connect(host.path("console")).unwrap();
    client.call("cont", json!({}));
    console.write_all(b"x").unwrap();
    console.read_exact(&mut said[..1]).unwrap();
    assert_eq!(said[0], b'x');
    assert!(child.wait().unwrap().success(), "{}", fs::read_to_string(host.path("log")).unwrap());
}

/// What an interface needs of the kernel when it is plugged is under the ceiling; making one is not.
#[test]
fn an_inherited_interface_is_plugged_and_none_is_made() {
    if !kvm() {
        return;
    }
    let tap = match Tap::open("strato%d") {
        Ok(tap) => tap,
        Err(error) => {
            println!("skipped: this host has no interfaces for tests: {error}");
            return;
        }
    };
    let fd = tap.as_raw_fd();
    // SAFETY: changes a flag of a descriptor that is open.
    assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }, 0);
    let host = Host::new(&Guest::default().bytes(&[0xeb, 0xfe]));
    let mut child = frozen(&host, &["-D", "log"]);
    let mut client = Client::connect(&host, "qmp");
    client.call("netdev_add", json!({"id": "net0", "fds": format!("{fd}"), "vhost": "on"}));
    client.call(
        "device_add",
        json!({"id": "net0", "driver": "virtio-net-mmio", "addr": "0x0", "mac": "52:54:00:00:00:01"}),
    );
    client.call("device_del", json!({"id": "net0"}));
    assert_eq!(client.event(), "DEVICE_DELETED");
    client.call("netdev_add", json!({"id": "net1", "ifname": "stratonew0"}));
    let device = json!({"execute": "device_add", "arguments": {"id": "net1", "driver": "virtio-net-mmio"}});
    client.0.get_mut().write_all(device.to_string().as_bytes()).unwrap();
    let refused = client.next();
    assert!(refused["error"]["desc"].as_str().unwrap().contains("Operation not permitted"), "{refused}");
    client.call("quit", json!({}));
    assert!(child.wait().unwrap().success(), "{}", fs::read_to_string(host.path("log")).unwrap());
}

#[test]
fn sockets_of_one_machine_share_its_drives() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().bytes(&[0xeb, 0xfe]));
    fs::write(host.path("disk"), vec![0; 1 << 20]).unwrap();
    let mut child =
        frozen(&host, &["-chardev", "socket,id=m,path=mon,server,nowait", "-mon", "chardev=m,mode=control"]);
    let (mut first, mut second) = (Client::connect(&host, "qmp"), Client::connect(&host, "mon"));
    let file = json!({"driver": "file", "filename": host.path("disk")});
    first.call("blockdev-add", json!({"node-name": "d", "file": file}));
    second.call("device_add", json!({"id": "d", "driver": "virtio-blk-mmio"}));
    assert_eq!(first.call("query-block", json!({}))[0]["qdev"], "d");
    first.call("quit", json!({}));
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_frozen_machine_is_driven_over_qmp_and_leaves_no_socket() {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: there is no /dev/kvm");
        return;
    }
    let host = Host::new(&Guest::default().print("hello").bytes(&[0xeb, 0xfe]));
    let words = ["-S", "-qmp", "unix:qmp.sock,server,nowait", "-chardev", "socket,id=m,path=mon.sock,server,nowait"];
    let mut command = host.command(&words);
    let mut child = command.args(["-mon", "chardev=m"]).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let connect = |name: &str| loop {
        match UnixStream::connect(host.path(name)) {
            Ok(client) => break client,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    for (name, command, expected) in [
        ("qmp.sock", r#"{"execute":"cont"}"#, "RESUME"),
        ("mon.sock", r#"{"execute":"query-status"}"#, r#""status":"running""#),
        ("qmp.sock", r#"{"execute":"quit"}"#, "host-qmp-quit"),
    ] {
        let mut client = connect(name);
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(command.as_bytes()).unwrap();
        let (mut text, mut bytes) = (String::new(), [0; 1024]);
        while !text.contains(expected) {
            let count = client.read(&mut bytes).unwrap();
            assert_ne!(count, 0, "{text}");
            text += std::str::from_utf8(&bytes[..count]).unwrap();
        }
    }
    assert!(child.wait().unwrap().success());
    assert!(!host.path("qmp.sock").exists() && !host.path("mon.sock").exists());
}

/// The process under its ceiling has all that a snapshot of a running machine takes, and the machine runs on.
#[test]
fn a_machine_is_saved_while_it_runs_under_the_ceiling() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().echo().end(SHUTDOWN));
    let words = ["-serial", "socket,path=console,server,nowait", "-D", "log"];
    let mut child = frozen(&host, &words);
    let mut client = Client::connect(&host, "qmp");
    let mut console = UnixStream::connect(host.path("console")).unwrap();
    client.call("cont", json!({}));
    assert_eq!(client.event(), "RESUME");
    let capability = json!({"capability": "background-snapshot", "state": true});
    client.call("migrate-set-capabilities", json!({"capabilities": [capability]}));
    client.call("migrate", json!({"uri": format!("file:{}", host.path("saved").display())}));
    let done = eventually("the snapshot", || {
        // A client may ask a hundred times a second.
        std::thread::sleep(Duration::from_millis(20));
        let state = client.call("query-migrate", json!({}));
        (state["status"] != "active").then_some(state)
    });
    assert_eq!(done["status"], "completed", "{done}");
    assert_eq!(client.call("query-status", json!({}))["status"], "running");

    let log = || fs::read_to_string(host.path("log")).unwrap();
    console.write_all(b"x").unwrap();
    let mut said = [0; 1];
    console.read_exact(&mut said).unwrap();
    assert!(said == *b"x" && child.wait().unwrap().success(), "{}", log());
    let output = host
        .command(&["-serial", "stdio", "-incoming", "file:saved"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut clone = output.unwrap();
    clone.stdin.take().unwrap().write_all(b"y").unwrap();
    let output = clone.wait_with_output().unwrap();
    assert!(output.status.success() && output.stdout == b"y", "{output:?}");
}
