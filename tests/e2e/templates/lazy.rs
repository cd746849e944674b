//! Memory of a template that comes page by page.

use std::fs::File;
use std::path::Path;

use inlay_tests::harness::Scene;

use super::{NAME, make, remove, set_factory, take_starts, with_factory};
use crate::metrics::{metrics, value_of};

crate::for_inlay!(
    restores_page_by_page_with_what_a_start_needs_ahead,
    ends_with_the_reason_when_the_memory_file_is_cut,
);

pub(super) const LAZY: &str = "template_memory = \"lazy\"";
/// Where the store has it.
const TEMPLATE: &str = "/run/inlay/templates/default";
pub(super) const SLEEP: &[&str] = &["sleep", "1000"];

/// Faults that were served for a sandbox, and bytes that came ahead of them.
#[track_caller]
pub(super) fn faults_and_prefetched(scene: &Scene, id: &str) -> (f64, f64) {
    let text = metrics(scene);
    assert_eq!(value_of(&text, "inlay_start_restored", id, ""), 1.0);
    let of = |name| value_of(&text, name, id, "");
    println!(
        "{id}: {} faults, {} KiB copied, {} KiB of it ahead, hit ratio {:.3}, {} late",
        of("inlay_memory_faults_total"),
        of("inlay_memory_copied_bytes_total") / 1024.0,
        of("inlay_memory_prefetched_bytes_total") / 1024.0,
        of("inlay_memory_working_set_hit_ratio"),
        of("inlay_memory_working_set_late_total"),
    );
    (of("inlay_memory_faults_total"), of("inlay_memory_prefetched_bytes_total"))
}

fn restores_page_by_page_with_what_a_start_needs_ahead(scene: &Scene) {
    // Made without: the template has no working set, and the sandbox nothing ahead.
    with_factory(scene, "", "");
    make(scene);
    let shown = scene.inlay(&["template", "show", NAME]).ok().stdout;
    assert!(!shown.contains("KiB, which a start asks for first"), "{shown}");
    set_factory(scene, "", LAZY);
    let id = scene.start(SLEEP);
    let (faults_without, ahead) = faults_and_prefetched(scene, &id);
    assert_eq!(ahead, 0.0);
    brings_what_is_missing_when_the_template_is_gone(scene, &id);

    make(scene);
    let shown = scene.inlay(&["template", "show", NAME]).ok().stdout;
    assert!(shown.contains("KiB, which a start asks for first"), "{shown}");
    scene.inlay(&["template", "verify", NAME]).ok();
    take_starts();
    let id = scene.start(&["sh", "-c", "echo .; exec sleep 1000"]);
    let (faults, ahead) = faults_and_prefetched(scene, &id);
    // A container was started for the working set too: what is left is what this one does differently.
    assert!(ahead > 0.0 && faults < faults_without * 0.5, "{faults} of {faults_without}, {ahead} ahead");
    assert_eq!(scene.exec(&id, &["echo", "well"]).ok().stdout, "well\n");
    let mut starts = Vec::new();
    scene.wait_for("the start's trace", || {
        starts.extend(take_starts());
        !starts.is_empty()
    });
    let memory = starts[0].memory.unwrap_or_else(|| panic!("{starts:?}"));
    assert!(starts[0].restored && memory.prefetched_bytes > 0 && memory.faults > 0, "{starts:?}");
    scene.remove(&id);
    assert!(!scene.log().contains("The sandbox boots"), "{}", scene.log());
    remove(scene);
}

fn brings_what_is_missing_when_the_template_is_gone(scene: &Scene, id: &str) {
    remove(scene);
    assert!(!Path::new(TEMPLATE).exists());
    let (before, _) = faults_and_prefetched(scene, id);
    // Code of the guest's that did not run yet, and memory that was free.
    let script = "find /sys /proc >/dev/null 2>&1; dd if=/dev/zero bs=1M count=16 2>/dev/null | wc -c";
    assert_eq!(scene.exec(id, &["sh", "-c", script]).ok().stdout, format!("{}\n", 16 << 20));
    let (after, _) = faults_and_prefetched(scene, id);
    assert!(after > before, "{before} {after}");
    scene.remove(id);
}

/// A mapping would kill the shim. Here the sandbox ends, as when its machine ends by itself, and the log says why.
fn ends_with_the_reason_when_the_memory_file_is_cut(scene: &Scene) {
    with_factory(scene, "", LAZY);
    make(scene);
    let id = scene.start(SLEEP);
    File::options().write(true).open(Path::new(TEMPLATE).join("memory")).unwrap().set_len(0).unwrap();
    let failed = scene.exec(&id, &["sh", "-c", "find /sys /proc >/dev/null"]).failed();
    println!("exec says: {}", failed.stderr);
    scene.wait_for("the sandbox to end", || scene.state_of(&id).contains("STOPPED"));
    let log = scene.log();
    assert!(log.contains("The guest has ended") && log.contains("The guest's memory is lost"), "{log}");
    scene.remove(&id);
    // The next start finds it out, and boots.
    assert_eq!(scene.run(&["echo", "."]).ok().stdout, ".\n");
    assert!(scene.log().contains("The template is not used"), "{}", scene.log());
    scene.wait_for("the template to be made anew", || scene.inlay(&["template", "verify", NAME]).status.success());
    remove(scene);
}
