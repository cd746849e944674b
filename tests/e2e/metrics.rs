//! What sandboxes tell about themselves, and `inlay metrics` about all of them.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use inlay_tests::harness::{Processes, Scene};
use nix::sys::signal::{Signal, kill};

use crate::faults::remove_fifos;

crate::for_inlay!(tells_of_every_sandbox_and_waits_for_none);

/// Longest that a shim which does not answer may hold up the others: 3 s are promised, and emulation is slow.
const LIMIT: Duration = Duration::from_secs(15);

/// The node's metrics.
#[track_caller]
pub fn metrics(scene: &Scene) -> String {
    scene.inlay(&["metrics"]).ok().stdout
}

/// The value of one line.
#[track_caller]
pub fn value(text: &str, name: &str) -> f64 {
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    found.unwrap_or_else(|| panic!("no {name} in\n{text}"))
}

/// The value of a metric of one sandbox; `labels` are those beside its id.
#[track_caller]
pub fn value_of(text: &str, name: &str, id: &str, labels: &str) -> f64 {
    value(text, &format!("{name}{{sandbox=\"{id}\"{labels}}}"))
}

/// Sandboxes, and those of them that do not answer.
#[track_caller]
fn counts(text: &str) -> (f64, f64) {
    (value(text, "inlay_sandboxes"), value(text, "inlay_sandboxes_unreachable"))
}

fn tells_of_every_sandbox_and_waits_for_none(scene: &Scene) {
    assert_eq!(counts(&metrics(scene)), (0.0, 0.0));
    let (one, other) = (scene.start(&["sleep", "1000"]), scene.start(&["sleep", "1000"]));
    scene.ctr(&["task", "pause", &other]).ok();
    let text = metrics(scene);
    assert_eq!(counts(&text), (2.0, 0.0));
    for id in [&one, &other] {
        let moment = |name: &str| value_of(&text, "inlay_start_moment_seconds", id, &format!(",moment=\"{name}\""));
        let moments = ["T1", "T2", "T3", "T4", "T5"].map(moment);
        assert!(moments[0] > 0.0 && moments.is_sorted(), "{moments:?}");
        assert_eq!(value_of(&text, "inlay_start_restored", id, ""), 0.0);
        assert_eq!(value_of(&text, "inlay_sandbox_state", id, ",state=\"running\""), 1.0);
        assert_eq!(value_of(&text, "inlay_guest_memory_bytes", id, ""), f64::from(256 << 20));
        // More than a shim alone, less than a guest whose memory is all there.
        let private = value_of(&text, "inlay_process_pss_bytes", id, ",part=\"private\"");
        assert!((f64::from(16 << 20)..f64::from(256 << 20)).contains(&private), "{private}");
    }
    assert_eq!(value_of(&text, "inlay_sandbox_containers", &one, ",state=\"running\""), 1.0);
    assert_eq!(value_of(&text, "inlay_sandbox_containers", &other, ",state=\"paused\""), 1.0);
    let heads: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE ")).collect();
    assert_eq!(heads.iter().collect::<HashSet<_>>().len(), heads.len(), "{text}");
    assert!(text.ends_with("# EOF\n"), "{text}");
    answers_others_while_one_connection_says_nothing(&one);

    let Processes { shim, .. } = Processes::of(&one);
    kill(shim, Signal::SIGSTOP).unwrap();
    let output = scene.inlay(&["metrics"]).ok();
    assert!(output.wall < LIMIT && output.stderr.contains(&one), "{output:?}");
    assert_eq!(counts(&output.stdout), (2.0, 1.0));
    assert_eq!(value_of(&output.stdout, "inlay_sandbox_containers", &other, ",state=\"paused\""), 1.0);
    kill(shim, Signal::SIGKILL).unwrap();
    scene.wait_for("containerd to notice", || !scene.state_of(&one).contains("RUNNING"));
    scene.ctr(&["task", "delete", "--force", &one]).ok_or_missing();
    scene.ctr(&["container", "delete", &one]).ok();
    remove_fifos(&one);
    assert_eq!(counts(&metrics(scene)), (1.0, 0.0));

    scene.ctr(&["task", "resume", &other]).ok();
    scene.remove(&other);
    assert_eq!(counts(&metrics(scene)), (0.0, 0.0));
}

/// As Prometheus would ask a single shim.
fn answers_others_while_one_connection_says_nothing(id: &str) {
    let connect = || UnixStream::connect(format!("/run/inlay/sandboxes/{id}/metrics")).unwrap();
    let _silent = connect();
    let mut client = connect();
    client.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert_eq!(value_of(&answer, "inlay_sandbox_containers", id, ",state=\"running\""), 1.0);
    assert!(!answer.contains("inlay_sandboxes"), "{answer}");
}
