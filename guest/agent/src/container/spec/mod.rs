//! The request's OCI specification, turned into the bundle's `config.json`.
//!
//! The wire form has no "absent": zero, empty and not given are the same, so what is zero is left out. What a guest
//! cannot honour is refused by name; what the virtual machine provides in the container's stead is taken out:
//!
//! - network and IPC namespaces: the guest's own are the sandbox's,
//! - paths of namespaces: they name processes of the host,
//! - the device cgroup: the guest has only devices that the sandbox may use.

mod linux;
mod process;

use std::path::{Path, PathBuf};

use agent_proto::oci;
use oci_spec::runtime::Spec;
use serde_json::{Map, Value, json};
use thiserror::Error;

pub use linux::resources;
pub use process::process;

/// A specification that cannot be honoured.
#[derive(Debug, Error)]
pub enum Error {
    /// A part without which there is no container.
    #[error("The specification has no {0}")]
    Missing(&'static str),
    /// Something that a guest does not do.
    #[error("{0} is not supported in the guest")]
    Refused(String),
    /// A value outside its type or vocabulary.
    #[error("The specification is not valid: {0}")]
    Invalid(String),
    /// A cgroup path that leaves the hierarchy.
    #[error("The cgroup path {0:?} is not valid")]
    CgroupPath(String),
}

/// What the agent decides about a container, as opposed to what the request says.
#[derive(Debug, Clone, Copy)]
pub struct Placement<'a> {
    /// The container's root file system in the guest.
    pub rootfs: &'a Path,
    /// Below the cgroup mount, as [`super::cgroup::path`] gives it.
    pub cgroup: &'a Path,
    /// A process whose PID namespace is joined; without one the container gets its own.
    pub pid_namespace_of: Option<i32>,
}

/// A translated specification.
#[derive(Debug)]
pub struct Translated {
    /// The content of `config.json`.
    pub spec: Spec,
    /// Kernel parameters of namespaces that are the guest's: to be set in the guest, (name, value).
    pub guest_sysctls: Vec<(String, String)>,
}

/// Translates a container's specification.
pub fn translate(spec: &oci::Spec, placement: Placement<'_>) -> Result<Translated, Error> {
    refuse_hooks(spec.Hooks.as_ref())?;
    let linux = spec.Linux.as_ref().ok_or(Error::Missing("Linux section"))?;
    let root = spec.Root.as_ref().ok_or(Error::Missing("root"))?;
    let container_process = spec.Process.as_ref().ok_or(Error::Missing("process"))?;
    let sysctls = linux::split_sysctls(linux)?;

    let mut config = json!({
        "ociVersion": if spec.Version.is_empty() { "1.1.0" } else { &spec.Version },
        "process": process(container_process)?,
        "root": { "path": placement.rootfs, "readonly": root.Readonly },
        "mounts": spec.Mounts.iter().map(mount).collect::<Vec<_>>(),
        "linux": linux::linux(linux, &sysctls.container, placement)?,
    });
    if let Some(config) = config.as_object_mut() {
        // A container that shares the guest's UTS namespace (a pod on the host network) has the guest's name.
        if linux.Namespaces.iter().any(|namespace| namespace.Type == "uts") {
            put_text(config, "hostname", &spec.Hostname);
        }
        if !spec.Annotations.is_empty() {
            config.insert("annotations".into(), json!(spec.Annotations));
        }
    }
    let spec = serde_json::from_value(config).map_err(|error| Error::Invalid(error.to_string()))?;
    Ok(Translated { spec, guest_sysctls: sysctls.guest })
}

fn mount(mount: &oci::Mount) -> Value {
    let mut value = Map::new();
    value.insert("destination".into(), json!(mount.destination));
    put_text(&mut value, "source", &mount.source);
    put_text(&mut value, "type", &mount.type_);
    put_list(&mut value, "options", &mount.options);
    Value::Object(value)
}

/// Hooks are programs of the host; there is nothing here that they could run.
fn refuse_hooks(hooks: Option<&oci::Hooks>) -> Result<(), Error> {
    let Some(hooks) = hooks else { return Ok(()) };
    let kinds = [
        ("prestart", &hooks.Prestart),
        ("createRuntime", &hooks.CreateRuntime),
        ("createContainer", &hooks.CreateContainer),
        ("startContainer", &hooks.StartContainer),
        ("poststart", &hooks.Poststart),
        ("poststop", &hooks.Poststop),
    ];
    match kinds.into_iter().find_map(|(kind, list)| list.first().map(|hook| (kind, hook))) {
        Some((kind, hook)) => Err(Error::Refused(format!("The {kind} hook {:?}", hook.Path))),
        None => Ok(()),
    }
}

/// The root file system that the request names.
pub fn rootfs(spec: &oci::Spec) -> Result<PathBuf, Error> {
    let path = spec.Root.as_ref().map(|root| PathBuf::from(&root.Path)).unwrap_or_default();
    if path.is_absolute() { Ok(path) } else { Err(Error::Missing("absolute root path")) }
}

fn put_text(object: &mut Map<String, Value>, key: &str, text: &str) {
    if !text.is_empty() {
        object.insert(key.into(), text.into());
    }
}

fn put_list(object: &mut Map<String, Value>, key: &str, list: &[String]) {
    if !list.is_empty() {
        object.insert(key.into(), json!(list));
    }
}

fn put_number(object: &mut Map<String, Value>, key: &str, number: impl Into<serde_json::Number>) {
    let number = number.into();
    if number.as_i64() != Some(0) {
        object.insert(key.into(), Value::Number(number));
    }
}

#[cfg(test)]
mod tests;
