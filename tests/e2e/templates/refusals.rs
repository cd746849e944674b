//! Templates that are not what they were, or not what is wanted: a sentence, a boot, and a new template.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use inlay_tests::harness::Scene;
use sha2::{Digest, Sha256};

use super::{NAME, file, make, remove, set_factory, take_starts, wait_for_another, with_factory};

crate::for_inlay!(
    refuses_by_name_what_is_not_what_was_saved_or_is_wanted,
    boots_where_a_template_is_refused_and_makes_another,
);

/// Each damage is undone again. A write to `memory` or `state` shows for ever, so that all of them are read from then on;
/// hence the order.
fn refuses_by_name_what_is_not_what_was_saved_or_is_wanted(scene: &Scene) {
    with_factory(scene, "", "");
    make(scene);
    let refused = |why: &[&str]| {
        let list = scene.inlay(&["template", "list"]).ok().stdout;
        let line = list.lines().find(|line| line.starts_with(NAME)).unwrap_or_default();
        for part in why {
            assert!(line.contains(part), "no {part:?} in {line}");
        }
    };
    refused(&[" fits"]);

    set_factory(scene, "default_memory = 320", "");
    refused(&["was made for another machine", "its memory is 256 MiB, and 320 MiB is wanted"]);
    set_factory(scene, "", "");

    let record = fs::read_to_string(file("template")).unwrap();
    fs::write(file("template"), record.replacen("inlay template 2", "inlay template 3", 1)).unwrap();
    refused(&["has no record that can be read", "another version"]);
    fs::write(file("template"), forge(&record, "\"inlay\": \"", "99.")).unwrap();
    refused(&["was made for another machine", "its version of Inlay is 99."]);
    fs::write(file("template"), forge(&record, "\"cpu\": \"", "Another")).unwrap();
    refused(&["was made for another machine", "its host's processor is Another"]);
    fs::write(file("template"), record).unwrap();

    let manifest = fs::read(file("manifest")).unwrap();
    cut("manifest");
    refused(&["is damaged", "its manifest is not the one that was saved"]);
    fs::write(file("manifest"), manifest).unwrap();
    refused(&[" fits"]);

    flip("state", 1000);
    refused(&["is damaged", "state is damaged"]);
    flip("state", 1000);
    refused(&[" fits"]);

    cut("memory");
    refused(&["is damaged", "memory has", "bytes where the manifest says"]);
    remove(scene);
}

/// Nothing reads all of a memory at a start; but that somebody wrote to it shows.
fn boots_where_a_template_is_refused_and_makes_another(scene: &Scene) {
    with_factory(scene, "", "");
    let first = make(scene);
    flip("memory", 0x100_0000);
    let verified = scene.inlay(&["template", "verify", NAME]).failed();
    assert!(verified.stderr.contains("is damaged in the"), "{verified:?}");
    boots_and_says(scene, "memory is damaged in the 1048576 bytes from 0x1000000 on");
    wait_for_another(scene, &first);
    scene.inlay(&["template", "verify", NAME]).ok();

    // As if the directory had come from another host.
    let second = super::mark(scene).unwrap();
    let record = fs::read_to_string(file("template")).unwrap();
    fs::write(file("template"), forge(&record, "\"cpu\": \"", "Another")).unwrap();
    boots_and_says(scene, "its host's processor is Another");
    wait_for_another(scene, &second);
    remove(scene);
}

#[track_caller]
fn boots_and_says(scene: &Scene, why: &str) {
    take_starts();
    assert_eq!(scene.run(&["echo", "."]).ok().stdout, ".\n");
    assert_eq!(take_starts().iter().map(|start| start.restored).collect::<Vec<_>>(), [false]);
    let log = scene.log();
    let warned = log.lines().any(|line| line.contains("The template is not used") && line.contains(why));
    assert!(warned, "no warning that {why:?} in {log}");
}

/// A record with `what` after `place`, and the checksum of that.
fn forge(record: &str, place: &str, what: &str) -> String {
    let (_, json) = record.split_once('\n').unwrap();
    let json = json.replacen(place, &format!("{place}{what}"), 1);
    let sum: String = Sha256::digest(&json).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("inlay template 2 {sum}\n{json}")
}

fn flip(name: &str, offset: u64) {
    let file = File::options().read(true).write(true).open(file(name)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

fn cut(name: &str) {
    let file = File::options().write(true).open(file(name)).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length - 1).unwrap();
}
