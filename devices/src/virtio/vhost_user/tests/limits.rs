//! What cannot be.

use std::os::unix::net::UnixStream;

use vm_memory::GuestAddress;

use super::super::caller::Caller;
use super::super::rings::memory_table;
use super::*;
use crate::GuestMemory;

fn refused(change: impl FnOnce(&mut VhostUserConfig)) -> VhostUserError {
    let mut config = blk(Path::new("/nowhere/at/all"));
    change(&mut config);
    make(config).map(drop).unwrap_err()
}

#[test]
fn configurations_at_their_limits_and_past_them() {
    assert!(matches!(refused(|config| config.num_queues = 0), VhostUserError::Queues { queues: 0, .. }));
    assert!(matches!(refused(|config| config.num_queues = MAX_QUEUES + 1), VhostUserError::Queues { .. }));
    assert!(matches!(refused(|config| config.num_queues = MAX_QUEUES), VhostUserError::Backend { .. }));
    for size in [0, 1, 3, 1023, 2048] {
        assert!(matches!(refused(|config| config.queue_size = size), VhostUserError::QueueSize { .. }), "{size}");
    }
    for size in [2, 1024] {
        assert!(matches!(refused(|config| config.queue_size = size), VhostUserError::Backend { .. }), "{size}");
    }
    let fs = |tag: &str| VhostUserKind::Fs { tag: tag.into() };
    for tag in ["", "a\0b", "seven and thirty bytes are one too many"] {
        assert!(matches!(refused(|config| config.kind = fs(tag)), VhostUserError::Tag { .. }), "{tag:?}");
    }
    assert!(matches!(refused(|config| config.kind = fs(&"x".repeat(36))), VhostUserError::Backend { .. }));
    // One more queue for requests that must not wait.
    let past = refused(|config| (config.kind, config.num_queues) = (fs("x"), MAX_QUEUES));
    assert!(matches!(past, VhostUserError::Queues { .. }));
}

#[test]
fn sockets_that_are_none() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let long = dir.path().join("x".repeat(108));
    for path in [dir.path().join("missing"), file, long, "".into()] {
        let error = refused(|config| config.socket = path.clone());
        let VhostUserError::Backend { source: SessionError::Connect { .. }, .. } = error else {
            panic!("{path:?}: {error:?}");
        };
    }
}

#[test]
fn a_backend_that_takes_no_connections_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    // Until its queue of connections is full.
    let mut kept = Vec::new();
    while let Ok(stream) = super::super::session::connect(&socket) {
        kept.push(stream);
        assert!(kept.len() < 100_000);
    }
    let error = refused(|config| config.socket = socket.clone());
    assert!(matches!(error, VhostUserError::Backend { source: SessionError::Connect { .. }, .. }), "{error:?}");
}

#[test]
fn memory_that_is_not_shared_is_refused_by_its_address() {
    assert_eq!(memory_table(&crate::testkit::memory()).unwrap().len(), 2);
    let private = GuestMemory::from_ranges(&[(GuestAddress(0x1000), 0x1000)]).unwrap();
    let error = memory_table(&private).map(drop).unwrap_err();
    assert!(matches!(error, SessionError::PrivateMemory { address: 0x1000 }));
    let error = VhostUser::new(blk(Path::new("/nowhere")), &private, Confinement::On).map(drop).unwrap_err();
    assert!(matches!(error, VhostUserError::Backend { source: SessionError::PrivateMemory { .. }, .. }));
}

#[test]
fn the_thread_that_waits_is_confined_and_without_capabilities() {
    let status = |confinement| {
        let caller = Caller::new(confinement).unwrap();
        let (socket, _other) = UnixStream::pair().unwrap();
        // SAFETY: takes nothing and always succeeds.
        let call = caller.begin(socket, None, || unsafe { libc::gettid() });
        let thread = call.wait(PATIENCE.answers).unwrap();
        std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap()
    };
    let (confined, free) = (status(Confinement::On), status(Confinement::Off));
    assert!(confined.contains("Seccomp:\t2\n") && confined.contains("CapEff:\t0000000000000000\n"), "{confined}");
    assert!(!free.contains("Seccomp:\t2\n"), "{free}");
}
