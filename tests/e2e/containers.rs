//! A container from an image, from start to end.

use inlay_tests::harness::Scene;
use inlay_tests::images;

crate::for_both_runtimes!(
    prints_the_seeds_dot,
    passes_an_exit_code_through,
    keeps_stderr_apart,
    honours_the_images_environment_directory_and_user,
    runs_an_image_of_several_layers,
    keeps_containers_apart,
    has_a_read_only_root_where_asked,
    names_the_missing_program,
    refuses_an_unknown_user,
);

fn prints_the_seeds_dot(scene: &Scene) {
    assert_eq!(scene.run(&["echo", "."]).ok().stdout, ".\n");
}

fn passes_an_exit_code_through(scene: &Scene) {
    assert_eq!(scene.run(&["sh", "-c", "exit 7"]).status.code(), Some(7));
}

fn keeps_stderr_apart(scene: &Scene) {
    let output = scene.run(&["sh", "-c", "echo out; echo err >&2"]).ok();
    assert_eq!(output.stdout, "out\n");
    assert_eq!(output.stderr, "err\n");
}

fn honours_the_images_environment_directory_and_user(scene: &Scene) {
    let script = "echo $GREETING; pwd; id -u; id -g; touch here && stat -c %u here";
    let output = scene.run_with(&[], images::BUSYBOX_AS_APP, &["sh", "-c", script]).ok();
    assert_eq!(output.stdout, "good day\n/home/app\n1000\n1000\n1000\n");
}

fn runs_an_image_of_several_layers(scene: &Scene) {
    scene.import_debian();
    let script = format!(
        "import os, sys; print(sys.version_info[0], os.path.exists('{}'), open('{}').read().strip())",
        images::REMOVED,
        images::REPLACED
    );
    let output = scene.run_with(&[], images::DEBIAN, &["python3", "-c", &script]).ok();
    assert_eq!(output.stdout, "3 False higher\n");
}

fn keeps_containers_apart(scene: &Scene) {
    let id = scene.start(&["sh", "-c", "echo mine > /tmp/file; exec sleep 1000"]);
    scene.wait_for("the file", || scene.exec(&id, &["cat", "/tmp/file"]).status.success());
    assert_eq!(scene.run(&["ls", "/tmp"]).ok().stdout, "");
    let processes = scene.exec(&id, &["ps", "-o", "args"]).ok().stdout;
    assert!(processes.contains("sleep 1000"), "{processes}");
    assert!(!processes.contains("containerd"), "{processes}");
    scene.remove(&id);
}

fn has_a_read_only_root_where_asked(scene: &Scene) {
    let output = scene.run_with(&["--read-only"], images::BUSYBOX, &["touch", "/file"]).failed();
    assert!(output.stderr.contains("Read-only file system"), "{output:?}");
}

/// The form is containerd's, whatever the runtime: `ctr: failed to create shim task: ...: unknown`.
fn names_the_missing_program(scene: &Scene) {
    let output = scene.run(&["/no/such/program"]).failed();
    assert!(output.stderr.starts_with("ctr: failed to create shim task: "), "{output:?}");
    assert!(output.stderr.contains("/no/such/program"), "{output:?}");
    assert!(output.stderr.contains("no such file or directory"), "{output:?}");
}

fn refuses_an_unknown_user(scene: &Scene) {
    let output = scene.run_with(&[], images::BUSYBOX_AS_NOBODY, &["true"]).failed();
    assert!(output.stderr.contains("no users found"), "{output:?}");
}
