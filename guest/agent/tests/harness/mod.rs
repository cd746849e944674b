//! A real agent as PID 1 of fresh namespaces on the machine that builds it, driven over Unix sockets.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use agent_proto::agent_ttrpc::AgentServiceClient;
use agent_proto::health_ttrpc::HealthClient;
use agent_proto::{agent, oci};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, socket};
use protobuf::MessageField;
use std::os::fd::AsRawFd;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::context::Context;

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 12] =
    ["sh", "cat", "echo", "id", "mkdir", "sleep", "true", "env", "pwd", "stty", "grep", "hostname"];
/// What the agent's PID 1 finds mounted in a guest.
const SET_UP: &str = "mount -t tmpfs tmpfs /run && mount -t cgroup2 cgroup2 /sys/fs/cgroup && ip link set lo up \
    && exec \"$0\" --listen \"unix:$1\"";

/// In a cgroup of its own, so that agents that run at the same time do not see each other's containers.
const NAMESPACES: &str = "echo 0 > \"$2/cgroup.procs\" && exec unshare --mount --pid --fork --net --uts --ipc --cgroup \
    --mount-proc --kill-child sh -c \"$3\" \"$0\" \"$1\"";

/// A cgroup of version 2 on this machine, wherever that is mounted; removed when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("inlay-agent-test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = cgroup_mount().expect("Checked by can_run").join(name);
        fs::create_dir(&path).expect("root may");
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        for _ in 0..200 {
            if remove_cgroups(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn cgroup_mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").expect("Readable");
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.filter(|fields| fields[2] == "cgroup2").map(|fields| PathBuf::from(fields[1])).next()
}

fn remove_cgroups(directory: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)?.flatten() {
        if entry.path().is_dir() {
            remove_cgroups(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

/// Whether namespaces can be made; says why not when they cannot.
pub fn can_run() -> bool {
    let needs = [
        (nix::unistd::geteuid().is_root(), "namespaces need root"),
        (Path::new(BUSYBOX).exists(), "containers run /bin/busybox (package busybox-static)"),
        (cgroup_mount().is_some(), "containers need version 2 cgroups, mounted anywhere"),
        (Path::new("/dev/net/tun").exists(), "the network's test needs /dev/net/tun"),
    ];
    for (_, reason) in needs.iter().filter(|(met, _)| !met) {
        eprintln!("SKIPPED: {reason}");
    }
    needs.iter().all(|(met, _)| *met)
}

/// An agent and what tests need to talk to it.
pub struct Agent {
    process: Child,
    directory: TempDir,
    /// The agent API.
    pub api: AgentServiceClient,
    /// The health API.
    pub health: HealthClient,
    log: UnixStream,
    /// Dropped after the agent was killed.
    _cgroup: Cgroup,
    next_port: AtomicU32,
}

impl Agent {
    /// Starts an agent and waits until it says that it listens.
    pub async fn start() -> Self {
        let directory = tempfile::tempdir().expect("A directory");
        fs::create_dir(directory.path().join("rootfs")).expect("New");
        make_rootfs(&directory.path().join("rootfs"));
        let log = UnixListener::bind(directory.path().join("1025.sock")).expect("Bindable");
        let cgroup = Cgroup::new();
        let process = Command::new("sh")
            .args(["-c", NAMESPACES, env!("CARGO_BIN_EXE_inlay-agent")])
            .args([directory.path(), &cgroup.0, Path::new(SET_UP)])
            .stdin(Stdio::null())
            .spawn()
            .expect("util-linux is installed");
        let connected = tokio::time::timeout(Duration::from_secs(20), log.accept()).await;
        let (log, _) = connected.expect("The agent listens in time").expect("A connection");
        let address = format!("unix://{}", directory.path().join("1024.sock").display());
        let client = ttrpc::r#async::Client::connect(&address).await.expect("The agent listens");
        Self {
            process,
            api: AgentServiceClient::new(client.clone()),
            health: HealthClient::new(client),
            directory,
            log,
            _cgroup: cgroup,
            next_port: AtomicU32::new(5000),
        }
    }

    /// The root file system of test containers, made of busybox.
    pub fn rootfs(&self) -> PathBuf {
        self.directory.path().join("rootfs")
    }

    /// A place for files of a test.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A stdio connection and the port by which a request names it.
    pub fn connect(&self) -> (u32, UnixStream) {
        let port = self.next_port.fetch_add(1, Ordering::Relaxed);
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("A socket");
        let own = UnixAddr::new(&self.directory.path().join(format!("{port}.peer"))).expect("Short enough");
        bind(fd.as_raw_fd(), &own).expect("Bindable");
        let peer = UnixAddr::new(&self.directory.path().join("1027.sock")).expect("Short enough");
        connect(fd.as_raw_fd(), &peer).expect("The agent listens");
        let stream = std::os::unix::net::UnixStream::from(fd);
        stream.set_nonblocking(true).expect("A socket");
        (port, UnixStream::from_std(stream).expect("In a runtime"))
    }

    /// A request for a container that runs `sh -c script`, with output on connections.
    pub fn request(&self, id: &str, script: &str) -> agent::CreateContainerRequest {
        agent::CreateContainerRequest {
            container_id: id.to_owned(),
            OCI: MessageField::some(spec(&self.rootfs(), &["sh", "-c", script])),
            stdin_port: agent_proto::NULL_STREAM_PORT,
            stdout_port: agent_proto::NULL_STREAM_PORT,
            stderr_port: agent_proto::NULL_STREAM_PORT,
            ..Default::default()
        }
    }

    /// Creates and starts a container.
    pub async fn run(&self, request: &agent::CreateContainerRequest) {
        self.api.create_container(deadline(), request).await.expect("Created");
        let start = agent::StartContainerRequest { container_id: request.container_id.clone(), ..Default::default() };
        self.api.start_container(deadline(), &start).await.expect("Started");
    }

    /// Runs `sh -c script` in a new container to its end: exit code, standard output, standard error.
    pub async fn output(&self, request: &mut agent::CreateContainerRequest) -> (i32, String, String) {
        let (stdout_port, mut stdout) = self.connect();
        let (stderr_port, mut stderr) = self.connect();
        (request.stdout_port, request.stderr_port) = (stdout_port, stderr_port);
        self.run(request).await;
        let (mut out, mut err) = (String::new(), String::new());
        stdout.read_to_string(&mut out).await.expect("Open to the end");
        stderr.read_to_string(&mut err).await.expect("Open to the end");
        (self.wait(&request.container_id, "").await, out, err)
    }

    /// A request for a further process that runs `sh -c script`.
    pub fn exec_request(&self, id: &str, exec: &str, script: &str) -> agent::ExecProcessRequest {
        agent::ExecProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            process: MessageField::some(process(&["sh", "-c", script])),
            stdin_port: agent_proto::NULL_STREAM_PORT,
            stdout_port: agent_proto::NULL_STREAM_PORT,
            stderr_port: agent_proto::NULL_STREAM_PORT,
            ..Default::default()
        }
    }

    /// Runs a further process to its end: exit code, standard output, standard error.
    pub async fn exec_output(&self, request: &mut agent::ExecProcessRequest) -> (i32, String, String) {
        let (stdout_port, mut stdout) = self.connect();
        let (stderr_port, mut stderr) = self.connect();
        (request.stdout_port, request.stderr_port) = (stdout_port, stderr_port);
        self.api.exec_process(deadline(), request).await.expect("Started");
        let (mut out, mut err) = (String::new(), String::new());
        stdout.read_to_string(&mut out).await.expect("Open to the end");
        stderr.read_to_string(&mut err).await.expect("Open to the end");
        (self.wait(&request.container_id, &request.exec_id).await, out, err)
    }

    /// The exit code of a process.
    pub async fn wait(&self, id: &str, exec: &str) -> i32 {
        let request = agent::WaitProcessRequest { container_id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.api.wait_process(deadline(), &request).await.expect("Ended").status
    }

    /// Sends a signal.
    pub async fn signal(&self, id: &str, exec: &str, signal: i32) -> ttrpc::Result<agent_proto::Empty> {
        let request = agent::SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            signal: u32::try_from(signal).expect("Positive"),
            ..Default::default()
        };
        self.api.signal_process(deadline(), &request).await
    }

    /// Removes a container.
    pub async fn remove(&self, id: &str) {
        let request = agent::RemoveContainerRequest { container_id: id.into(), timeout: 20, ..Default::default() };
        self.api.remove_container(deadline(), &request).await.expect("Removed");
    }

    /// The agent's number on this machine: it is the only child of `unshare`.
    pub fn pid(&self) -> u32 {
        let children = format!("/proc/{0}/task/{0}/children", self.process.id());
        fs::read_to_string(children).expect("Readable").trim().parse().expect("One child")
    }

    /// Numbers, on this machine, of all processes in the agent's PID namespace but the agent.
    pub fn others(&self) -> Vec<u32> {
        let agent = self.pid();
        let namespace = fs::read_link(format!("/proc/{agent}/ns/pid_for_children")).expect("Readable");
        let processes = fs::read_dir("/proc").expect("Readable").flatten();
        let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let inside = |pid: &u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let depth =
                status.lines().find(|line| line.starts_with("NSpid:")).map_or(0, |line| line.split('\t').count());
            let own = fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|own| own == namespace);
            *pid != agent && (own || (depth > 2 && is_descendant(*pid, agent)))
        };
        numbers.filter(inside).collect()
    }

    /// Whether the agent has not ended.
    pub fn is_running(&self) -> bool {
        let children = format!("/proc/{0}/task/{0}/children", self.process.id());
        fs::read_to_string(children).is_ok_and(|children| !children.trim().is_empty())
    }

    /// Runs a program of this machine in the agent's network namespace.
    pub fn in_network(&self, command: &[&str]) -> String {
        let target = self.pid().to_string();
        let output = Command::new("nsenter")
            .args(["-t", &target, "-n"])
            .args(command)
            .output()
            .expect("util-linux is installed");
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A path as the agent sees it.
    pub fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid()))
    }

    /// Everything the agent has logged so far.
    pub async fn logged(&mut self) -> String {
        let mut bytes = vec![0; 1 << 20];
        let count = tokio::time::timeout(Duration::from_millis(200), self.log.read(&mut bytes)).await;
        let count = count.unwrap_or(Ok(0)).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    }
}

fn is_descendant(pid: u32, ancestor: u32) -> bool {
    let mut current = pid;
    while current > 1 {
        if current == ancestor {
            return true;
        }
        let status = fs::read_to_string(format!("/proc/{current}/status")).unwrap_or_default();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:\t")?.parse().ok());
        current = parent.unwrap_or(0);
    }
    false
}

impl Drop for Agent {
    fn drop(&mut self) {
        // unshare kills the agent, which is PID 1 of its namespace, so the kernel kills the rest.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The first line of a stream.
pub async fn line(stream: UnixStream) -> String {
    let mut line = String::new();
    let mut stream = BufReader::new(stream);
    let read = stream.read_line(&mut line);
    tokio::time::timeout(Duration::from_secs(60), read).await.expect("In time").expect("Open");
    line
}

/// Waits for something that is bound to happen.
pub async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..400 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("It did not happen that {what}");
}

/// Long enough for a slow machine, short enough for a hang to be noticed.
pub fn deadline() -> Context {
    ttrpc::context::with_duration(Duration::from_secs(60))
}

fn make_rootfs(root: &Path) {
    for directory in ["bin", "dev", "etc", "proc", "sys", "tmp", "root"] {
        fs::create_dir(root.join(directory)).expect("New");
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).expect("Readable");
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).expect("New");
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
        .expect("Writable");
}

/// A mount.
pub fn mount(destination: &str, kind: &str, options: &[&str]) -> oci::Mount {
    oci::Mount {
        destination: destination.into(),
        source: kind.into(),
        type_: kind.into(),
        options: options.iter().map(|&option| option.to_owned()).collect(),
        ..Default::default()
    }
}

/// A container as containerd describes one, for the parts that matter here.
pub fn spec(rootfs: &Path, args: &[&str]) -> oci::Spec {
    let namespace = |kind: &str| oci::LinuxNamespace { Type: kind.into(), ..Default::default() };
    oci::Spec {
        Version: "1.1.0".into(),
        Process: MessageField::some(process(args)),
        Root: MessageField::some(oci::Root { Path: rootfs.display().to_string(), ..Default::default() }),
        Hostname: "inside".into(),
        Mounts: vec![
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        Linux: MessageField::some(oci::Linux {
            Namespaces: ["pid", "ipc", "uts", "mount", "network"].map(namespace).into(),
            MaskedPaths: vec!["/proc/kcore".into(), "/proc/keys".into()],
            ReadonlyPaths: vec!["/proc/sys".into()],
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A process with containerd's default capabilities.
pub fn process(args: &[&str]) -> oci::Process {
    const CAPABILITIES: [&str; 4] = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"];
    let set = || CAPABILITIES.map(str::to_owned).to_vec();
    oci::Process {
        User: MessageField::some(oci::User::default()),
        Args: args.iter().map(|&arg| arg.to_owned()).collect(),
        Env: vec!["PATH=/usr/bin:/bin".into()],
        Cwd: "/".into(),
        Capabilities: MessageField::some(oci::LinuxCapabilities {
            Bounding: set(),
            Effective: set(),
            Permitted: set(),
            ..Default::default()
        }),
        NoNewPrivileges: true,
        ..Default::default()
    }
}
