//! Templates whose memory is elsewhere, and templates that come from there as a whole.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use inlay_tests::harness::{HOME, Scene};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::lazy::{LAZY, SLEEP, faults_and_prefetched};
use super::pool::spares;
use super::{NAME, file, make, mark, mark_seen_inside, remove, set_factory, take_starts, with_factory};
use crate::metrics::{metrics, value_of};

crate::for_inlay!(
    restores_from_a_server_and_then_from_what_has_come,
    boots_where_the_server_is_gone_and_keeps_the_template,
    ends_with_the_reason_when_the_server_goes_before_all_has_come,
    fills_the_pool_from_a_server,
    imports_all_of_a_template_and_maps_it,
);

/// A template that was exported, with chunks served from there.
struct Remote {
    directory: PathBuf,
    address: String,
    server: Option<Child>,
}

impl Remote {
    /// Makes a template of a machine, with a working set, exports it, and removes it from this node.
    #[track_caller]
    fn of(scene: &Scene, machine: &str) -> Self {
        with_factory(scene, machine, LAZY);
        make(scene);
        let directory = Path::new(HOME).join("exported");
        let _ = fs::remove_dir_all(&directory);
        println!("{}", scene.inlay(&["template", "export", NAME, directory.to_str().unwrap()]).ok().stdout.trim_end());
        remove(scene);
        let socket = Path::new(HOME).join("chunks");
        let _ = fs::remove_file(&socket);
        Self { directory, address: format!("unix:{}", socket.display()), server: None }
    }

    fn path(&self) -> &str {
        self.directory.to_str().unwrap()
    }

    /// Serves it, and makes a template of it whose memory stays there.
    #[track_caller]
    fn import(&mut self, scene: &Scene) {
        let socket = self.address.strip_prefix("unix:").unwrap().to_owned();
        let mut serve = scene.operator(&["template", "serve", self.path(), "--listen", &self.address]);
        self.server = Some(serve.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        scene.wait_for("the server of chunks", || UnixStream::connect(&socket).is_ok());
        // Another node gets no chunks.
        let chunks = self.directory.join("chunks");
        let away = self.directory.with_extension("chunks");
        fs::rename(&chunks, &away).unwrap();
        scene.inlay(&["template", "import", NAME, self.path(), "--chunks", &self.address]).ok();
        fs::rename(&away, &chunks).unwrap();
        assert!(!file("memory").exists() && file("index").exists());
    }

    /// Ends the server by a signal that it may answer, and returns whether it ended well.
    #[track_caller]
    fn end(&mut self, signal: Signal) -> bool {
        let mut server = self.server.take().unwrap();
        kill(Pid::from_raw(i32::try_from(server.id()).unwrap()), signal).unwrap();
        server.wait().unwrap().success()
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
        let _ = fs::remove_file(self.address.trim_start_matches("unix:"));
        let _ = fs::remove_dir_all(&self.directory);
    }
}

#[track_caller]
fn restored(scene: &Scene, id: &str) -> f64 {
    value_of(&metrics(scene), "inlay_start_restored", id, "")
}

/// Whether each page of a sandbox's memory has been given.
fn all_is_there(scene: &Scene, id: &str) -> bool {
    let text = metrics(scene);
    let of = |name| value_of(&text, name, id, "");
    let given = of("inlay_memory_copied_bytes_total") + of("inlay_memory_zero_pages_total") * 4096.0;
    given >= of("inlay_guest_memory_bytes")
}

fn restores_from_a_server_and_then_from_what_has_come(scene: &Scene) {
    let mut remote = Remote::of(scene, "");
    remote.import(scene);
    // Whatever this says.
    set_factory(scene, "", "template_memory = \"mapped\"");
    let list = scene.inlay(&["template", "list"]).ok().stdout;
    assert!(list.contains(&format!("fits; its memory is at {}", remote.address)), "{list}");
    scene.inlay(&["template", "verify", NAME]).ok();
    let check = scene.inlay(&["check"]).stdout;
    assert!(check.contains(&format!("its memory from {}", remote.address)), "{check}");

    let id = scene.start(SLEEP);
    let (faults, ahead) = faults_and_prefetched(scene, &id);
    assert!(faults > 0.0 && ahead > 0.0, "{faults} {ahead}");
    assert_eq!(mark_seen_inside(scene), mark(scene));
    scene.wait_for("all memory to come", || all_is_there(scene, &id));
    assert!(remote.end(Signal::SIGTERM));
    // It needs its server no more, and neither does the next one.
    let script = "find /sys /proc >/dev/null 2>&1; echo well";
    assert_eq!(scene.exec(&id, &["sh", "-c", script]).ok().stdout, "well\n");
    let second = scene.start(SLEEP);
    assert_eq!(restored(scene, &second), 1.0);
    assert_eq!(scene.exec(&second, &["sh", "-c", script]).ok().stdout, "well\n");
    let log = scene.log();
    assert!(log.contains("All of it comes from this node's cache") && !log.contains("The sandbox boots"), "{log}");
    scene.remove(&id);
    scene.remove(&second);
    remove(scene);
    assert!(!Path::new("/run/inlay/templates/.chunks").exists());
}

fn boots_where_the_server_is_gone_and_keeps_the_template(scene: &Scene) {
    let mut remote = Remote::of(scene, "");
    remote.import(scene);
    set_factory(scene, "", "chunk_cache_mib = 0");
    let imported = mark(scene);
    assert!(!remote.end(Signal::SIGKILL));
    take_starts();
    assert_eq!(scene.run(&["echo", "."]).ok().stdout, ".\n");
    assert_eq!(take_starts().iter().map(|start| start.restored).collect::<Vec<_>>(), [false]);
    let log = scene.log();
    let warned = log.lines().any(|line| {
        line.contains("The template is not used") && line.contains("does not come from") && line.contains("is gone")
    });
    assert!(warned, "{log}");
    let check = scene.inlay(&["check"]).stdout;
    assert!(check.contains("does not come from unix:"), "{check}");
    // Nothing is made in its place: the server may come back.
    assert_eq!(mark(scene), imported);
    let failed = scene.inlay(&["template", "verify", NAME]).failed();
    assert!(failed.stderr.contains("does not come from"), "{failed:?}");
    remote.import(scene);
    let id = scene.start(SLEEP);
    assert_eq!(restored(scene, &id), 1.0);
    scene.remove(&id);
    assert!(!Path::new("/run/inlay/templates/.chunks").exists());
    remove(scene);
}

/// A guest that is so large that it still needs its server when its container runs.
fn ends_with_the_reason_when_the_server_goes_before_all_has_come(scene: &Scene) {
    const LARGE: &str = "default_memory = 1024";
    let mut remote = Remote::of(scene, LARGE);
    remote.import(scene);
    set_factory(scene, LARGE, "chunk_cache_mib = 0");
    let id = scene.start(SLEEP);
    assert!(!all_is_there(scene, &id));
    remote.end(Signal::SIGKILL);
    scene.wait_for("the sandbox to end", || scene.state_of(&id).contains("STOPPED"));
    let log = scene.log();
    assert!(log.contains("The guest's memory is lost: The server of chunks is gone"), "{log}");
    scene.remove(&id);
    remove(scene);
}

fn fills_the_pool_from_a_server(scene: &Scene) {
    let mut remote = Remote::of(scene, "");
    remote.import(scene);
    set_factory(scene, "", "pool_size = 1");
    println!("{}", scene.inlay(&["pool", "fill"]).ok().stdout);
    let waiting = spares(scene);
    let id = scene.start(SLEEP);
    let pid = scene.pid_of(&id).cast_signed();
    assert!(waiting.contains(&pid), "{pid} was no spare: {waiting:?}");
    assert_eq!(restored(scene, &id), 1.0);
    assert_eq!(scene.exec(&id, &["hostname"]).ok().stdout.trim(), id);
    scene.wait_for("a full pool", || spares(scene).len() == 1);
    scene.remove(&id);
    remove(scene);
    assert!(!Path::new("/run/inlay/pool").exists());
}

fn imports_all_of_a_template_and_maps_it(scene: &Scene) {
    let remote = Remote::of(scene, "");
    set_factory(scene, "", "");
    // As if a bit had changed on its way.
    let state = remote.directory.join("state");
    let bytes = fs::read(&state).unwrap();
    let mut changed = bytes.clone();
    changed[1000] ^= 1;
    fs::write(&state, changed).unwrap();
    let failed = scene.inlay(&["template", "import", NAME, remote.path()]).failed();
    assert!(failed.stderr.contains("state is damaged"), "{failed:?}");
    assert_eq!(mark(scene), None);
    fs::write(&state, bytes).unwrap();

    println!("{}", scene.inlay(&["template", "import", NAME, remote.path()]).ok().stdout.trim_end());
    scene.inlay(&["template", "verify", NAME]).ok();
    let failed = scene.inlay(&["template", "export", NAME, remote.path()]).failed();
    assert!(failed.stderr.contains("has something in it"), "{failed:?}");
    let id = scene.start(SLEEP);
    assert_eq!(restored(scene, &id), 1.0);
    assert_eq!(value_of(&metrics(scene), "inlay_memory_lazy", &id, ""), 0.0);
    scene.remove(&id);
    assert_eq!(mark_seen_inside(scene), mark(scene));
    remove(scene);
}
