//! Both ends in one process: the helper's server in a thread.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::unistd::Pid;

use super::*;
use crate::ids::Id;
use crate::resources::mount::{Mount, mounts_below};

/// A host with a sandbox `sb` and bundles, and a helper for it.
struct Stage {
    dir: tempfile::TempDir,
    helper: Option<Arc<Helper>>,
    server: Option<JoinHandle<io::Result<()>>>,
}

impl Stage {
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        for path in ["state/sb", "bundles/sb/rootfs", "lib/snapshots/1/fs", "lib/snapshots/2/fs", "data"] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let grounds = Grounds::new(&dir.path().join("bundles"), dir.path().join("state")).unwrap();
        let sandbox = dir.path().join("state/sb");
        let server = thread::spawn(move || server::serve(theirs, sandbox, grounds));
        // Some child of this process, to have an identity: nobody asks for it.
        let helper = Helper::new(ours, Pid::this()).unwrap();
        Some(Self { dir, helper: Some(Arc::new(helper)), server: Some(server) })
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn text(&self, path: &str) -> String {
        self.path(path).to_str().unwrap().to_owned()
    }

    fn helper(&self) -> Arc<Helper> {
        Arc::clone(self.helper.as_ref().unwrap())
    }

    fn specify(&self, container: &str, sources: &[&Path]) {
        let mounts: Vec<_> = sources.iter().map(|source| serde_json::json!({"source": source})).collect();
        let bundle = self.path("bundles").join(container);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let text = serde_json::json!({"root": {"path": "rootfs"}, "mounts": mounts, "process": {"args": []}});
        fs::write(bundle.join("config.json"), text.to_string()).unwrap();
    }

    fn share(&self, named: Named) -> Share {
        Share::make(self.helper(), &self.path("state/sb"), named).unwrap()
    }

    /// The first container's root file system is bound from a snapshot.
    fn named(&self) -> Named {
        Named { rootfs: vec![Mount::bind(&self.text("lib/snapshots/1/fs"), false)], logger: None }
    }
}

fn id(text: &str) -> Id {
    Id::try_from(text).unwrap()
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, crate::resources::ResourceError>, words: &str) {
    let text = result.unwrap_err().to_string();
    assert!(text.contains(words), "{text}");
}

#[test]
fn a_container_is_mounted_and_taken_down() {
    let Some(stage) = Stage::new() else { return };
    stage.specify("sb", &[&stage.path("data")]);
    let share = stage.share(stage.named());
    let mut place = share.add_container(&id("sb")).unwrap();
    let rootfs = place.mount_rootfs(stage.named().rootfs).unwrap();
    assert_eq!(rootfs, "/run/kata-containers/shared/containers/sb/rootfs");
    let volume = place.add_volume(&stage.path("data"), true).unwrap();
    assert_eq!(volume, "/run/kata-containers/shared/containers/sb/mounts/1-data");
    let points: Vec<_> = place.mount_points().map(Path::to_owned).collect();
    let mut mounted = mounts_below(&stage.path("state")).unwrap();
    mounted.retain(|point| *point != share.exported());
    assert_eq!((points.len(), mounted.len()), (2, 2));
    assert!(points.iter().all(|point| mounted.contains(point)), "{points:?} {mounted:?}");
    refused(share.add_container(&id("sb")), "already has a container sb");
    drop(place);
    drop(share);
    assert_eq!(fs::read_dir(stage.path("state/sb")).unwrap().count(), 0);
}

#[test]
fn the_bundles_own_root_file_system_is_found_in_it() {
    let Some(stage) = Stage::new() else { return };
    stage.specify("sb", &[]);
    fs::write(stage.path("bundles/sb/rootfs/file"), "").unwrap();
    let share = stage.share(Named::default());
    let mut place = share.add_container(&id("sb")).unwrap();
    stage.helper().seal().unwrap();
    place.mount_rootfs(Vec::new()).unwrap();
    assert!(stage.path("state/sb/shared/sb/rootfs/file").exists());
}

#[test]
fn with_a_guest_the_shim_gets_what_containerd_has_named_and_nothing_else() {
    let Some(stage) = Stage::new() else { return };
    stage.specify("sb", &[&stage.path("data"), Path::new("/proc/sys"), Path::new("/dev/null"), &stage.path("state")]);
    symlink("/etc", stage.path("lib/snapshots/2/fs/link")).unwrap();
    let share = stage.share(stage.named());
    let mut place = share.add_container(&id("sb")).unwrap();
    stage.helper().seal().unwrap();

    // A snapshot beside the first, but nothing around it, and no way through a link that a guest has made.
    place.mount_rootfs(vec![Mount::bind(&stage.text("lib/snapshots/2/fs"), false)]).unwrap();
    for elsewhere in ["/", "/etc", &stage.text("lib/snapshots"), &stage.text("lib"), &stage.text("data")] {
        refused(place.mount_rootfs(vec![Mount::bind(elsewhere, false)]), "was not named before the guest ran");
    }
    for path in ["lib/snapshots/2/fs/link", "lib/snapshots/../../data"] {
        refused(place.mount_rootfs(vec![Mount::bind(&stage.text(path), false)]), "Cannot use");
    }
    let overlay = |options: &[String]| Mount {
        fs_type: "overlay".to_owned(),
        source: "overlay".to_owned(),
        options: options.to_vec(),
    };
    let layers = format!("lowerdir={}:/etc", stage.text("lib/snapshots/2/fs"));
    refused(place.mount_rootfs(vec![overlay(&[layers])]), "/etc was not named");
    let tmpfs = Mount { fs_type: "tmpfs".to_owned(), source: stage.text("lib/snapshots/2/fs"), options: Vec::new() };
    refused(place.mount_rootfs(vec![tmpfs]), "of type tmpfs was not named");

    // Volumes of the specification; of the kernel and of other sandboxes not even these.
    place.add_volume(&stage.path("data"), false).unwrap();
    refused(place.add_volume(Path::new("/etc"), true), "The specification of sb has no mount of /etc");
    refused(place.add_volume(Path::new("/proc/sys"), true), "is a file of the kernel of the host");
    refused(place.add_volume(Path::new("/dev/null"), true), "is a device of the host");
    refused(place.add_volume(&stage.path("state"), true), "is the state of sandboxes of the host");

    // Nor a new beginning.
    refused(Share::make(stage.helper(), &stage.path("state/sb"), stage.named()), "A second sandbox was not named");
    let program = Program { path: "/bin/true".into(), arguments: Vec::new() };
    let null = fs::File::open("/dev/null").unwrap();
    let descriptor = || std::os::fd::AsFd::as_fd(&null);
    let error = stage.helper().start_logger(&program, "c", "n", [descriptor(), descriptor(), descriptor()]);
    assert!(error.unwrap_err().to_string().starts_with("The logging program /bin/true was not named"));
}

#[test]
fn what_cannot_be_read_is_refused_and_does_no_harm() {
    let Some(stage) = Stage::new() else { return };
    stage.specify("x", &[]);
    let share = stage.share(stage.named());
    let place = share.add_container(&id("x")).unwrap();
    for nonsense in [&b"{"[..], b"\"Sael\"", &[0xff; 100], &[b'['; wire::MAX_PACKET], &[b'['; wire::MAX_PACKET + 1]] {
        assert!(matches!(stage.helper().ask_raw(nonsense), Err(HelperError::Refused(_))));
    }
    // What it could not read has done no harm.
    refused(share.add_container(&id("x")), "already has a container x");
    drop(place);
    let mut again = share.add_container(&id("x")).unwrap();
    // As long as a request may be, and one that is longer.
    refused(again.mount_rootfs(vec![Mount::bind(&"x".repeat(wire::MAX_PACKET - 200), false)]), "Cannot use xxx");
    refused(again.mount_rootfs(vec![Mount::bind(&"x".repeat(wire::MAX_PACKET), false)]), "cannot be asked");
    again.mount_rootfs(Vec::new()).unwrap();
}

#[test]
fn a_shim_that_is_gone_leaves_nothing_mounted() {
    let Some(mut stage) = Stage::new() else { return };
    stage.specify("sb", &[]);
    let share = stage.share(Named::default());
    let mut place = share.add_container(&id("sb")).unwrap();
    place.mount_rootfs(Vec::new()).unwrap();
    assert_eq!(mounts_below(&stage.path("state")).unwrap().len(), 2);
    // The values do not get to give anything back, as when the process is killed.
    stage.helper().close();
    stage.server.take().unwrap().join().unwrap().unwrap();
    assert!(mounts_below(&stage.path("state")).unwrap().is_empty());
    assert_eq!(fs::read_dir(stage.path("state/sb")).unwrap().count(), 0);
    refused(share.add_container(&id("y")), "helper process has ended");
    drop(place);
}
