//! The configuration file.

use std::fs;

use inlay_tests::harness::{CONFIGURATION, Scene, configure};

crate::for_inlay!(
    names_a_configuration_that_is_not_toml,
    names_a_value_that_cannot_be,
    names_a_configuration_that_cannot_be_read,
    warns_of_an_unknown_key_and_names_the_nearest,
);

fn names_a_configuration_that_is_not_toml(scene: &Scene) {
    configure("[hypervisor.inlay\nkernel = 1").unwrap();
    let output = scene.run(&["true"]).failed();
    assert!(output.stderr.contains(CONFIGURATION), "{output:?}");
    assert!(output.stderr.contains("is not TOML"), "{output:?}");
}

fn names_a_value_that_cannot_be(scene: &Scene) {
    configure(&scene.parts.configuration("default_memory = \"lots\"")).unwrap();
    let output = scene.run(&["true"]).failed();
    assert!(output.stderr.contains("default_memory"), "{output:?}");
}

/// For root no file is unreadable by its mode; a directory in its place is.
fn names_a_configuration_that_cannot_be_read(scene: &Scene) {
    fs::remove_file(CONFIGURATION).unwrap();
    fs::create_dir(CONFIGURATION).unwrap();
    let output = scene.run(&["true"]);
    fs::remove_dir(CONFIGURATION).unwrap();
    let output = output.failed();
    assert!(output.stderr.contains(CONFIGURATION), "{output:?}");
    assert!(output.stderr.contains("Cannot read"), "{output:?}");
}

fn warns_of_an_unknown_key_and_names_the_nearest(scene: &Scene) {
    configure(&scene.parts.configuration("default_memroy = 300")).unwrap();
    scene.run(&["true"]).ok();
    let log = scene.log();
    let warning = log.lines().find(|line| line.contains("default_memroy"));
    let warning = warning.expect("no warning of the unknown key in the log");
    assert!(warning.contains("default_memory"), "{warning}");
}
