use std::collections::HashMap;

use oci_spec::runtime::LinuxNamespaceType;
use protobuf::MessageField;

use super::*;

fn minimal() -> oci::Spec {
    oci::Spec {
        Process: MessageField::some(oci::Process { Args: vec!["sh".into()], Cwd: "/".into(), ..Default::default() }),
        Root: MessageField::some(oci::Root { Path: "/rootfs".into(), ..Default::default() }),
        Linux: MessageField::some(oci::Linux::default()),
        ..Default::default()
    }
}

fn placement() -> Placement<'static> {
    Placement { rootfs: Path::new("/rootfs"), cgroup: Path::new("/default/c1"), pid_namespace_of: None }
}

fn namespace(kind: &str) -> oci::LinuxNamespace {
    oci::LinuxNamespace { Type: kind.into(), Path: "/proc/4242/ns/x".into(), ..Default::default() }
}

fn refusal(spec: &oci::Spec) -> String {
    translate(spec, placement()).expect_err("Refused").to_string()
}

#[test]
fn namespaces_of_the_sandbox_are_the_guests() {
    let mut spec = minimal();
    spec.Linux.mut_or_insert_default().Namespaces =
        ["pid", "ipc", "uts", "mount", "network", "cgroup"].map(namespace).into();
    let translated = translate(&spec, placement()).expect("Valid").spec;
    let list = translated.linux().as_ref().and_then(|linux| linux.namespaces().clone()).expect("Some");
    let kinds: Vec<_> = list.iter().map(|namespace| namespace.typ()).collect();
    use LinuxNamespaceType::{Cgroup, Mount, Pid, Uts};
    assert_eq!(kinds, [Mount, Pid, Uts, Cgroup]);
    assert!(list.iter().all(|namespace| namespace.path().is_none()), "Paths name processes of the host");
}

#[test]
fn a_hostname_needs_a_namespace_of_its_own() {
    let mut spec = minimal();
    spec.Hostname = "inside".into();
    let hostname = |spec: &oci::Spec| translate(spec, placement()).expect("Valid").spec.hostname().clone();
    assert_eq!(hostname(&spec), None);
    spec.Linux.mut_or_insert_default().Namespaces = vec![namespace("uts")];
    assert_eq!(hostname(&spec).as_deref(), Some("inside"));
}

#[test]
fn a_shared_pid_namespace_is_that_of_the_named_process() {
    let shared = Placement { pid_namespace_of: Some(77), ..placement() };
    let spec = translate(&minimal(), shared).expect("Valid").spec;
    let list = spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).expect("Some");
    assert_eq!(list[1].path().as_deref(), Some(Path::new("/proc/77/ns/pid")));
}

#[test]
fn what_a_guest_does_not_do_is_refused_by_name() {
    let mut spec = minimal();
    let hook = oci::Hook { Path: "/usr/bin/nvidia".into(), ..Default::default() };
    spec.Hooks = MessageField::some(oci::Hooks { Poststop: vec![hook], ..Default::default() });
    assert_eq!(refusal(&spec), r#"The poststop hook "/usr/bin/nvidia" is not supported in the guest"#);

    let mut spec = minimal();
    spec.Process.mut_or_insert_default().ApparmorProfile = "docker-default".into();
    assert!(refusal(&spec).contains("docker-default"));

    let mut spec = minimal();
    spec.Linux.mut_or_insert_default().Namespaces = vec![namespace("user")];
    assert_eq!(refusal(&spec), "A user namespace is not supported in the guest");
}

#[test]
fn nonsense_is_an_error_that_names_it() {
    let mut spec = minimal();
    let capabilities = oci::LinuxCapabilities { Bounding: vec!["CAP_FLY".into()], ..Default::default() };
    spec.Process.mut_or_insert_default().Capabilities = MessageField::some(capabilities);
    assert!(refusal(&spec).contains("CAP_FLY"));

    let mut spec = minimal();
    let profile = oci::LinuxSeccomp { DefaultAction: "SCMP_ACT_SHRUG".into(), ..Default::default() };
    spec.Linux.mut_or_insert_default().Seccomp = MessageField::some(profile);
    assert!(refusal(&spec).contains("SCMP_ACT_SHRUG"));

    let mut spec = minimal();
    spec.Linux.mut_or_insert_default().Sysctl = HashMap::from([("net/../../etc".into(), "1".into())]);
    assert!(refusal(&spec).contains("sysctl"));
    for part in ["root", "process", "Linux section"] {
        let mut spec = minimal();
        match part {
            "root" => spec.Root = MessageField::none(),
            "process" => spec.Process = MessageField::none(),
            _ => spec.Linux = MessageField::none(),
        }
        assert_eq!(refusal(&spec), format!("The specification has no {part}"));
    }
}

#[test]
fn sysctls_go_where_their_namespace_is() {
    let mut spec = minimal();
    let pairs = [("net.ipv4.ip_forward", "1"), ("kernel.shmmax", "2"), ("kernel.domainname", "3")];
    let linux = spec.Linux.mut_or_insert_default();
    linux.Sysctl = pairs.map(|(name, value)| (name.into(), value.into())).into();
    linux.Namespaces = vec![namespace("uts")];
    let mut translated = translate(&spec, placement()).expect("Valid");
    translated.guest_sysctls.sort();
    assert_eq!(
        translated.guest_sysctls,
        [("kernel.shmmax".into(), "2".into()), ("net.ipv4.ip_forward".into(), "1".into())]
    );
    let own = translated.spec.linux().as_ref().and_then(|linux| linux.sysctl().clone()).expect("Some");
    assert_eq!(own, HashMap::from([("kernel.domainname".into(), "3".into())]));
}

#[test]
fn zero_is_absent() {
    let given = oci::LinuxResources {
        Memory: MessageField::some(oci::LinuxMemory { Limit: 1 << 20, ..Default::default() }),
        CPU: MessageField::some(oci::LinuxCPU { Cpus: "6-7".into(), ..Default::default() }),
        Pids: MessageField::some(oci::LinuxPids::default()),
        HugepageLimits: vec![oci::LinuxHugepageLimit { Pagesize: "2MB".into(), ..Default::default() }],
        Devices: vec![oci::LinuxDeviceCgroup { Access: "rwm".into(), ..Default::default() }],
        ..Default::default()
    };
    let limits = resources(&given).expect("Valid");
    assert_eq!(limits.memory().as_ref().and_then(|memory| memory.limit()), Some(1 << 20));
    assert_eq!(limits.memory().as_ref().and_then(|memory| memory.reservation()), None);
    assert_eq!(limits.cpu().as_ref().and_then(|cpu| cpu.cpus().clone()), None, "CPU numbers are the host's");
    assert!(limits.pids().is_none() && limits.hugepage_limits().is_none() && limits.devices().is_none());
}

#[test]
fn a_process_keeps_what_it_was_given() {
    let given = oci::Process {
        Args: vec!["a".into(), String::new()],
        Env: vec!["A=1".into()],
        User: MessageField::some(oci::User { UID: 5, GID: 6, AdditionalGids: vec![7], ..Default::default() }),
        Rlimits: vec![oci::POSIXRlimit { Type: "RLIMIT_NOFILE".into(), Hard: u64::MAX, Soft: 9, ..Default::default() }],
        OOMScoreAdj: -998,
        Capabilities: MessageField::some(oci::LinuxCapabilities::default()),
        ..Default::default()
    };
    let value = serde_json::to_value(process(&given).expect("Valid")).expect("JSON");
    assert_eq!(value["args"], json!(["a", ""]));
    assert_eq!(value["user"], json!({ "uid": 5, "gid": 6, "additionalGids": [7] }));
    assert_eq!(value["rlimits"], json!([{ "type": "RLIMIT_NOFILE", "hard": u64::MAX, "soft": 9 }]));
    assert_eq!((&value["oomScoreAdj"], &value["cwd"]), (&json!(-998), &json!("/")));
    assert_eq!(value["capabilities"]["effective"], json!([]), "No capabilities is not the default set");
    assert_eq!(value.get("noNewPrivileges"), None);
}
