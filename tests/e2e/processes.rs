//! Processes of a running container: exec, signals, pause, states, containerd's restart.

use std::process::Stdio;
use std::time::Duration;

use inlay_tests::harness::{Scene, containerd};
use inlay_tests::images;

crate::for_both_runtimes!(
    runs_a_program_in_a_running_container,
    passes_the_exit_code_of_an_exec_through,
    kills_with_sigkill,
    passes_a_signal_on,
    pauses_and_resumes,
    lists_processes_and_tells_metrics,
    survives_a_thousand_children,
    outlives_containerd,
    runs_several_containers_at_once,
);

/// Emulated, a thousand programs start in two to four minutes.
const THOUSAND_LIMIT: Duration = Duration::from_secs(480);

fn runs_a_program_in_a_running_container(scene: &Scene) {
    let id = scene.start(&["sh", "-c", "echo here > /tmp/mark; exec sleep 1000"]);
    scene.wait_for("the mark", || scene.exec(&id, &["cat", "/tmp/mark"]).stdout == "here\n");
    let output = scene.ctr(&[
        "task",
        "exec",
        "--exec-id",
        "user",
        "--user",
        "1000:1000",
        "--cwd",
        "/home/app",
        &id,
        "sh",
        "-c",
        "id -u; pwd",
    ]);
    assert_eq!(output.ok().stdout, "1000\n/home/app\n");
    scene.remove(&id);
}

fn passes_the_exit_code_of_an_exec_through(scene: &Scene) {
    let id = scene.start(&["sleep", "1000"]);
    assert_eq!(scene.exec(&id, &["sh", "-c", "exit 9"]).status.code(), Some(9));
    scene.exec(&id, &["/no/such/program"]).failed();
    // Neither has hurt the container.
    assert_eq!(scene.exec(&id, &["echo", "well"]).ok().stdout, "well\n");
    scene.remove(&id);
}

fn kills_with_sigkill(scene: &Scene) {
    let id = scene.start(&["sleep", "1000"]);
    assert!(scene.state_of(&id).contains("RUNNING"));
    scene.ctr(&["task", "kill", "--signal", "KILL", &id]).ok();
    scene.wait_for("the end", || scene.state_of(&id).contains("STOPPED"));
    // 128 + SIGKILL.
    delete(scene, &id, 137);
}

fn passes_a_signal_on(scene: &Scene) {
    let id = scene.start(&["sh", "-c", "trap 'exit 5' TERM; touch /tmp/ready; while true; do sleep 0.1; done"]);
    scene.wait_for("the trap", || scene.exec(&id, &["ls", "/tmp/ready"]).status.success());
    scene.ctr(&["task", "kill", "--signal", "TERM", &id]).ok();
    scene.wait_for("the end", || scene.state_of(&id).contains("STOPPED"));
    delete(scene, &id, 5);
}

/// Removes a container whose process has ended with `code`, which `ctr` tells as a warning.
#[track_caller]
fn delete(scene: &Scene, id: &str, code: i32) {
    let deleted = scene.ctr(&["task", "delete", id]).ok();
    assert!(deleted.stderr.contains(&format!("non-zero exit code {code}\"")), "{deleted:?}");
    scene.ctr(&["container", "delete", id]).ok();
}

fn pauses_and_resumes(scene: &Scene) {
    let id = scene.start(&["sleep", "1000"]);
    scene.ctr(&["task", "pause", &id]).ok();
    assert!(scene.state_of(&id).contains("PAUSED"), "{}", scene.state_of(&id));
    scene.ctr(&["task", "resume", &id]).ok();
    assert!(scene.state_of(&id).contains("RUNNING"), "{}", scene.state_of(&id));
    assert_eq!(scene.exec(&id, &["echo", "awake"]).ok().stdout, "awake\n");
    scene.remove(&id);
}

fn lists_processes_and_tells_metrics(scene: &Scene) {
    let id = scene.start(&["sleep", "1000"]);
    let pids = scene.ctr(&["task", "ps", &id]).ok().stdout;
    assert!(pids.lines().count() >= 2, "{pids}");
    let metrics = scene.ctr(&["task", "metrics", &id]).ok().stdout;
    assert!(metrics.contains("memory"), "{metrics}");
    scene.remove(&id);
}

fn survives_a_thousand_children(scene: &Scene) {
    let script = "i=0; while [ $i -lt 1000 ]; do sleep 2 & i=$((i+1)); done; wait; echo all $i";
    let output = scene.run_fed(Vec::new(), &format!("sh -c '{script}'"), THOUSAND_LIMIT).ok();
    assert_eq!(output.stdout, "all 1000\n");
}

fn outlives_containerd(scene: &Scene) {
    let id = scene.start(&["sleep", "1000"]);
    containerd().restart().unwrap();
    assert!(scene.state_of(&id).contains("RUNNING"), "{}", scene.state_of(&id));
    assert_eq!(scene.exec(&id, &["echo", "still here"]).ok().stdout, "still here\n");
    scene.remove(&id);
}

fn runs_several_containers_at_once(scene: &Scene) {
    let ids: Vec<String> = (0..3).map(|_| scene.id("many")).collect();
    // `Containerd::command` needs the lock only while it is made: the three run side by side.
    let children: Vec<_> = ids
        .iter()
        .map(|id| {
            let mut command = containerd().command();
            command.args(["run", "--rm", "--runtime", scene.runtime.name(), images::BUSYBOX, id, "echo", id]);
            command.stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (id, child) in ids.iter().zip(children) {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{id}\n"));
    }
}
