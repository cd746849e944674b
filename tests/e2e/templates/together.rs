//! Many at a time: starts from one template, removals that race creations, and turns.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::Duration;

use inlay_tests::harness::{Runtime, Scene, configure};
use inlay_tests::images;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::{NAME, ctr, find_mark, make, mark, remove, run_at_once, take_starts, with_factory};

crate::for_inlay!(
    starts_many_at_once_from_one_template,
    creates_while_others_and_the_template_are_removed,
    starts_in_turns_where_so_many_may_start_at_a_time,
    fails_by_name_when_no_turn_comes,
);

/// How many start at once. The nested host has two emulated processors: more is `containers --together`.
const AT_ONCE: usize = 10;
/// Who creates and removes at the same time, and how often each does.
const CREATORS: usize = 3;
const ROUNDS: usize = 2;

/// All of them wait for the one that makes it, so none of them boots.
fn starts_many_at_once_from_one_template(scene: &Scene) {
    with_factory(scene, "", "wait_for_template = true");
    take_starts();
    let logs = run_at_once(scene, AT_ONCE, &["dmesg"]);
    let mark = mark(scene);
    assert!(mark.is_some() && logs.iter().all(|log| find_mark(log) == mark), "{mark:?}");
    let starts = take_starts();
    assert!(starts.len() == AT_ONCE && starts.iter().all(|start| start.restored), "{starts:?}");
    remove(scene);
}

/// What one start or removal does to directories, mounts and control groups that they share must not fail another.
fn creates_while_others_and_the_template_are_removed(scene: &Scene) {
    with_factory(scene, "", "");
    make(scene);
    let ids: Vec<Vec<String>> = (0..CREATORS).map(|_| (0..ROUNDS).map(|_| scene.id("raced")).collect()).collect();
    let create_and_remove = |ids: &[String]| {
        for id in ids {
            let runtime = Runtime::Inlay.name();
            for args in [
                &["run", "--detach", "--runtime", runtime, images::BUSYBOX, id, "sleep", "1000"][..],
                &["task", "delete", "--force", id],
                &["container", "delete", id],
            ] {
                let output = ctr(args).output().unwrap();
                assert!(output.status.success(), "ctr {args:?}: {output:?}");
            }
        }
    };
    thread::scope(|scope| {
        let creators: Vec<_> = ids.iter().map(|ids| scope.spawn(move || create_and_remove(ids))).collect();
        while !creators.iter().all(thread::ScopedJoinHandle::is_finished) {
            // There may be none just now.
            scene.inlay(&["template", "remove", NAME]);
            thread::sleep(Duration::from_secs(1));
        }
    });
    scene.wait_for("the end of those who make templates", || !is_somebody_making());
    scene.inlay(&["template", "remove", NAME]);
}

fn is_somebody_making() -> bool {
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path().join("cmdline"));
    let commands = processes.filter_map(|path| fs::read(path).ok());
    commands.into_iter().any(|command| String::from_utf8_lossy(&command).contains("\0template\0create\0"))
}

/// A configuration in which one sandbox may start at a time.
fn with_one_at_a_time(scene: &Scene, deadline: u32) {
    with_factory(scene, "", "");
    let text = scene.parts.configuration("");
    let queue = format!("simultaneous_starts = 1\nstart_queue_deadline_ms = {deadline}");
    configure(&format!("{text}{queue}\n[factory]\nenable_template = true\n")).unwrap();
}

fn starts_in_turns_where_so_many_may_start_at_a_time(scene: &Scene) {
    with_one_at_a_time(scene, 60_000);
    make(scene);
    take_starts();
    run_at_once(scene, 4, &["echo", "."]);
    let mut windows: Vec<_> = take_starts().iter().map(|start| start.coming_up()).collect();
    windows.sort_by_key(|window| window.start);
    assert_eq!(windows.len(), 4);
    assert!(windows.is_sorted_by(|one, next| one.end <= next.start), "some start at the same time: {windows:?}");
    remove(scene);
}

/// The test holds the only slot, as a sandbox does that is starting.
fn fails_by_name_when_no_turn_comes(scene: &Scene) {
    with_one_at_a_time(scene, 1000);
    make(scene);
    // Makes the queue's directory.
    scene.run(&["true"]).ok();
    let slot = Path::new("/run/inlay/starts/slot-0");
    mkfifo(slot, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    let file = File::options().read(true).write(true).open(slot).unwrap();
    let held = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).unwrap();
    let error = scene.run(&["true"]).failed().stderr;
    for part in ["Cannot have a turn in the queue of starts", "within 1000 ms", "at most 1", "simultaneous_starts"] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    // As when its process is killed: the file stays, and is of no account.
    drop(held);
    scene.run(&["true"]).ok();
    assert_eq!(fs::read_dir("/run/inlay/starts").unwrap().count(), 0);
    remove(scene);
}
