//! What an operator switches on and off.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use super::*;

/// A lock as `fcntl` and FUSE have it.
const READ: u32 = libc::F_RDLCK as u32;
const WRITE: u32 = libc::F_WRLCK as u32;
const UNLOCK: u32 = libc::F_UNLCK as u32;

fn world(change: impl FnOnce(&mut FsConfig)) -> World {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("share")).unwrap();
    let mut config = config(&dir.path().join("share"), CachePolicy::Auto);
    change(&mut config);
    World { client: Client::new(config), dir }
}

fn lock(
    client: &mut Client,
    opcode: Opcode,
    (node, handle): (u64, u64),
    owner: u64,
    (start, end): (u64, u64),
    kind: u32,
    flags: u32,
) -> Answer {
    let mut body = longs([handle, owner, start, end]);
    body.extend(words([kind, 7, flags, 0]));
    client.call(opcode, node, &body)
}

/// Whether somebody else on the host may lock the first byte for writing.
fn free_on_the_host(file: &File) -> bool {
    let mut lock = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 0, l_len: 1, l_pid: 0 };
    // SAFETY: `lock` is valid for reading and writing.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) }, 0);
    lock.l_type == libc::F_UNLCK as i16
}

#[test]
fn locks_count_on_the_host_and_between_owners() {
    let mut world = world(|config| config.posix_locks = true);
    let (entry, handle) = world.client.create(c"file", libc::O_RDWR, 0o600).unwrap();
    let host = File::options().read(true).write(true).open(world.path("file")).unwrap();
    let client = &mut world.client;
    let file = (entry.nodeid, handle);
    lock(client, Opcode::Setlk, file, 1, (0, 9), WRITE, 0).unwrap();
    assert!(!free_on_the_host(&host));
    // The same owner may lock it again, another may not, and learns what is in its way.
    lock(client, Opcode::Setlk, file, 1, (0, 4), WRITE, 0).unwrap();
    assert_eq!(lock(client, Opcode::Setlk, file, 2, (5, 5), READ, 0).map(drop), Err(libc::EAGAIN));
    let found = lock(client, Opcode::Getlk, file, 2, (5, 100), READ, 0).unwrap();
    assert_eq!((long_at(&found, 0), long_at(&found, 8), word_at(&found, 16)), (0, 9, WRITE));
    lock(client, Opcode::Setlk, file, 2, (10, i64::MAX as u64), READ, 0).unwrap();
    let found = lock(client, Opcode::Getlk, file, 1, (50, 50), WRITE, 0).unwrap();
    assert_eq!((long_at(&found, 0), long_at(&found, 8), word_at(&found, 16)), (10, i64::MAX as u64, READ));

    lock(client, Opcode::Setlk, file, 1, (0, 9), UNLOCK, 0).unwrap();
    assert!(free_on_the_host(&host));
    // Closing the file in the guest gives up what is left.
    lock(client, Opcode::Setlk, file, 1, (0, 0), WRITE, 0).unwrap();
    let mut body = longs([handle]);
    body.extend(words([0, 0]));
    body.extend(longs([1]));
    client.call(Opcode::Flush, entry.nodeid, &body).unwrap();
    assert!(free_on_the_host(&host));
    // And so does a reset.
    lock(client, Opcode::Setlk, file, 1, (0, 0), WRITE, 0).unwrap();
    assert!(!free_on_the_host(&host));
    client.running.guest.set_status(0);
    assert!(free_on_the_host(&host));
}

#[test]
fn locks_that_make_no_sense_or_would_wait() {
    let mut world = world(|config| config.posix_locks = true);
    let (entry, handle) = world.client.create(c"file", libc::O_RDWR, 0o600).unwrap();
    let client = &mut world.client;
    let file = (entry.nodeid, handle);
    let refused = |client: &mut Client, opcode, range, kind, flags| {
        lock(client, opcode, file, 1, range, kind, flags).map(drop).unwrap_err()
    };
    assert_eq!(refused(client, Opcode::Setlkw, (0, 1), WRITE, 0), libc::EOPNOTSUPP);
    assert_eq!(refused(client, Opcode::Setlk, (0, 1), WRITE, 1), libc::ENOSYS);
    assert_eq!(refused(client, Opcode::Setlk, (2, 1), WRITE, 0), libc::EINVAL);
    assert_eq!(refused(client, Opcode::Setlk, (0, u64::MAX), WRITE, 0), libc::EINVAL);
    assert_eq!(refused(client, Opcode::Setlk, (0, 1), 77, 0), libc::EINVAL);
    assert_eq!(lock(client, Opcode::Setlk, (entry.nodeid, 999), 1, (0, 1), READ, 0).map(drop), Err(libc::EBADF));
    assert_eq!(lock(client, Opcode::Setlk, (ROOT_ID, handle), 1, (0, 1), READ, 0).map(drop), Err(libc::EBADF));
}

#[test]
fn without_their_switches_locks_and_attributes_are_not_known() {
    let mut world = world(|config| config.xattr = false);
    let (entry, handle) = world.client.create(c"file", libc::O_RDWR, 0o600).unwrap();
    let client = &mut world.client;
    for opcode in [Opcode::Getlk, Opcode::Setlk] {
        let answer = lock(client, opcode, (entry.nodeid, handle), 1, (0, 1), WRITE, 0);
        assert_eq!(answer.map(drop), Err(libc::ENOSYS));
    }
    let mut set = words([1, 0]);
    set.extend(b"user.a\0x");
    let mut get = words([100, 0]);
    get.extend(b"user.a\0");
    for (opcode, body) in [
        (Opcode::Setxattr, set),
        (Opcode::Getxattr, get),
        (Opcode::Listxattr, words([100, 0])),
        (Opcode::Removexattr, b"user.a\0".to_vec()),
    ] {
        assert_eq!(client.call(opcode, entry.nodeid, &body).map(drop), Err(libc::ENOSYS), "{opcode:?}");
    }
}

#[test]
fn threads_and_queues_at_their_limits() {
    let dir = tempfile::tempdir().unwrap();
    let make = |change: &dyn Fn(&mut FsConfig)| {
        let mut config = config(dir.path(), CachePolicy::Never);
        change(&mut config);
        Fs::new(config, Confinement::On).map(|fs| fs.queue_max_sizes().len())
    };
    assert_eq!(make(&|config| config.workers = MAX_WORKERS).unwrap(), 2);
    assert!(matches!(make(&|config| config.workers = MAX_WORKERS + 1), Err(FsError::Workers(17))));
    assert_eq!(make(&|config| config.num_request_queues = MAX_REQUEST_QUEUES).unwrap(), 9);
    assert!(matches!(
        make(&|config| config.num_request_queues = MAX_REQUEST_QUEUES + 1),
        Err(FsError::RequestQueues(9))
    ));
}

#[test]
fn every_request_queue_serves() {
    let mut world = world(|config| config.num_request_queues = 3);
    fs::write(world.path("file"), "content").unwrap();
    let running = &mut world.client.running;
    let header = InHeader { len: 45, opcode: Opcode::Lookup as u32, unique: 9, nodeid: ROOT_ID, ..InHeader::default() };
    running.guest.poke(REQUEST, header.as_slice());
    running.guest.poke(REQUEST + 40, b"file\0");
    for queue in 0..4 {
        let chain = [Buffer::readable(REQUEST, 45), Buffer::writable(ANSWER, 0x1000)];
        running.rings[queue].offer(&chain);
        running.guest.kick(queue as u32);
        assert_eq!(running.wait_used(queue, 1)[0].1 as usize, HEAD + size_of::<EntryOut>(), "{queue}");
    }
}
