//! The real binary, called as containerd calls it. No machine is started, so any host will do; what mounts needs root.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    CheckpointTaskRequest, ConnectRequest, ConnectResponse, CreateTaskRequest, DeleteResponse, KillRequest,
    ShutdownRequest, StateRequest, WaitRequest,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use ttrpc::Code;
use ttrpc::context::with_duration;

const PATIENCE: Duration = Duration::from_secs(20);

/// A host of one's own: state directory, bundles.
struct Host {
    root: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap() }
    }

    fn run_dir(&self) -> PathBuf {
        self.root.path().join("run")
    }

    fn bundle(&self, id: &str, annotations: serde_json::Value) -> PathBuf {
        let bundle = self.root.path().join("bundles").join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let config = serde_json::json!({
            "ociVersion": "1.0.2",
            "annotations": annotations,
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
            "root": {"path": "rootfs"}
        });
        fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        bundle
    }

    fn shim(&self, bundle: &Path, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_inlay"));
        command
            .arg0("containerd-shim-inlay-v2")
            .args(["-namespace", "test", "-address", "/run/c.sock"])
            .args(arguments);
        command.current_dir(bundle).env("INLAY_RUN_DIR", self.run_dir()).env_remove("TTRPC_ADDRESS");
        command.stdin(Stdio::null()).output().unwrap()
    }

    fn start(&self, id: &str, bundle: &Path) -> String {
        let output = self.shim(bundle, &["-id", id, "start"]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn delete(&self, id: &str, bundle: &Path) -> DeleteResponse {
        let output = self.shim(bundle, &["-id", id, "-bundle", bundle.to_str().unwrap(), "delete"]);
        assert!(output.status.success(), "{output:?}");
        DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
    }

    /// Everything below the state directory that is not one of the two directories that stay.
    fn left(&self) -> Vec<PathBuf> {
        ["s", "sandboxes"]
            .iter()
            .filter_map(|name| fs::read_dir(self.run_dir().join(name)).ok())
            .flat_map(|entries| entries.map(|entry| entry.unwrap().path()))
            .collect()
    }
}

impl Drop for Host {
    /// A test that failed leaves its shims behind; `delete` ends them.
    fn drop(&mut self) {
        for entry in fs::read_dir(self.root.path().join("bundles")).into_iter().flatten().flatten() {
            let _ = self.shim(&entry.path(), &["-id", entry.file_name().to_str().unwrap_or_default(), "delete"]);
        }
    }
}

async fn connect(address: &str) -> TaskClient {
    TaskClient::new(Client::connect(address).await.unwrap())
}

fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("{other:?}"),
    }
}

async fn shut_down(client: &TaskClient, address: &str) {
    let request = ShutdownRequest { now: true, ..ShutdownRequest::default() };
    client.shutdown(with_duration(PATIENCE), &request).await.unwrap();
    let socket = address.strip_prefix("unix://").unwrap();
    let begun = Instant::now();
    while Path::new(socket).exists() {
        assert!(begun.elapsed() < PATIENCE, "The shim does not end");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn state_of(id: &str) -> StateRequest {
    StateRequest { id: id.to_owned(), ..StateRequest::default() }
}

#[tokio::test]
async fn a_shim_starts_answers_and_ends() {
    let host = Host::new();
    let bundle = host.bundle("a", serde_json::json!({}));
    let address = host.start("a", &bundle);
    assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);

    let client = connect(&address).await;
    let context = || with_duration(PATIENCE);
    let (code, text) = refusal(client.state(context(), &state_of("a")).await);
    assert_eq!((code, text.as_str()), (Code::NOT_FOUND, "Container a not found"));
    let wait = WaitRequest { id: "a".into(), ..WaitRequest::default() };
    assert_eq!(refusal(client.wait(context(), &wait).await).0, Code::NOT_FOUND);
    let kill = KillRequest { id: "a".into(), exec_id: "../x".into(), ..KillRequest::default() };
    assert_eq!(refusal(client.kill(context(), &kill).await).0, Code::NOT_FOUND);
    let checkpoint = CheckpointTaskRequest { id: "a".into(), ..CheckpointTaskRequest::default() };
    assert_eq!(refusal(client.checkpoint(context(), &checkpoint).await).0, Code::UNIMPLEMENTED);
    let connected = client.connect(context(), &ConnectRequest::default()).await.unwrap();
    assert!(Path::new(&format!("/proc/{}", connected.shim_pid)).exists());

    // As long as it lives there is no second one of its name.
    let second = host.shim(&bundle, &["-id", "a", "start"]);
    assert!(!second.status.success() && String::from_utf8_lossy(&second.stderr).contains("A shim already serves a"));

    shut_down(&client, &address).await;
    assert_eq!(host.left(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn the_service_answers_under_the_name_that_containerd_1_calls() {
    let host = Host::new();
    let bundle = host.bundle("a", serde_json::json!({}));
    let address = host.start("a", &bundle);
    let client = Client::connect(&address).await.unwrap();
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let mut request = ttrpc::Request::new();
        request.set_service(service.to_owned());
        request.set_method("Connect".to_owned());
        request.payload = ConnectRequest::default().write_to_bytes().unwrap();
        let response = client.request(request).await.unwrap();
        let connected = ConnectResponse::parse_from_bytes(&response.payload).unwrap();
        assert!(connected.shim_pid > 0, "{service}");
    }
    shut_down(&TaskClient::new(client), &address).await;
}

#[tokio::test]
async fn containers_of_a_pod_share_its_shim() {
    let host = Host::new();
    let pod = host.bundle("pod", serde_json::json!({"io.kubernetes.cri.container-type": "sandbox"}));
    let member = host.bundle(
        "member",
        serde_json::json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"}),
    );
    let early = host.shim(&member, &["-id", "member", "start"]);
    assert!(!early.status.success());
    let text = String::from_utf8_lossy(&early.stderr).into_owned();
    assert!(text.contains("No shim serves the sandbox pod of the container member"), "{text}");

    let address = host.start("pod", &pod);
    assert_eq!(host.start("member", &member), address);
    assert_eq!(fs::read_to_string(member.join("address")).unwrap(), address);
    // containerd gives up a member only: the pod's shim lives on.
    assert_eq!(host.delete("member", &member).exit_status, 137);
    let client = connect(&address).await;
    let create = CreateTaskRequest { id: "member".into(), bundle: member.display().to_string(), ..Default::default() };
    let (code, text) = refusal(client.create(with_duration(PATIENCE), &create).await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
    shut_down(&client, &address).await;
}

#[tokio::test]
async fn a_create_that_fails_names_its_stage_and_leaves_nothing() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: mounting needs root");
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("a", serde_json::json!({}));
    let configuration = host.root.path().join("configuration.toml");
    fs::write(&configuration, "[hypervisor.inlay]\nkernel = \"/nonexistent/vmlinux\"\n").unwrap();
    let address = host.start("a", &bundle);
    let client = connect(&address).await;

    let path = configuration.to_str().unwrap();
    let mut value = vec![0x12, u8::try_from(path.len()).unwrap()];
    value.extend_from_slice(path.as_bytes());
    let options = Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Any::default() };
    let create = CreateTaskRequest {
        id: "a".into(),
        bundle: bundle.display().to_string(),
        options: Some(options).into(),
        ..CreateTaskRequest::default()
    };
    // Twice: the first failure must not stand in the way of the second try.
    for _ in 0..2 {
        let (code, text) = refusal(client.create(with_duration(PATIENCE), &create).await);
        assert_eq!(code, Code::UNKNOWN);
        assert!(text.starts_with("Cannot boot the sandbox's guest: "), "{text}");
        // Without KVM the machine fails before it looks for its kernel.
        assert!(text.contains("/nonexistent/vmlinux") || text.contains("/dev/kvm"), "{text}");
        assert_eq!(fs::read_dir(host.run_dir().join("sandboxes")).unwrap().count(), 0);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(host.root.path().to_str().unwrap()), "{mounts}");
        assert_eq!(refusal(client.state(with_duration(PATIENCE), &state_of("a")).await).0, Code::NOT_FOUND);
    }

    fs::write(&configuration, "[hypervisor.inlay]\ndefault_memory = 1\n").unwrap();
    let (code, text) = refusal(client.create(with_duration(PATIENCE), &create).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("hypervisor.inlay.default_memory"), "{text}");
    shut_down(&client, &address).await;
    assert_eq!(host.left(), Vec::<PathBuf>::new());
}

#[test]
fn delete_works_from_the_state_that_a_dead_shim_left() {
    let host = Host::new();
    let bundle = host.bundle("a", serde_json::json!({}));
    let sandbox = host.run_dir().join("sandboxes/a");
    fs::create_dir_all(sandbox.join("layout/a/rootfs")).unwrap();
    fs::create_dir_all(sandbox.join("shared")).unwrap();
    let socket = host.run_dir().join("s/left");
    fs::create_dir_all(socket.parent().unwrap()).unwrap();
    fs::write(&socket, "").unwrap();
    // Process 1 lives, but did not start at tick 0 of a shim's clock: it must not be killed.
    let record = serde_json::json!({
        "version": 1, "sandbox": "a", "namespace": "test", "shim": {"pid": 1, "start_time": u64::MAX},
        "socket": socket, "cgroups": []
    });
    fs::write(sandbox.join("state.json"), record.to_string()).unwrap();
    let response = host.delete("a", &bundle);
    assert_eq!((response.pid, response.exit_status), (1, 137));
    assert!(response.exited_at.seconds > 0);
    assert_eq!(host.left(), Vec::<PathBuf>::new());
    // containerd deletes after an orderly end too: then there is nothing to do.
    assert_eq!(host.delete("a", &bundle).exit_status, 137);
}

#[test]
fn delete_ends_a_shim_that_never_had_a_sandbox() {
    let host = Host::new();
    let bundle = host.bundle("a", serde_json::json!({}));
    let address = host.start("a", &bundle);
    host.delete("a", &bundle);
    assert_eq!(host.left(), Vec::<PathBuf>::new());
    assert!(std::os::unix::net::UnixStream::connect(address.trim_start_matches("unix://")).is_err());
}

#[test]
fn another_namespaces_sandbox_is_left_alone() {
    let host = Host::new();
    let bundle = host.bundle("a", serde_json::json!({}));
    let sandbox = host.run_dir().join("sandboxes/a");
    fs::create_dir_all(&sandbox).unwrap();
    let record = serde_json::json!({
        "version": 1, "sandbox": "a", "namespace": "other", "shim": {"pid": 1, "start_time": u64::MAX},
        "socket": null, "cgroups": []
    });
    fs::write(sandbox.join("state.json"), record.to_string()).unwrap();
    assert_eq!(host.delete("a", &bundle).pid, 0);
    assert!(sandbox.join("state.json").exists());
}

#[test]
fn bad_input_is_refused_in_words() {
    let host = Host::new();
    let bundle = host.bundle("a", serde_json::json!({}));
    let refused = |arguments: &[&str]| {
        let output = host.shim(&bundle, arguments);
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused(&["-id", "../a", "start"]).contains("The identifier \"../a\""));
    assert!(refused(&["-frobnicate", "start"]).contains("frobnicate"));
    assert!(refused(&["-id", "a"]).contains("Descriptor 3 is not the listening socket"));
    fs::write(bundle.join("config.json"), "{").unwrap();
    assert!(refused(&["-id", "a", "start"]).contains("does not follow the OCI runtime specification"));
    assert_eq!(host.left(), Vec::<PathBuf>::new());
}

#[test]
fn the_operators_command_explains_itself() {
    let inlay = |arguments: &[&str]| Command::new(env!("CARGO_BIN_EXE_inlay")).args(arguments).output().unwrap();
    let text = |output: Output| String::from_utf8(output.stdout).unwrap();
    assert_eq!(text(inlay(&["version"])), format!("inlay {}\n", env!("CARGO_PKG_VERSION")));
    let help = text(inlay(&["--help"]));
    assert!(help.contains("io.containerd.inlay.v2") && help.contains("check"), "{help}");
    let check = inlay(&["check", "--config", "/nonexistent/c.toml"]);
    assert!(!check.status.success());
    assert!(text(check).contains("/nonexistent/c.toml"));
}
