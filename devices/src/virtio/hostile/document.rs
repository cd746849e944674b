//! `docs/hostile.md` names tests that exist, and every test of the checklist.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

const DOCUMENT: &str = include_str!("../../../../docs/hostile.md");

/// Below this, each device has a module of its own.
const CHECKLIST: &str = "virtio::hostile::";

/// The one whose queues another process looks into.
const WITHOUT_QUEUES: &str = "vhost_user";

/// Words by which the page explains itself, which are no tests.
const EXPLAINED: [&str; 5] = ["virtio::hostile::document", "virtio::", "legacy::", "*::", "*+::"];

/// The names of all tests of this crate.
fn tests() -> BTreeSet<String> {
    let output = Command::new(std::env::current_exe().unwrap()).args(["--list", "--format", "terse"]).output().unwrap();
    let list = String::from_utf8(output.stdout).unwrap();
    list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

/// What stands between backticks and is a name of a test.
fn names() -> impl Iterator<Item = &'static str> {
    DOCUMENT.split('`').skip(1).step_by(2).filter(|word| word.contains("::") || word.contains(".rs: "))
}

/// By device, the lines of the checklist that it is held against.
fn checklist(tests: &BTreeSet<String>) -> BTreeMap<&str, BTreeSet<&str>> {
    let mut devices: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for name in tests.iter().filter_map(|test| test.strip_prefix(CHECKLIST)) {
        if let Some((device, line)) = name.split_once("::").filter(|(device, _)| *device != "document") {
            devices.entry(device).or_default().insert(line);
        }
    }
    devices
}

fn is_in_file(name: &str) -> bool {
    let (file, test) = name.split_once(": ").unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::fs::read_to_string(root.join(file)).is_ok_and(|text| text.contains(&format!("fn {test}(")))
}

#[test]
fn every_name_is_a_test() {
    let tests = tests();
    let devices = checklist(&tests);
    let exists = |name: &str| {
        if name.contains(".rs: ") {
            return is_in_file(name);
        }
        if let Some(line) = name.strip_prefix("*+::") {
            return devices.values().all(|lines| lines.contains(line));
        }
        if let Some(line) = name.strip_prefix("*::") {
            return devices.iter().all(|(device, lines)| *device == WITHOUT_QUEUES || lines.contains(line));
        }
        tests.contains(name) || tests.contains(&format!("virtio::{name}"))
    };
    let missing: Vec<_> = names().filter(|name| !EXPLAINED.contains(name) && !exists(name)).collect();
    assert!(missing.is_empty(), "docs/hostile.md names tests that there are not: {missing:#?}");
}

#[test]
fn every_line_of_the_checklist_is_in_the_document() {
    let tests = tests();
    let devices = checklist(&tests);
    let named: BTreeSet<_> = names().collect();
    let forgotten: BTreeSet<_> = devices
        .values()
        .flatten()
        .filter(|line| {
            !named.contains(format!("*::{line}").as_str()) && !named.contains(format!("*+::{line}").as_str())
        })
        .collect();
    assert!(forgotten.is_empty(), "docs/hostile.md does not name {forgotten:#?}");
    for device in devices.keys() {
        assert!(named_devices().contains(device), "docs/hostile.md does not know the device {device}");
    }
}

/// The devices that the introduction lists.
fn named_devices() -> BTreeSet<&'static str> {
    let introduction = DOCUMENT.split("\n## ").next().unwrap();
    introduction.split('`').skip(1).step_by(2).collect()
}
