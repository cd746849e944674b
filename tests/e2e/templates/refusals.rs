//! Templates that are not what they were, or not what is wanted: a sentence in the log, a boot, and a new template.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use inlay_tests::harness::Scene;

use super::{NAME, file, make, remove, take_starts, wait_for_another, with_factory};

crate::for_inlay!(
    refuses_a_memory_that_was_cut,
    refuses_a_memory_in_which_one_bit_is_another,
    refuses_a_state_in_which_one_bit_is_another,
    refuses_a_manifest_that_was_cut,
    refuses_a_record_of_another_version,
    refuses_a_machine_of_another_size,
);

/// Something is done to the template; then a start says what is wrong, boots, and has the template made again.
#[track_caller]
fn refused(scene: &Scene, damage: impl FnOnce(), why: &[&str]) {
    with_factory(scene, "", "");
    let first = make(scene);
    damage();
    boots_and_says(scene, why);
    wait_for_another(scene, &first);
    scene.inlay(&["template", "verify", NAME]).ok();
    remove(scene);
}

#[track_caller]
fn boots_and_says(scene: &Scene, why: &[&str]) {
    take_starts();
    assert_eq!(scene.run(&["echo", "."]).ok().stdout, ".\n");
    assert_eq!(take_starts().iter().map(|start| start.restored).collect::<Vec<_>>(), [false]);
    let log = scene.log();
    let warning = log.lines().find(|line| line.contains("The sandbox boots")).expect("no warning in the log");
    for part in why {
        assert!(warning.contains(part), "no {part:?} in {warning}");
    }
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

fn refuses_a_memory_that_was_cut(scene: &Scene) {
    refused(scene, || cut("memory"), &["is damaged", "memory has", "bytes where the manifest says"]);
}

/// Nothing reads all of a memory at a start; but that somebody wrote to it shows.
fn refuses_a_memory_in_which_one_bit_is_another(scene: &Scene) {
    let damage = || {
        flip("memory", 0x100_0000);
        let verified = scene.inlay(&["template", "verify", NAME]).failed();
        assert!(verified.stderr.contains("is damaged in the"), "{verified:?}");
    };
    refused(scene, damage, &["is damaged", "memory is damaged in the 1048576 bytes from 0x1000000 on"]);
}

fn refuses_a_state_in_which_one_bit_is_another(scene: &Scene) {
    refused(scene, || flip("state", 1000), &["is damaged", "state is damaged"]);
}

fn refuses_a_manifest_that_was_cut(scene: &Scene) {
    refused(scene, || cut("manifest"), &["is damaged", "its manifest is not the one that was saved"]);
}

fn refuses_a_record_of_another_version(scene: &Scene) {
    let damage = || {
        let record = fs::read_to_string(file("template")).unwrap();
        fs::write(file("template"), record.replacen("inlay template 1", "inlay template 2", 1)).unwrap();
    };
    refused(scene, damage, &["has no record that can be read", "another version"]);
}

fn refuses_a_machine_of_another_size(scene: &Scene) {
    with_factory(scene, "", "");
    make(scene);
    with_factory(scene, "default_memory = 320", "");
    boots_and_says(scene, &["its memory is 256 MiB, and 320 MiB is wanted"]);
    let list = || scene.inlay(&["template", "list"]).ok().stdout;
    scene.wait_for("the other template", || list().lines().any(|line| line.ends_with(" fits")));
    remove(scene);
}
