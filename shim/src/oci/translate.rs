//! A container's specification as the guest gets it.
//!
//! Everything is decided here: what is passed on, what means something else in a guest, what stays behind, and what is
//! refused. Mounts of host files are the share's business ([`crate::resources::volumes`]) and arrive rewritten.

use std::collections::HashMap;

use agent_proto::oci;
use oci_spec::runtime::{Hook, Hooks, Linux, LinuxDevice, LinuxNamespace, LinuxNamespaceType, Spec};

use super::process::process;
use super::resources::resources;
use super::seccomp::seccomp;
use super::{SpecError, word};
use crate::ids::Id;

/// Device nodes that a guest makes for every container (OCI runtime specification, "Default Devices").
const DEFAULT_DEVICES: [&str; 7] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/console"];

/// What the guest needs to make a container.
#[derive(Debug)]
pub struct GuestSpec {
    /// The specification in the agent's form.
    pub spec: oci::Spec,
    /// The container shares the PID namespace of its sandbox.
    pub sandbox_pidns: bool,
    /// Parts of the specification that stayed behind and that somebody may miss.
    pub left_out: Vec<String>,
}

/// Translates `spec` for the container `id`, whose root file system and mounts the guest finds at `rootfs` and in
/// `mounts`.
pub fn for_guest(
    spec: &Spec,
    id: &Id,
    rootfs: String,
    mounts: Vec<oci::Mount>,
    with_seccomp: bool,
) -> Result<GuestSpec, SpecError> {
    refuse_hooks(spec.hooks().as_ref())?;
    let first = spec.process().as_ref().ok_or(SpecError::Missing("process"))?;
    let root = spec.root().as_ref().ok_or(SpecError::Missing("root"))?;
    let empty = Linux::default();
    let linux = spec.linux().as_ref().unwrap_or(&empty);
    let mut left_out = Vec::new();
    let guest = oci::Spec {
        Version: spec.version().clone(),
        Process: Some(process(first)).into(),
        Root: Some(oci::Root { Path: rootfs, Readonly: root.readonly().unwrap_or(false), ..oci::Root::default() })
            .into(),
        Hostname: spec.hostname().clone().unwrap_or_default(),
        Mounts: mounts,
        Annotations: spec.annotations().clone().unwrap_or_default(),
        Linux: Some(translate_linux(linux, id, with_seccomp, &mut left_out)).into(),
        ..oci::Spec::default()
    };
    let sandbox_pidns = namespaces(linux).any(|ns| ns.typ() == LinuxNamespaceType::Pid && ns.path().is_some());
    Ok(GuestSpec { spec: guest, sandbox_pidns, left_out })
}

fn translate_linux(linux: &Linux, id: &Id, with_seccomp: bool, left_out: &mut Vec<String>) -> oci::Linux {
    let profile = linux.seccomp().as_ref().filter(|_| with_seccomp).map(seccomp);
    oci::Linux {
        UIDMappings: id_mappings(linux.uid_mappings()),
        GIDMappings: id_mappings(linux.gid_mappings()),
        Sysctl: linux.sysctl().clone().unwrap_or_default(),
        Resources: linux.resources().as_ref().map(resources).into(),
        // The host's hierarchy means nothing in the guest, which has one level.
        CgroupsPath: format!("/{id}"),
        Namespaces: namespaces(linux).filter_map(namespace).collect(),
        Devices: devices(linux.devices().iter().flatten(), left_out),
        Seccomp: profile.into(),
        RootfsPropagation: linux.rootfs_propagation().clone().unwrap_or_default(),
        MaskedPaths: linux.masked_paths().clone().unwrap_or_default(),
        ReadonlyPaths: linux.readonly_paths().clone().unwrap_or_default(),
        ..oci::Linux::default()
    }
}

fn namespaces(linux: &Linux) -> impl Iterator<Item = &LinuxNamespace> {
    linux.namespaces().iter().flatten()
}

/// A namespace that a container gets in the guest. The network is the sandbox's, so the network namespace stays
/// behind; a PID namespace with a path is the sandbox's and travels as `sandbox_pidns`; other paths are the host's.
fn namespace(ns: &LinuxNamespace) -> Option<oci::LinuxNamespace> {
    match ns.typ() {
        LinuxNamespaceType::Network => None,
        LinuxNamespaceType::Pid if ns.path().is_some() => None,
        kind => Some(oci::LinuxNamespace { Type: word(&kind), ..oci::LinuxNamespace::default() }),
    }
}

fn id_mappings(mappings: &Option<Vec<oci_spec::runtime::LinuxIdMapping>>) -> Vec<oci::LinuxIDMapping> {
    let translate = |mapping: &oci_spec::runtime::LinuxIdMapping| oci::LinuxIDMapping {
        HostID: mapping.host_id(),
        ContainerID: mapping.container_id(),
        Size: mapping.size(),
        ..oci::LinuxIDMapping::default()
    };
    mappings.iter().flatten().map(translate).collect()
}

/// Device nodes that exist in a guest. A host's device is not one of them.
fn devices<'a>(all: impl Iterator<Item = &'a LinuxDevice>, left_out: &mut Vec<String>) -> Vec<oci::LinuxDevice> {
    let (kept, host): (Vec<_>, Vec<_>) =
        all.partition(|device| device.path().to_str().is_some_and(|path| DEFAULT_DEVICES.contains(&path)));
    left_out.extend(host.iter().map(|device| format!("device {}", device.path().display())));
    let translate = |device: &LinuxDevice| oci::LinuxDevice {
        Path: device.path().to_string_lossy().into_owned(),
        Type: word(&device.typ()),
        Major: device.major(),
        Minor: device.minor(),
        FileMode: device.file_mode().unwrap_or(0o666),
        UID: device.uid().unwrap_or(0),
        GID: device.gid().unwrap_or(0),
        ..oci::LinuxDevice::default()
    };
    kept.into_iter().map(translate).collect()
}

fn refuse_hooks(hooks: Option<&Hooks>) -> Result<(), SpecError> {
    let Some(hooks) = hooks else { return Ok(()) };
    #[allow(deprecated)] // `prestart` is deprecated by the specification and still used.
    let prestart = hooks.prestart();
    let kinds: HashMap<&'static str, &Option<Vec<Hook>>> = HashMap::from([
        ("prestart", prestart),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ]);
    match kinds.into_iter().find_map(|(kind, list)| Some((kind, list.as_ref()?.first()?))) {
        Some((kind, hook)) => Err(SpecError::Hook { kind, path: hook.path().display().to_string() }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts of what `ctr run` writes that are treated differently.
    fn spec() -> serde_json::Value {
        serde_json::json!({
            "ociVersion": "1.0.2-dev",
            "process": {
                "terminal": true,
                "consoleSize": {"height": 24, "width": 80},
                "user": {"uid": 1, "gid": 2, "additionalGids": [3]},
                "args": ["sh"], "env": ["A=b"], "cwd": "/",
                "capabilities": {"bounding": ["CAP_KILL", "CAP_CHOWN"]},
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}],
                "noNewPrivileges": true,
                "apparmorProfile": "containerd",
                "selinuxLabel": "x",
                "oomScoreAdj": -5
            },
            "root": {"path": "rootfs", "readonly": true},
            "hostname": "h",
            "linux": {
                "resources": {
                    "devices": [{"allow": false, "access": "rwm"}],
                    "memory": {"limit": 1000},
                    "cpu": {"shares": 10, "cpus": "0-3", "mems": "0"},
                    "pids": {"limit": 7}
                },
                "cgroupsPath": "/default/demo",
                "namespaces": [
                    {"type": "pid", "path": "/proc/1/ns/pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"},
                    {"type": "uts"}, {"type": "mount"}, {"type": "network"}
                ],
                "devices": [
                    {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
                    {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}
                ],
                "seccomp": {
                    "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"],
                    "syscalls": [{
                        "names": ["personality"], "action": "SCMP_ACT_ALLOW", "errnoRet": 38,
                        "args": [{"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ"}]
                    }]
                },
                "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/bus"]
            }
        })
    }

    fn translate(json: serde_json::Value, with_seccomp: bool) -> Result<GuestSpec, SpecError> {
        let spec: Spec = serde_json::from_value(json).unwrap();
        for_guest(&spec, &Id::try_from("demo").unwrap(), "/r".to_owned(), Vec::new(), with_seccomp)
    }

    #[test]
    fn the_process_is_passed_on_without_the_hosts_labels() {
        let guest = translate(spec(), true).unwrap().spec;
        let process = &guest.Process;
        assert!(process.Terminal && process.NoNewPrivileges);
        assert_eq!((process.ConsoleSize.Height, process.ConsoleSize.Width), (24, 80));
        assert_eq!((process.User.UID, process.User.GID, process.User.AdditionalGids.as_slice()), (1, 2, &[3][..]));
        assert_eq!(process.Args, ["sh"]);
        assert_eq!(process.Env, ["A=b"]);
        assert_eq!(process.Capabilities.Bounding, ["CAP_CHOWN", "CAP_KILL"]);
        assert_eq!((process.Rlimits[0].Type.as_str(), process.Rlimits[0].Soft), ("RLIMIT_NOFILE", 512));
        assert_eq!(process.OOMScoreAdj, -5);
        assert_eq!((process.ApparmorProfile.as_str(), process.SelinuxLabel.as_str()), ("", ""));
    }

    #[test]
    fn what_belongs_to_the_host_is_replaced_or_left_out() {
        let guest = translate(spec(), true).unwrap();
        let linux = &guest.spec.Linux;
        assert_eq!((guest.spec.Root.Path.as_str(), guest.spec.Root.Readonly), ("/r", true));
        assert_eq!(linux.CgroupsPath, "/demo");
        let kinds: Vec<&str> = linux.Namespaces.iter().map(|ns| ns.Type.as_str()).collect();
        assert_eq!(kinds, ["ipc", "uts", "mount"]);
        assert!(linux.Namespaces.iter().all(|ns| ns.Path.is_empty()));
        assert!(guest.sandbox_pidns);
        assert_eq!(linux.Devices.len(), 1);
        assert_eq!(guest.left_out, ["device /dev/sda"]);
        let resources = &linux.Resources;
        assert_eq!((resources.Memory.Limit, resources.CPU.Shares, resources.Pids.Limit), (1000, 10, 7));
        assert_eq!((resources.CPU.Cpus.as_str(), resources.CPU.Mems.as_str()), ("", ""));
        assert_eq!((resources.Devices[0].Type.as_str(), resources.Devices[0].Major), ("a", -1));
    }

    #[test]
    fn seccomp_is_applied_unless_the_configuration_says_otherwise() {
        let guest = translate(spec(), true).unwrap().spec;
        let profile = &guest.Linux.Seccomp;
        assert_eq!(profile.DefaultAction, "SCMP_ACT_ERRNO");
        assert_eq!(profile.Architectures, ["SCMP_ARCH_X86_64"]);
        assert_eq!(profile.Syscalls[0].Names, ["personality"]);
        assert_eq!(profile.Syscalls[0].errnoret(), 38);
        assert_eq!(profile.Syscalls[0].Args[0].Op, "SCMP_CMP_EQ");
        assert!(translate(spec(), false).unwrap().spec.Linux.Seccomp.is_none());
    }

    #[test]
    fn hooks_are_refused_by_name() {
        let mut json = spec();
        json["hooks"] = serde_json::json!({"poststop": [{"path": "/bin/x"}]});
        let error = translate(json, true).unwrap_err().to_string();
        assert!(error.starts_with("The poststop hook /bin/x is not supported"), "{error}");
    }

    #[test]
    fn a_specification_without_a_process_is_refused() {
        let mut json = spec();
        json.as_object_mut().unwrap().remove("process");
        assert!(matches!(translate(json, true), Err(SpecError::Missing("process"))));
    }
}
