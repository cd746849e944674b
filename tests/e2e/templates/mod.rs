//! Sandboxes that are restored from a template instead of being booted.

mod clock;
mod identity;
mod lazy;
mod life;
mod memory;
mod pool;
mod refusals;
mod remote;
mod together;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use inlay_tests::harness::trace::Start;
use inlay_tests::harness::{HOME, Scene, configure, containerd};
use inlay_tests::images;

/// The template of the usual configuration file.
const NAME: &str = "default";

/// A configuration whose sandboxes come from templates, with more lines for its `[factory]`; and no template, whatever a
/// failed test has left.
fn with_factory(scene: &Scene, machine: &str, factory: &str) {
    set_factory(scene, machine, factory);
    let _ = scene.inlay(&["template", "remove", NAME]);
}

/// The same configuration, and the template that there is.
fn set_factory(scene: &Scene, machine: &str, factory: &str) {
    let text = scene.parts.configuration(machine);
    configure(&format!("{text}\n[factory]\nenable_template = true\n{factory}\n")).unwrap();
}

/// Makes the template by hand, and returns its mark.
#[track_caller]
fn make(scene: &Scene) -> String {
    let made = scene.inlay(&["template", "create", NAME]).ok();
    println!("{} (made in {:.1} s)", made.stdout.trim_end(), made.wall.as_secs_f64());
    mark(scene).expect("a template")
}

/// What the kernel's log of each guest says that comes from the template; `None` while there is none.
fn mark(scene: &Scene) -> Option<String> {
    let shown = scene.inlay(&["template", "show", NAME]);
    let line = shown.stdout.lines().find(|line| line.starts_with("mark "))?;
    line.split_whitespace().nth(1).map(str::to_owned)
}

/// Waits for a template whose mark is not `other`.
#[track_caller]
fn wait_for_another(scene: &Scene, other: &str) {
    scene.wait_for("another template", || mark(scene).is_some_and(|mark| mark != other));
}

#[track_caller]
fn remove(scene: &Scene) {
    scene.inlay(&["template", "remove", NAME]).ok();
}

/// The file of the template's directory.
fn file(name: &str) -> PathBuf {
    Path::new("/run/inlay/templates").join(NAME).join(name)
}

/// Runs a container that prints its guest's kernel log, and returns the template's mark in it.
#[track_caller]
fn mark_seen_inside(scene: &Scene) -> Option<String> {
    let log = scene.run_with(&["--privileged"], images::BUSYBOX, &["dmesg"]).ok().stdout;
    find_mark(&log)
}

fn find_mark(log: &str) -> Option<String> {
    let line = log.lines().find(|line| line.contains("inlay-agent: template "))?;
    line.split_whitespace().last().map(str::to_owned)
}

fn ctr(args: &[&str]) -> Command {
    let mut command = containerd().command();
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a program in so many containers that are started at once, and returns what each of them prints.
#[track_caller]
fn run_at_once(scene: &Scene, count: usize, args: &[&str]) -> Vec<String> {
    let ids: Vec<String> = (0..count).map(|_| scene.id("together")).collect();
    let start = |id: &String| {
        let mut command = ctr(&["run", "--rm", "--privileged", "--runtime", scene.runtime.name(), images::BUSYBOX, id]);
        command.args(args).spawn().unwrap()
    };
    let children: Vec<_> = ids.iter().map(start).collect();
    let outputs: Vec<_> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    containerd().collect_garbage();
    let failed: Vec<_> = outputs.iter().filter(|output| !output.status.success()).collect();
    assert!(failed.is_empty(), "{} of {count} have failed: {failed:#?}", failed.len());
    outputs.iter().map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).collect()
}

/// The starts that have been traced since the last call.
fn take_starts() -> Vec<Start> {
    let path = Path::new(HOME).join("trace.jsonl");
    let starts = Start::read(&path).unwrap_or_default();
    let _ = fs::remove_file(path);
    starts
}
