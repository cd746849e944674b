//! A guest that wants out, or wants the host's memory and time.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};

use proptest::prelude::*;

use super::*;

/// The device still serves.
fn assert_alive(client: &mut Client) {
    let handle = client.call(Opcode::Opendir, ROOT_ID, &words([0, 0])).unwrap();
    let mut body = handle[..8].to_vec();
    body.extend(words([0, 0, 0, 0]));
    client.call(Opcode::Releasedir, ROOT_ID, &body).unwrap();
}

#[test]
fn names_lead_nowhere_but_down() {
    let mut world = World::new();
    let dir = world.client.mkdir(ROOT_ID, c"dir", 0o755).unwrap().nodeid;
    let client = &mut world.client;
    for name in [c"..", c".", c"", c"/", c"/etc/passwd", c"../secret", c"dir/..", c"../../../../etc/passwd"] {
        for parent in [ROOT_ID, dir] {
            assert_eq!(client.lookup(parent, name).map(drop), Err(libc::EINVAL), "{name:?}");
            assert!(client.create_in(parent, name, libc::O_RDWR, 0o600).is_err(), "{name:?}");
            assert!(client.mkdir(parent, name, 0o755).is_err(), "{name:?}");
            assert!(client.call(Opcode::Unlink, parent, name.to_bytes_with_nul()).is_err());
            assert!(client.call(Opcode::Rmdir, parent, name.to_bytes_with_nul()).is_err());
            let mut body = longs([ROOT_ID]);
            body.extend(name.to_bytes_with_nul());
            body.extend(b"got\0");
            assert!(client.call(Opcode::Rename, parent, &body).is_err());
            let mut body = longs([dir]);
            body.extend(b"dir\0");
            body.extend(name.to_bytes_with_nul());
            assert!(client.call(Opcode::Rename, parent, &body).is_err());
            let mut body = longs([dir]);
            body.extend(name.to_bytes_with_nul());
            assert!(client.call(Opcode::Link, parent, &body).is_err());
            let mut body = name.to_bytes_with_nul().to_vec();
            body.extend(b"target\0");
            assert!(client.call(Opcode::Symlink, parent, &body).is_err());
        }
    }
    assert!(world.secret().exists());
    assert!(world.path("dir").exists());
}

#[test]
fn symbolic_links_are_never_followed_here() {
    let mut world = World::new();
    let targets =
        [world.secret(), "../secret".into(), "/etc".into(), "/proc/self/fd/0".into(), "/dev/zero".into(), "/".into()];
    for target in targets {
        let _ = fs::remove_file(world.path("link"));
        symlink(&target, world.path("link")).unwrap();
        let client = &mut world.client;
        let link = client.lookup(ROOT_ID, c"link").unwrap();
        assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(client.call(Opcode::Readlink, link.nodeid, &[]).unwrap(), target.as_os_str().as_encoded_bytes());
        assert_eq!(client.open(link.nodeid, libc::O_RDONLY), Err(libc::EPERM));
        assert_eq!(client.call(Opcode::Opendir, link.nodeid, &words([0, 0])).map(drop), Err(libc::ENOTDIR));
        assert_eq!(client.lookup(link.nodeid, c"passwd").map(drop), Err(libc::ENOTDIR));
        assert!(client.mkdir(link.nodeid, c"made", 0o755).is_err());
        // A name of an existing link is not made anew, and not opened through.
        for flags in [
            libc::O_RDWR,
            libc::O_RDONLY | libc::O_TRUNC,
            libc::O_PATH,
            libc::O_PATH | libc::O_DIRECTORY,
            libc::O_TMPFILE | libc::O_RDWR,
            libc::O_DIRECTORY,
        ] {
            assert!(client.create(c"link", flags, 0o600).is_err(), "{flags:o}");
        }
        // What is changed is the link, or nothing.
        let _ = client.setattr(link.nodeid, 1, |body| body[68..72].copy_from_slice(&[0xff, 1, 0, 0]));
        let _ = client.setattr(link.nodeid, 8, |_| {});
        client.forget(link.nodeid, 1);
    }
    assert_eq!(fs::read(world.secret()).unwrap(), b"secret");
    assert_ne!(fs::metadata(world.secret()).unwrap().mode() & 0o7777, 0o777);
}

#[test]
fn a_link_put_in_a_files_place_after_lookup_changes_nothing() {
    let mut world = World::new();
    fs::write(world.path("file"), "good").unwrap();
    fs::create_dir(world.path("dir")).unwrap();
    let file = world.client.lookup(ROOT_ID, c"file").unwrap().nodeid;
    let dir = world.client.lookup(ROOT_ID, c"dir").unwrap().nodeid;
    fs::remove_file(world.path("file")).unwrap();
    symlink(world.secret(), world.path("file")).unwrap();
    fs::remove_dir(world.path("dir")).unwrap();
    symlink(world.dir.path(), world.path("dir")).unwrap();
    let client = &mut world.client;
    let handle = client.open(file, libc::O_RDWR | libc::O_TRUNC).unwrap();
    client.write(file, handle, 0, b"bad").unwrap();
    client.setattr(file, 1, |body| body[68..72].copy_from_slice(&[0xff, 1, 0, 0])).unwrap();
    assert_eq!(client.lookup(dir, c"secret").map(drop), Err(libc::ENOENT));
    assert!(client.create_in(dir, c"made", libc::O_RDWR, 0o600).is_err());
    assert_eq!(fs::read(world.secret()).unwrap(), b"secret");
    assert!(!world.dir.path().join("made").exists());
}

#[test]
fn device_nodes_are_not_made_and_not_opened() {
    let mut world = World::new();
    for kind in [libc::S_IFCHR, libc::S_IFBLK, libc::S_IFDIR, libc::S_IFLNK, 0o170_000] {
        let made = world.client.mknod(c"node", kind | 0o666, 0x103);
        assert_eq!(made.map(drop), Err(libc::EPERM), "{kind:o}");
    }
    assert!(!world.path("node").exists());
    // Some are there because a layer of an image has them, or because the host made them.
    let status = std::process::Command::new("mknod").arg(world.path("zero")).args(["c", "1", "5"]).status();
    if !status.is_ok_and(|status| status.success()) {
        eprintln!("Skipped: making a device node needs CAP_MKNOD");
        return;
    }
    let zero = world.client.lookup(ROOT_ID, c"zero").unwrap();
    assert_eq!(zero.attr.rdev, 0x105);
    for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_WRONLY | libc::O_TRUNC] {
        assert_eq!(world.client.open(zero.nodeid, flags), Err(libc::EPERM));
        assert!(world.client.create(c"zero", flags, 0o600).is_err());
    }
    assert!(world.client.setattr(zero.nodeid, 8, |_| {}).is_err());
    assert!(fs::metadata(world.path("zero")).unwrap().file_type().is_char_device());
}

#[test]
fn a_fifo_without_reader_holds_nobody_up() {
    let mut world = World::new();
    let fifo = world.client.mknod(c"fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
        assert_eq!(world.client.open(fifo.nodeid, flags), Err(libc::EPERM));
        assert!(world.client.create(c"fifo", flags, 0o600).is_err());
    }
    assert!(world.client.setattr(fifo.nodeid, 8, |_| {}).is_err());
    assert_alive(&mut world.client);
}

#[test]
fn numbers_mean_nothing_after_they_are_given_back() {
    let mut world = World::new();
    let (entry, handle) = world.client.create(c"file", libc::O_RDWR, 0o600).unwrap();
    let client = &mut world.client;
    let node = entry.nodeid;
    // A handle is good for its own node alone.
    assert_eq!(client.read(ROOT_ID, handle, 0, 10), Err(libc::EBADF));
    assert_eq!(client.read(node, handle + 1, 0, 10), Err(libc::EBADF));
    assert_eq!(client.release(ROOT_ID, handle).map(drop), Err(libc::EBADF));
    client.release(node, handle).unwrap();
    assert_eq!(client.read(node, handle, 0, 10), Err(libc::EBADF));
    assert_eq!(client.write(node, handle, 0, b"x"), Err(libc::EBADF));
    assert_eq!(client.release(node, handle).map(drop), Err(libc::EBADF));

    client.forget(node, 1);
    assert_eq!(client.open(node, libc::O_RDONLY), Err(libc::EBADF));
    assert!(client.call(Opcode::Getattr, node, &longs([0, 0])).is_err());
    assert_ne!(client.lookup(ROOT_ID, c"file").unwrap().nodeid, node);

    for node in [0, 2, u64::MAX, 1 << 63] {
        assert_eq!(client.open(node, libc::O_RDONLY), Err(libc::EBADF));
        assert_eq!(client.lookup(node, c"file").map(drop), Err(libc::EBADF));
        client.forget(node, u64::MAX);
    }
    client.forget(ROOT_ID, u64::MAX);
    assert_alive(client);
}

#[test]
fn saying_init_again_or_destroy_starts_anew() {
    let mut world = World::new();
    let (entry, handle) = world.client.create(c"file", libc::O_RDWR, 0o600).unwrap();
    let client = &mut world.client;
    client.init().unwrap();
    assert_eq!(client.read(entry.nodeid, handle, 0, 1), Err(libc::EBADF));
    assert_eq!(client.open(entry.nodeid, 0), Err(libc::EBADF));
    let node = client.lookup(ROOT_ID, c"file").unwrap().nodeid;
    client.open(node, 0).unwrap();

    // The root's path means something else by now; the root does not.
    let share = world.dir.path().join("share");
    fs::rename(&share, world.dir.path().join("away")).unwrap();
    symlink("/", &share).unwrap();
    let client = &mut world.client;
    client.send(Opcode::Destroy as u32, 0, &[], 40, 0x100);
    assert_eq!(client.open(node, 0), Err(libc::EBADF));
    assert!(client.lookup(ROOT_ID, c"file").is_ok());
    assert_eq!(client.lookup(ROOT_ID, c"etc").map(drop), Err(libc::ENOENT));
}

#[test]
fn attributes_of_other_namespaces_and_of_absurd_sizes() {
    let mut world = World::new();
    let (entry, _) = world.client.create(c"file", libc::O_RDWR, 0o600).unwrap();
    let client = &mut world.client;
    for name in ["trusted.overlay.opaque", "trusted.x", "security.selinux", "security.ima", "system.sockprotoname"] {
        let mut body = words([1, 0]);
        body.extend(format!("{name}\0y").as_bytes());
        let set = client.call(Opcode::Setxattr, entry.nodeid, &body);
        assert_eq!(set.map(drop), Err(libc::EOPNOTSUPP), "{name}");
        let mut name = name.as_bytes().to_vec();
        name.push(0);
        let remove = client.call(Opcode::Removexattr, entry.nodeid, &name);
        assert_eq!(remove.map(drop), Err(libc::EOPNOTSUPP));
    }
    for len in [65536, 65537, 1 << 20] {
        let mut body = words([len, 0]);
        body.extend(b"user.bomb\0");
        body.resize(18 + len as usize, 7);
        assert!(client.call(Opcode::Setxattr, entry.nodeid, &body).is_err() || len == 65536, "{len}");
    }
    let mut body = words([1, 0]);
    body.extend(vec![b'n'; 100_000]);
    body.extend(b"\0v");
    assert!(client.call(Opcode::Setxattr, entry.nodeid, &body).is_err());
    // A length that is not the value's.
    for claimed in [0, 2, u32::MAX] {
        let mut body = words([claimed, 0]);
        body.extend(b"user.a\0v");
        assert_eq!(client.call(Opcode::Setxattr, entry.nodeid, &body).map(drop), Err(libc::EINVAL));
    }
    let _ = client.call(Opcode::Listxattr, entry.nodeid, &words([u32::MAX, 0]));
    assert_alive(client);
}

#[test]
fn sizes_that_lie() {
    let mut world = World::new();
    fs::write(world.path("file"), "content").unwrap();
    let client = &mut world.client;
    let node = client.lookup(ROOT_ID, c"file").unwrap().nodeid;
    let handle = client.open(node, libc::O_RDWR).unwrap();
    // More than there is room for.
    for size in [8, 1 << 20, u32::MAX] {
        let mut body = longs([handle, 0]);
        body.extend(words([size, 0, 0, 0, 0, 0]));
        assert_eq!(client.call_with_room(Opcode::Read, node, &body, 20), Err(libc::EIO), "{size}");
    }
    for offset in [u64::MAX, 1 << 63, u64::MAX - 3] {
        let _ = client.read(node, handle, offset, 10);
        let _ = client.write(node, handle, offset, b"x");
    }
    // More than was sent.
    for size in [5, 1 << 20, u32::MAX] {
        let mut body = longs([handle, 0]);
        body.extend(words([size, 0, 0, 0, 0, 0]));
        body.extend(b"data");
        assert_eq!(word_at(&client.call(Opcode::Write, node, &body).unwrap(), 0), 4);
    }
    assert_eq!(fs::read(world.path("file")).unwrap(), b"dataent");
    // No room for an answer at all.
    assert_eq!(world.client.send(Opcode::Getattr as u32, ROOT_ID, &longs([0, 0]), 56, 0), None);
    assert_eq!(world.client.send(Opcode::Getattr as u32, ROOT_ID, &longs([0, 0]), 56, 15), None);
    assert_alive(&mut world.client);
}

#[test]
fn reading_directories_with_absurd_numbers() {
    let mut world = World::new();
    for index in 0..50 {
        fs::write(world.path(&format!("{index}")), "").unwrap();
    }
    let client = &mut world.client;
    let handle = long_at(&client.call(Opcode::Opendir, ROOT_ID, &words([0, 0])).unwrap(), 0);
    for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
        for offset in [0, 1, 7, 1 << 31, 1 << 62, 1 << 63, u64::MAX] {
            for size in [0, 1, 100, 4096, 1 << 20, u32::MAX] {
                let mut body = longs([handle, offset]);
                body.extend(words([size, 0, 0, 0, 0, 0]));
                let answer = client.call_with_room(opcode, ROOT_ID, &body, 4096);
                assert!(answer.map_or(true, |answer| answer.len() <= 4080));
            }
        }
    }
    // A file's handle is not a directory's.
    let node = client.lookup(ROOT_ID, c"7").unwrap().nodeid;
    let file = client.open(node, 0).unwrap();
    let mut body = longs([file, 0]);
    body.extend(words([4096, 0, 0, 0, 0, 0]));
    assert_eq!(client.call(Opcode::Readdir, node, &body).map(drop), Err(libc::ENOTDIR));
    assert_alive(client);
}

#[test]
fn requests_that_are_longer_than_any() {
    let mut world = World::new();
    let client = &mut world.client;
    // Header lengths that are not the request's.
    for claimed in [0, 39, 40, 41, 100, 1 << 20, (1 << 20) + 0x1001, u32::MAX] {
        let answer = client.send(Opcode::Lookup as u32, ROOT_ID, b"file\0", claimed, 0x1000);
        assert!(answer.unwrap().is_err(), "{claimed}");
    }
    // A request of many overlapping buffers: 64 MiB in all.
    let header = InHeader { len: 40, opcode: Opcode::Ioctl as u32, unique: 1, nodeid: 1, ..InHeader::default() };
    client.running.guest.poke(REQUEST, header.as_slice());
    let mut chain = vec![Buffer::readable(REQUEST, 40)];
    chain.extend([Buffer::readable(0, 1 << 20); 64]);
    chain.push(Buffer::writable(ANSWER, 0x1000));
    client.running.rings[QUEUE].offer(&chain);
    client.running.guest.kick(QUEUE as u32);
    assert_eq!(client.running.wait_used(QUEUE, 1)[0].1, 16);
    client.unique = 1;
    // The same for its answer, and one without anything to read.
    for chain in [
        [&[Buffer::readable(REQUEST, 40)][..], &[Buffer::writable(ANSWER, 1 << 20); 8]].concat(),
        vec![Buffer::writable(ANSWER, 100)],
        vec![Buffer::readable(REQUEST, 39), Buffer::writable(ANSWER, 100)],
    ] {
        client.running.rings[QUEUE].offer(&chain);
        client.running.guest.kick(QUEUE as u32);
        client.running.wait_used(QUEUE, 1);
    }
    // Forgetting more than fits.
    for count in [1, 3, 65536, u32::MAX] {
        let mut body = words([count, 0]);
        body.extend(longs([12345, 1, 54321, 1]));
        assert_eq!(client.send(Opcode::BatchForget as u32, 0, &body, 80, 0), None);
    }
    assert_alive(client);
}

#[test]
fn a_message_at_the_limit_and_one_past_it() {
    const LIMIT: u32 = (1 << 20) + 0x1000;
    let mut world = World::new();
    let client = &mut world.client;
    // A request that is not known is read and answered as such, unless it or the room for its answer is too long.
    let mut errno = |request: u32, answer: u32| {
        let header = InHeader { len: 40, opcode: 4242, unique: 1, nodeid: 1, ..InHeader::default() };
        client.running.guest.poke(REQUEST, header.as_slice());
        client.running.rings[QUEUE].offer(&[
            Buffer::readable(REQUEST, 40),
            Buffer::readable(0, request - 40),
            Buffer::writable(ANSWER, answer),
        ]);
        client.running.guest.kick(QUEUE as u32);
        assert_eq!(client.running.wait_used(QUEUE, 1)[0].1, 16);
        word_at(&client.running.guest.peek(ANSWER, 8), 4).cast_signed()
    };
    assert_eq!(errno(LIMIT, LIMIT), -libc::ENOSYS);
    assert_eq!(errno(LIMIT + 1, LIMIT), -libc::EINVAL);
    assert_eq!(errno(LIMIT, LIMIT + 1), -libc::EINVAL);
}

#[test]
fn mappings_and_other_things_that_are_not_there() {
    let mut world = World::new();
    let client = &mut world.client;
    for opcode in [48, 49] {
        let body = longs([1, 0, u64::MAX, 3, u64::MAX - 1]);
        let answer = client.send(opcode, ROOT_ID, &body, 80, 0x1000);
        assert_eq!(answer.unwrap().map(drop), Err(libc::EINVAL), "{opcode}");
    }
    for opcode in [Opcode::Getlk, Opcode::Setlk, Opcode::Setlkw, Opcode::Bmap, Opcode::Poll, Opcode::Access] {
        let answer = client.call(opcode, ROOT_ID, &[0; 100]);
        assert_eq!(answer.map(drop), Err(libc::ENOSYS), "{opcode:?}");
    }
    assert_eq!(client.call(Opcode::Ioctl, ROOT_ID, &[0; 100]).map(drop), Err(libc::ENOTTY));
    for opcode in [0, 7, 47, 50, 51, 4095, u32::MAX] {
        let answer = client.send(opcode, ROOT_ID, &[0; 100], 140, 0x1000);
        assert_eq!(answer.unwrap().map(drop), Err(libc::ENOSYS), "{opcode}");
    }
}

#[test]
fn a_broken_ring_stops_the_device() {
    let world = World::new();
    world.client.running.rings[QUEUE].set_avail_idx(5000);
    world.client.running.guest.kick(QUEUE as u32);
    world.client.running.guest.wait_needs_reset();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any bytes after any header: an answer, or none, and the device goes on.
    #[test]
    fn noise(
        requests in proptest::collection::vec(
            (0_u32..52, 0_u64..4, proptest::collection::vec(any::<u8>(), 0..150), 0_u32..200, 0_u32..300),
            1..40,
        ),
    ) {
        let mut world = World::new();
        fs::write(world.path("file"), "content").unwrap();
        world.client.lookup(ROOT_ID, c"file").unwrap();
        for (opcode, node, mut body, claimed, room) in requests {
            // Half of them are as long as they say.
            let claimed = if claimed < 100 { 40 + body.len() as u32 } else { claimed };
            // Small numbers are more interesting.
            for (index, byte) in body.iter_mut().enumerate() {
                if index % 4 != 0 && *byte > 50 {
                    *byte = 0;
                }
            }
            world.client.send(opcode, node, &body, claimed, room);
        }
        assert_alive(&mut world.client);
        prop_assert_eq!(fs::read(world.secret()).unwrap(), b"secret");
        prop_assert_eq!(fs::read_dir(world.dir.path()).unwrap().count(), 2);
    }
}
