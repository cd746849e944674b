//! Sandboxes that are restored before anybody asks for them.

use std::fs;
use std::path::Path;

use inlay_tests::harness::{HOME, Scene};
use inlay_tests::images;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{make, mark_seen_inside, remove, set_factory, take_starts, with_factory};

crate::for_inlay!(
    gives_a_spare_to_a_start_and_fills_its_slot,
    goes_on_without_a_spare_that_was_killed,
    gives_no_spare_that_does_not_fit,
    boots_what_a_container_asks_for_after_a_spare_was_claimed,
    ends_spares_with_their_template,
);

fn gives_a_spare_to_a_start_and_fills_its_slot(scene: &Scene) {
    with_factory(scene, "", "pool_size = 2");
    let mark = make(scene);
    println!("{}", scene.inlay(&["pool", "fill"]).ok().stdout);
    let spares = spares(scene);
    assert_eq!(spares.len(), 2);
    take_starts();
    let id = scene.start(&["sleep", "1000"]);
    let pid = scene.pid_of(&id).cast_signed();
    assert!(spares.contains(&pid), "{pid} was no spare: {spares:?}");
    assert_eq!(scene.exec(&id, &["hostname"]).ok().stdout.trim(), id);
    assert!(Path::new("/run/inlay/sandboxes").join(&id).exists());
    // Its slot is filled when its start is over.
    scene.wait_for("a full pool", || self::spares(scene).len() == 2);
    assert!(!self::spares(scene).contains(&pid));
    scene.remove(&id);

    assert_eq!(mark_seen_inside(scene), Some(mark));
    assert!(take_starts().iter().all(|start| start.restored));
    scene.wait_for("a full pool", || self::spares(scene).len() == 2);
    remove(scene);
    assert!(!Path::new("/run/inlay/pool").exists());
}

fn goes_on_without_a_spare_that_was_killed(scene: &Scene) {
    with_factory(scene, "", "pool_size = 1");
    make(scene);
    scene.inlay(&["pool", "fill"]).ok();
    kill(Pid::from_raw(spares(scene)[0]), Signal::SIGKILL).unwrap();
    scene.wait_for("the end of the spare", || spares(scene).is_empty());
    assert_eq!(scene.run(&["echo", "."]).ok().stdout, ".\n");
    // What it has left is in nobody's way.
    scene.wait_for("a full pool", || spares(scene).len() == 1);
    scene.inlay(&["pool", "drain"]).ok();
    remove(scene);
}

fn gives_no_spare_that_does_not_fit(scene: &Scene) {
    with_factory(scene, "", "pool_size = 1");
    make(scene);
    scene.inlay(&["pool", "fill"]).ok();
    set_factory(scene, "default_memory = 200", "");
    take_starts();
    assert!(memory_inside(scene, &[]) < 200);
    assert_eq!(take_starts().iter().map(|start| start.restored).collect::<Vec<_>>(), [false]);
    scene.inlay(&["pool", "drain"]).ok();
    assert!(spares(scene).is_empty());
    scene.wait_for("the template of the other machine", || {
        scene.inlay(&["template", "list"]).stdout.contains("of 200 MiB  fits")
    });
    remove(scene);
}

/// Whoever claims a spare does not know yet that the container names another configuration file.
fn boots_what_a_container_asks_for_after_a_spare_was_claimed(scene: &Scene) {
    with_factory(scene, "", "pool_size = 1");
    make(scene);
    scene.inlay(&["pool", "fill"]).ok();
    let other = Path::new(HOME).join("other.toml");
    fs::write(&other, scene.parts.configuration("default_memory = 200")).unwrap();
    take_starts();
    assert!(memory_inside(scene, &["--runtime-config-path", other.to_str().unwrap()]) < 200);
    assert_eq!(take_starts().iter().map(|start| start.restored).collect::<Vec<_>>(), [false]);
    fs::remove_file(other).unwrap();
    scene.wait_for("a full pool", || spares(scene).len() == 1);
    remove(scene);
}

fn ends_spares_with_their_template(scene: &Scene) {
    with_factory(scene, "", "pool_size = 1");
    make(scene);
    scene.inlay(&["pool", "fill"]).ok();
    remove(scene);
    assert!(spares(scene).is_empty() && !Path::new("/run/inlay/pool").exists());
}

/// MiB of memory that a container's guest has.
#[track_caller]
fn memory_inside(scene: &Scene, options: &[&str]) -> u32 {
    let table = scene.run_with(options, images::BUSYBOX, &["free", "-m"]).ok().stdout;
    let line = table.lines().find(|line| line.starts_with("Mem:")).unwrap();
    line.split_whitespace().nth(1).and_then(|total| total.parse().ok()).unwrap()
}

/// Processes of spares that can be claimed.
#[track_caller]
pub(super) fn spares(scene: &Scene) -> Vec<i32> {
    let list = scene.inlay(&["pool", "list"]).ok().stdout;
    let ready = list.lines().filter(|line| line.ends_with("  ready"));
    ready.map(|line| line.split_whitespace().nth(1).unwrap().parse().unwrap()).collect()
}
