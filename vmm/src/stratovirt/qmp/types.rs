//! What there is to put into a machine, from the command line's own tables: libvirt asks before it makes a machine.

use serde_json::{Value, json};

use super::arguments::{DeviceListProperties, QueryCommandLineOptions};
use crate::stratovirt::command_line;

/// `qom-list-types`
pub fn list() -> Value {
    let kinds = |option| command_line::kinds(option).into_iter().map(|(kind, _)| kind);
    let devices = kinds("device").map(|kind| (kind, "virtio-device"));
    let objects = kinds("object").map(|kind| match kind.split_once('-') {
        Some(("memory", _)) => (kind, "memory-backend"),
        Some(("rng", _)) => (kind, "rng-backend"),
        _ => (kind, "object"),
    });
    devices.chain(objects).map(|(name, parent)| json!({"name": name, "parent": parent})).collect()
}

/// `device-list-properties`: those of `-device`, and what StratoVirt answers for every kind. A kind of another machine has the
/// properties of its like here.
pub fn properties(arguments: &DeviceListProperties) -> Value {
    let known = command_line::kinds("device");
    let stem = arguments.typename.trim_end_matches("-pci").trim_end_matches("-mmio").trim_end_matches("-device");
    let own = known.iter().find(|(kind, _)| !stem.is_empty() && kind.trim_end_matches("-device") == stem);
    let own = own.map(|(_, fields)| *fields).unwrap_or_default().iter().filter(|field| **field != "id");
    let own = own.map(|field| {
        let kind = match *field {
            "num-queues" | "queue-size" => "uint16",
            "deflate-on-oom" | "free-page-reporting" | "auto-balloon" => "bool",
            "guest-cid" => "uint32",
            "max-bytes" | "period" => "uint64",
            _ => "str",
        };
        json!({"name": field, "type": kind})
    });
    std::iter::once(json!({"name": "disable-legacy", "type": "OnOffAuto"})).chain(own).collect()
}

/// `query-command-line-options`
pub fn options(arguments: &QueryCommandLineOptions) -> Value {
    let asked = |option: &str| arguments.option.as_deref().is_none_or(|asked| asked == option);
    let options = command_line::catalogue().filter(|(option, _)| asked(option)).map(|(option, properties)| {
        let parameters: Vec<_> = properties.into_iter().map(|name| json!({"name": name, "type": "string"})).collect();
        json!({"option": option, "parameters": parameters})
    });
    options.collect()
}
