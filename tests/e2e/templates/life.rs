//! The life of a template: made on first use, used, rebuilt, removed, given up.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use inlay_tests::harness::{HOME, Scene};
use inlay_tests::images;
use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::metrics::{metrics, value_of};

use super::{NAME, make, mark, mark_seen_inside, remove, take_starts, wait_for_another, with_factory};

crate::for_inlay!(
    boots_first_and_restores_from_then_on,
    restores_a_sandbox_that_works_as_a_booted_one,
    keeps_clones_whose_template_is_removed,
    goes_on_where_a_killed_maker_stopped,
    leaves_nothing_on_a_full_disk_and_boots,
    boots_where_no_template_can_be_kept,
);

/// The proof: a nonce that only the template's memory has.
fn boots_first_and_restores_from_then_on(scene: &Scene) {
    with_factory(scene, "", "");
    take_starts();
    assert_eq!(scene.run(&["echo", "."]).ok().stdout, ".\n");
    assert_eq!(take_starts().iter().map(|start| start.restored).collect::<Vec<_>>(), [false]);
    wait_for_another(scene, "");
    let mark = mark(scene).unwrap();
    println!("{}", scene.inlay(&["template", "list"]).ok().stdout);

    assert_eq!(mark_seen_inside(scene), Some(mark));
    assert_eq!(take_starts().iter().map(|start| start.restored).collect::<Vec<_>>(), [true]);
    let check = scene.inlay(&["check"]).stdout;
    assert!(check.contains("sandboxes are restored from /run/inlay/templates/default"), "{check}");
    remove(scene);
}

fn restores_a_sandbox_that_works_as_a_booted_one(scene: &Scene) {
    with_factory(scene, "", "");
    make(scene);
    let shown = scene.inlay(&["template", "show", NAME]).ok().stdout;
    assert!(shown.contains("KiB, which a start writes to first"), "{shown}");
    take_starts();
    assert_eq!(scene.run(&["sh", "-c", "exit 7"]).status.code(), Some(7));
    let input = "line\n".repeat(20_000);
    let output = scene.run_fed(input.clone().into_bytes(), "cat", std::time::Duration::from_secs(120)).ok();
    assert!(output.stdout == input, "{} bytes came back", output.stdout.len());
    let id = scene.id("tty");
    let args = ["run", "--rm", "--tty", "--runtime", scene.runtime.name(), images::BUSYBOX, &id, "sh"];
    let (seen, code) = scene.converse(&args, (30, 100), &[("# ", "stty size\n"), ("# ", "exit 4\n")]);
    assert!(code == Some(4) && seen.contains("30 100"), "{seen}");

    let id = scene.start(&["sleep", "1000"]);
    assert_eq!(scene.exec(&id, &["echo", "well"]).ok().stdout, "well\n");
    assert_eq!(scene.exec(&id, &["hostname"]).ok().stdout.trim(), id);
    // A container's start was recorded when the template was made.
    scene.wait_for("what the guest writes to", || {
        value_of(&metrics(scene), "inlay_memory_copied_ahead_bytes", &id, "") > f64::from(1 << 20)
    });
    scene.ctr(&["task", "pause", &id]).ok();
    assert!(scene.state_of(&id).contains("PAUSED"));
    scene.ctr(&["task", "resume", &id]).ok();
    assert!(scene.ctr(&["task", "metrics", &id]).ok().stdout.contains("memory"));
    scene.remove(&id);
    let starts = take_starts();
    assert!(starts.len() >= 2 && starts.iter().all(|start| start.restored), "{starts:?}");
    // The agent of a restored guest finds this shim's log again.
    assert!(!scene.log().contains("The template is not used"), "{}", scene.log());
    remove(scene);
}

fn keeps_clones_whose_template_is_removed(scene: &Scene) {
    with_factory(scene, "", "");
    let first = make(scene);
    let id = scene.start(&["sh", "-c", "echo mine > /tmp/file; exec sleep 1000"]);
    remove(scene);
    // Pages that nobody has touched yet come from a file without a name.
    let script =
        "cat /tmp/file; dd if=/dev/zero of=/dev/shm/x bs=1M count=16 2>/dev/null; cksum < /dev/shm/x; dmesg | tail -1";
    let output = scene.exec(&id, &["sh", "-c", script]).ok().stdout;
    assert!(output.starts_with("mine\n"), "{output}");
    // The next one boots, and has another template made.
    take_starts();
    scene.run(&["echo", "."]).ok();
    assert_eq!(take_starts().iter().map(|start| start.restored).collect::<Vec<_>>(), [false]);
    wait_for_another(scene, &first);
    assert_eq!(scene.exec(&id, &["echo", "still here"]).ok().stdout, "still here\n");
    scene.remove(&id);
    remove(scene);
}

fn goes_on_where_a_killed_maker_stopped(scene: &Scene) {
    with_factory(scene, "", "");
    let draft = Path::new("/run/inlay/templates/.default.draft");
    let mut maker = scene.operator(&["template", "create", NAME]).stdout(Stdio::null()).spawn().unwrap();
    scene.wait_for("the draft", || draft.join("share").exists());
    // Nobody who must not wait does.
    let busy = scene.inlay(&["template", "create", NAME, "--if-needed", "--no-wait"]).ok();
    assert!(busy.stdout.contains("Somebody else is making"), "{busy:?}");
    kill(Pid::from_raw(i32::try_from(maker.id()).unwrap()), Signal::SIGKILL).unwrap();
    maker.wait().unwrap();
    assert!(draft.exists());
    make(scene);
    assert!(!draft.exists());
    let names: Vec<_> = fs::read_dir("/run/inlay/templates").unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [NAME]);
    remove(scene);
}

fn leaves_nothing_on_a_full_disk_and_boots(scene: &Scene) {
    let dir = Path::new(HOME).join("small");
    fs::create_dir(&dir).unwrap();
    mount(Some("tmpfs"), &dir, Some("tmpfs"), MsFlags::empty(), Some("size=4m")).unwrap();
    with_factory(scene, "", &format!("template_path = \"{}\"", dir.display()));
    let failed = scene.inlay(&["template", "create", NAME]).failed();
    assert!(failed.stderr.contains("No space left on device"), "{failed:?}");
    let left: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, [".default.failed"]);
    // A start says why there is none, and that it was tried a short time ago.
    scene.run(&["true"]).ok();
    let log = scene.log();
    assert!(log.contains("No template is made, as this failed a short time ago"), "{log}");
    remove(scene);
    umount(&dir).unwrap();
    fs::remove_dir(&dir).unwrap();
}

fn boots_where_no_template_can_be_kept(scene: &Scene) {
    with_factory(scene, "", "template_path = \"/proc/version/templates\"");
    scene.run(&["true"]).ok();
    let log = scene.log();
    assert!(log.contains("The template is not used") && log.contains("/proc/version/templates"), "{log}");
}
