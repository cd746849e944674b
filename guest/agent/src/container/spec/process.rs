//! The process part of the specification: of a container's first process and of further ones alike.

use agent_proto::oci;
use oci_spec::runtime::Process;
use serde_json::{Map, Value, json};

use super::{Error, put_list, put_number};

/// Translates a process.
pub fn process(process: &oci::Process) -> Result<Process, Error> {
    // Labels of security modules that the guest's kernel does not have.
    if !process.ApparmorProfile.is_empty() {
        return Err(Error::Refused(format!("The AppArmor profile {:?}", process.ApparmorProfile)));
    }
    if !process.SelinuxLabel.is_empty() {
        return Err(Error::Refused(format!("The SELinux label {:?}", process.SelinuxLabel)));
    }
    let mut value = json!({
        "terminal": process.Terminal,
        "user": user(process.User.as_ref()),
        "args": process.Args,
        "env": process.Env,
        "cwd": if process.Cwd.is_empty() { "/" } else { &process.Cwd },
        "rlimits": process.Rlimits.iter().map(rlimit).collect::<Vec<_>>(),
    });
    if let Some(object) = value.as_object_mut() {
        // Said only when true: libcontainer takes a present value, even false, for "seccomp may be loaded last", which
        // the kernel refuses to a process without privileges and without no_new_privs.
        if process.NoNewPrivileges {
            object.insert("noNewPrivileges".into(), true.into());
        }
        put_number(object, "oomScoreAdj", process.OOMScoreAdj);
        if let Some(capabilities) = process.Capabilities.as_ref() {
            object.insert("capabilities".into(), self::capabilities(capabilities));
        }
    }
    serde_json::from_value(value).map_err(|error| Error::Invalid(error.to_string()))
}

fn user(user: Option<&oci::User>) -> Value {
    let Some(user) = user else { return json!({ "uid": 0, "gid": 0 }) };
    let mut value = Map::new();
    value.insert("uid".into(), user.UID.into());
    value.insert("gid".into(), user.GID.into());
    if !user.AdditionalGids.is_empty() {
        value.insert("additionalGids".into(), json!(user.AdditionalGids));
    }
    Value::Object(value)
}

fn rlimit(limit: &oci::POSIXRlimit) -> Value {
    json!({ "type": limit.Type, "hard": limit.Hard, "soft": limit.Soft })
}

/// Empty sets are sets: a process without capabilities is not one with default ones.
fn capabilities(sets: &oci::LinuxCapabilities) -> Value {
    let mut value = json!({
        "bounding": sets.Bounding,
        "effective": sets.Effective,
        "permitted": sets.Permitted,
    });
    if let Some(object) = value.as_object_mut() {
        put_list(object, "inheritable", &sets.Inheritable);
        put_list(object, "ambient", &sets.Ambient);
    }
    value
}
