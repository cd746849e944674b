//! What programs expect of a file system.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use super::*;

const FATTR_MODE: u32 = 1;
const FATTR_UID: u32 = 2;
const FATTR_GID: u32 = 4;
const FATTR_SIZE: u32 = 8;
const FATTR_ATIME: u32 = 0x10;
const FATTR_MTIME: u32 = 0x20;
const FATTR_FH: u32 = 0x40;
const FATTR_KILL_SUIDGID: u32 = 0x800;

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn configuration_space_has_tag_and_queues() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new(Box::new(Fs::new(config(dir.path(), CachePolicy::Auto), Confinement::On).unwrap()));
    assert_eq!(guest.transport.device_type(), 26);
    assert_eq!(&guest.read_config::<8>(0), b"kataShar");
    assert_eq!(&guest.read_config::<8>(8), b"ed\0\0\0\0\0\0");
    assert_eq!(u32::from_le_bytes(guest.read_config(36)), 1);
}

#[test]
fn configurations_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let good = config(dir.path(), CachePolicy::Auto);
    for tag in ["", "a\0b", &"x".repeat(37)] {
        let bad = Fs::new(FsConfig { tag: tag.into(), ..good.clone() }, Confinement::On);
        assert!(matches!(bad, Err(FsError::Tag(_))), "{tag:?}");
    }
    assert!(Fs::new(FsConfig { tag: "x".repeat(36), ..good.clone() }, Confinement::On).is_ok());
    for num_request_queues in [0, 9] {
        let bad = Fs::new(FsConfig { num_request_queues, ..good.clone() }, Confinement::On);
        assert!(matches!(bad, Err(FsError::RequestQueues(_))));
    }
    for queue_size in [0, 8, 17, 2048] {
        let bad = Fs::new(FsConfig { queue_size, ..good.clone() }, Confinement::On);
        assert!(matches!(bad, Err(FsError::QueueSize(_))));
    }
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    for shared_dir in [dir.path().join("nowhere"), file] {
        let bad = Fs::new(FsConfig { shared_dir, ..good.clone() }, Confinement::On);
        assert!(matches!(bad, Err(FsError::SharedDir { .. })));
    }
}

#[test]
fn init_agrees_on_large_requests() {
    let mut world = World::new();
    let answer = world.client.init().unwrap();
    assert_eq!((word_at(&answer, 0), word_at(&answer, 4)), (7, 33));
    assert_eq!(word_at(&answer, 20), 1 << 20, "max_write");
    assert_eq!(u16::from_le_bytes(answer[28..30].try_into().unwrap()), 256, "max_pages");
}

#[test]
fn files_are_made_written_read_and_closed() {
    let mut world = World::new();
    let client = &mut world.client;
    let (entry, handle) = client.create(c"file", libc::O_RDWR, 0o640).unwrap();
    let data: Vec<u8> = (0..1 << 20).map(|index| (index / 7) as u8).collect();
    assert_eq!(client.write(entry.nodeid, handle, 5, &data).unwrap(), 1 << 20);
    assert_eq!(client.read(entry.nodeid, handle, 5, 1 << 20).unwrap(), data);
    assert_eq!(client.read(entry.nodeid, handle, (1 << 20) + 5, 100).unwrap(), b"");
    client.release(entry.nodeid, handle).unwrap();
    assert_eq!(&fs::read(world.path("file")).unwrap()[5..], &data);
    let client = &mut world.client;
    assert_eq!(client.lookup(ROOT_ID, c"file").unwrap().nodeid, entry.nodeid);
    assert_eq!(client.lookup(ROOT_ID, c"none").map(drop), Err(libc::ENOENT));
}

#[test]
fn owner_and_permissions_are_the_guests_whatever_the_process_has() {
    let mut world = World::new();
    // The umask of the test's process is in the way of some of these.
    for (name, bits) in [(c"a", 0o777), (c"b", 0o4755), (c"c", 0o2755), (c"d", 0o6777), (c"e", 0o000), (c"f", 0o1666)] {
        for (uid, gid) in [(0, 0), (1000, 1001)] {
            (world.client.uid, world.client.gid) = (uid, gid);
            world.client.create(name, libc::O_RDWR, bits).unwrap();
            let path = world.path(name.to_str().unwrap());
            let metadata = fs::metadata(&path).unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (uid, gid), "{name:?}");
            assert_eq!(metadata.mode() & 0o7777, bits, "{name:?}");
            fs::remove_file(path).unwrap();
        }
    }
    let (uid, gid) = (world.client.uid, world.client.gid);
    let dir = world.client.mkdir(ROOT_ID, c"dir", 0o2770).unwrap();
    world.client.mknod(c"fifo", libc::S_IFIFO | 0o606, 0).unwrap();
    let mut body = b"link\0".to_vec();
    body.extend(b"/nowhere\0");
    world.client.call(Opcode::Symlink, ROOT_ID, &body).unwrap();
    for name in ["dir", "fifo", "link"] {
        let metadata = fs::symlink_metadata(world.path(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (uid, gid), "{name}");
    }
    assert_eq!(mode(&world.path("dir")), 0o2770);
    assert_eq!(mode(&world.path("fifo")), 0o606);
    assert_eq!(fs::read_link(world.path("link")).unwrap(), Path::new("/nowhere"));

    // A directory with the set-group-id bit gives its group, and the bit to directories.
    (world.client.uid, world.client.gid) = (2000, 2000);
    world.client.create_in(dir.nodeid, c"file", libc::O_RDWR, 0o644).unwrap();
    world.client.mkdir(dir.nodeid, c"sub", 0o755).unwrap();
    let file = fs::metadata(world.path("dir/file")).unwrap();
    assert_eq!((file.uid(), file.gid()), (2000, gid));
    let sub = fs::metadata(world.path("dir/sub")).unwrap();
    assert_eq!((sub.uid(), sub.gid(), sub.mode() & 0o7777), (2000, gid, 0o2755));
}

#[test]
fn appending_goes_to_the_end() {
    let mut world = World::new();
    fs::write(world.path("log"), "one ").unwrap();
    let node = world.client.lookup(ROOT_ID, c"log").unwrap().nodeid;
    let handle = world.client.open(node, libc::O_WRONLY | libc::O_APPEND).unwrap();
    fs::write(world.path("log"), "one two ").unwrap();
    // The guest's idea of the end is old.
    world.client.write(node, handle, 4, b"three").unwrap();
    assert_eq!(fs::read(world.path("log")).unwrap(), b"one two three");
}

#[test]
fn open_truncates_if_asked_and_creates_only_once_if_exclusive() {
    let mut world = World::new();
    fs::write(world.path("file"), "content").unwrap();
    let (entry, _) = world.client.create(c"file", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(fs::read(world.path("file")).unwrap(), b"content");
    let exclusive = world.client.create(c"file", libc::O_RDWR | libc::O_EXCL, 0o600);
    assert_eq!(exclusive.map(drop), Err(libc::EEXIST));
    world.client.open(entry.nodeid, libc::O_WRONLY | libc::O_TRUNC).unwrap();
    assert_eq!(fs::read(world.path("file")).unwrap(), b"");
}

#[test]
fn attributes_change() {
    let mut world = World::new();
    let (entry, handle) = world.client.create(c"file", libc::O_RDWR, 0o600).unwrap();
    let (node, path) = (entry.nodeid, world.path("file"));
    let client = &mut world.client;

    client.setattr(node, FATTR_MODE, |body| body[68..72].copy_from_slice(&0o4711_u32.to_le_bytes())).unwrap();
    assert_eq!(mode(&path), 0o4711);
    client
        .setattr(node, FATTR_UID | FATTR_GID, |body| {
            body[76..80].copy_from_slice(&12_u32.to_le_bytes());
            body[80..84].copy_from_slice(&34_u32.to_le_bytes());
        })
        .unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (12, 34));
    client.setattr(node, FATTR_GID, |body| body[80..84].copy_from_slice(&56_u32.to_le_bytes())).unwrap();
    assert_eq!((fs::metadata(&path).unwrap().uid(), fs::metadata(&path).unwrap().gid()), (12, 56));

    client.setattr(node, FATTR_SIZE, |body| body[16..24].copy_from_slice(&1000_u64.to_le_bytes())).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 1000);
    let shrink = |body: &mut [u8]| {
        body[8..16].copy_from_slice(&handle.to_le_bytes());
        body[16..24].copy_from_slice(&10_u64.to_le_bytes());
    };
    let answer = client.setattr(node, FATTR_SIZE | FATTR_FH, shrink).unwrap();
    assert_eq!(long_at(&answer, 16 + 8), 10, "The answer has the new attributes");
    let absurd = client.setattr(node, FATTR_SIZE, |body| body[16..24].copy_from_slice(&u64::MAX.to_le_bytes()));
    assert!(absurd.is_err());

    let before = fs::metadata(&path).unwrap();
    client
        .setattr(node, FATTR_MTIME, |body| {
            body[40..48].copy_from_slice(&1_000_000_000_u64.to_le_bytes());
            body[60..64].copy_from_slice(&5_u32.to_le_bytes());
        })
        .unwrap();
    let after = fs::metadata(&path).unwrap();
    assert_eq!((after.mtime(), after.mtime_nsec()), (1_000_000_000, 5));
    assert_eq!(after.atime(), before.atime());
    client.setattr(node, FATTR_ATIME, |body| body[32..40].copy_from_slice(&7_u64.to_le_bytes())).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().atime(), 7);
}

#[test]
fn times_of_a_symbolic_link_are_its_own() {
    let mut world = World::new();
    fs::write(world.path("target"), "").unwrap();
    let target = fs::metadata(world.path("target")).unwrap().mtime();
    symlink("target", world.path("link")).unwrap();
    let node = world.client.lookup(ROOT_ID, c"link").unwrap().nodeid;
    world.client.setattr(node, FATTR_MTIME, |body| body[40..48].copy_from_slice(&7_u64.to_le_bytes())).unwrap();
    assert_eq!(fs::symlink_metadata(world.path("link")).unwrap().mtime(), 7);
    assert_eq!(fs::metadata(world.path("target")).unwrap().mtime(), target);
}

#[test]
fn writing_by_somebody_else_takes_privileges_away() {
    const WRITE_KILL: u32 = 4;
    let mut world = World::new();
    let (entry, handle) = world.client.create(c"tool", libc::O_RDWR, 0o6755).unwrap();
    world.client.write(entry.nodeid, handle, 0, b"by its owner").unwrap();
    assert_eq!(mode(&world.path("tool")), 0o6755);
    world.client.write_flagged(entry.nodeid, handle, 0, b"by another", WRITE_KILL).unwrap();
    assert_eq!(mode(&world.path("tool")), 0o755);

    fs::set_permissions(world.path("tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    world.client.setattr(entry.nodeid, FATTR_SIZE | FATTR_KILL_SUIDGID, |_| {}).unwrap();
    assert_eq!(mode(&world.path("tool")), 0o755);

    fs::set_permissions(world.path("tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    let flags = libc::O_WRONLY | libc::O_TRUNC;
    world.client.call(Opcode::Open, entry.nodeid, &words([flags as u32, 1])).unwrap();
    assert_eq!(mode(&world.path("tool")), 0o755);
}

#[test]
fn names_come_and_go_but_open_files_stay() {
    let mut world = World::new();
    let client = &mut world.client;
    let (entry, handle) = client.create(c"file", libc::O_RDWR, 0o600).unwrap();
    client.write(entry.nodeid, handle, 0, b"still here").unwrap();

    let mut body = longs([entry.nodeid]);
    body.extend(b"other\0");
    let linked = entry_of(&client.call(Opcode::Link, ROOT_ID, &body).unwrap());
    assert_eq!(linked.nodeid, entry.nodeid);

    let dir = client.mkdir(ROOT_ID, c"dir", 0o755).unwrap();
    let mut body = longs([dir.nodeid]);
    body.extend(b"other\0moved\0");
    client.call(Opcode::Rename, ROOT_ID, &body).unwrap();
    assert_eq!(client.lookup(dir.nodeid, c"moved").unwrap().nodeid, entry.nodeid);
    let busy = client.call(Opcode::Rmdir, ROOT_ID, b"dir\0");
    assert_eq!(busy.map(drop), Err(libc::ENOTEMPTY));

    client.call(Opcode::Unlink, dir.nodeid, b"moved\0").unwrap();
    client.call(Opcode::Rmdir, ROOT_ID, b"dir\0").unwrap();
    client.call(Opcode::Unlink, ROOT_ID, b"file\0").unwrap();
    assert_eq!(client.read(entry.nodeid, handle, 0, 100).unwrap(), b"still here");
    let attr = client.call(Opcode::Getattr, entry.nodeid, &longs([0, 0])).unwrap();
    assert_eq!(word_at(&attr, 16 + 64), 0, "nlink");
    client.setattr(entry.nodeid, FATTR_SIZE, |body| body[16] = 5).unwrap();
    assert_eq!(client.read(entry.nodeid, handle, 0, 100).unwrap(), b"still");
    client.release(entry.nodeid, handle).unwrap();
    assert_eq!(fs::read_dir(world.path("")).unwrap().count(), 0);
}

#[test]
fn rename_replaces_exchanges_or_refuses() {
    let mut world = World::new();
    fs::write(world.path("a"), "a").unwrap();
    fs::write(world.path("b"), "b").unwrap();
    let rename = |world: &mut World, flags: u32| {
        let mut body = longs([ROOT_ID]);
        body.extend(words([flags, 0]));
        body.extend(b"a\0b\0");
        world.client.call(Opcode::Rename2, ROOT_ID, &body).map(drop)
    };
    assert_eq!(rename(&mut world, libc::RENAME_NOREPLACE), Err(libc::EEXIST));
    rename(&mut world, libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(fs::read(world.path("a")).unwrap(), b"b");
    // It would leave a device node behind.
    let _ = rename(&mut world, libc::RENAME_WHITEOUT);
    assert!(
        fs::symlink_metadata(world.path("a")).is_ok_and(|a| !a.file_type().is_char_device())
            || !world.path("a").exists()
    );
}

#[test]
fn directories_are_read_in_steps_of_any_size() {
    let mut world = World::new();
    let mut expected = HashSet::from([".".to_owned(), "..".to_owned()]);
    for index in 0..500 {
        let name = format!("{index}-{}", "n".repeat(index % 200));
        fs::write(world.path(&name), "").unwrap();
        expected.insert(name);
    }
    fs::create_dir(world.path("dir")).unwrap();
    symlink("x", world.path("symlink")).unwrap();
    expected.extend(["dir".to_owned(), "symlink".to_owned()]);
    for (plus, size) in [(false, 600), (false, 4096), (false, 1 << 20), (true, 600), (true, 4096), (true, 1 << 20)] {
        let entries = world.client.list(ROOT_ID, plus, size);
        let names: HashSet<_> = entries.iter().map(|(name, ..)| name.clone()).collect();
        assert_eq!(names.len(), entries.len(), "Each once");
        assert_eq!(names, expected, "{plus} {size}");
        for (name, kind, entry) in entries {
            let expected_kind = match name.as_str() {
                "." | ".." | "dir" => libc::DT_DIR,
                "symlink" => libc::DT_LNK,
                _ => libc::DT_REG,
            };
            assert_eq!(kind, u32::from(expected_kind), "{name}");
            if plus {
                assert_eq!(entry.nodeid == 0, [".", ".."].contains(&name.as_str()), "{name}");
                // Each is a lookup that the guest must be able to use.
                if entry.nodeid != 0 {
                    world.client.forget(entry.nodeid, 1);
                }
            }
        }
    }
}

#[test]
fn extended_attributes() {
    let mut world = World::new();
    let (entry, _) = world.client.create(c"file", libc::O_RDWR, 0o600).unwrap();
    let client = &mut world.client;
    let get = |client: &mut Client, name: &CStr, size: u32| {
        let mut body = words([size, 0]);
        body.extend(name.to_bytes_with_nul());
        client.call_with_room(Opcode::Getxattr, entry.nodeid, &body, 0x2_0000)
    };
    let mut body = words([5, 0]);
    body.extend(b"user.colour\0green");
    match client.call(Opcode::Setxattr, entry.nodeid, &body) {
        // Not every file system of a build machine has them.
        Err(libc::EOPNOTSUPP) => return,
        other => other.unwrap(),
    };
    assert_eq!(word_at(&get(client, c"user.colour", 0).unwrap(), 0), 5);
    assert_eq!(get(client, c"user.colour", 100).unwrap(), b"green");
    assert_eq!(get(client, c"user.colour", 3), Err(libc::ERANGE));
    assert_eq!(get(client, c"user.none", 100), Err(libc::ENODATA));
    assert_eq!(get(client, c"user.colour", u32::MAX).unwrap(), b"green");
    let names = client.call(Opcode::Listxattr, entry.nodeid, &words([100, 0])).unwrap();
    assert_eq!(names, b"user.colour\0");
    let len = client.call(Opcode::Listxattr, entry.nodeid, &words([0, 0])).unwrap();
    assert_eq!(word_at(&len, 0), 12);
    client.call(Opcode::Removexattr, entry.nodeid, b"user.colour\0").unwrap();
    assert_eq!(get(client, c"user.colour", 100), Err(libc::ENODATA));
}

#[test]
fn space_holes_and_synchronization() {
    let mut world = World::new();
    let (entry, handle) = world.client.create(c"file", libc::O_RDWR, 0o600).unwrap();
    let client = &mut world.client;
    client.write(entry.nodeid, handle, 1 << 20, b"end").unwrap();
    let seek = |client: &mut Client, offset: u64, whence: i32| {
        let mut body = longs([handle, offset]);
        body.extend(words([whence as u32, 0]));
        client.call(Opcode::Lseek, entry.nodeid, &body).map(|bytes| long_at(&bytes, 0))
    };
    assert_eq!(seek(client, 0, libc::SEEK_HOLE), Ok(0));
    assert!(seek(client, 0, libc::SEEK_DATA).is_ok_and(|at| at <= 1 << 20));
    for whence in [libc::SEEK_SET, libc::SEEK_CUR, libc::SEEK_END, -1] {
        assert_eq!(seek(client, 0, whence), Err(libc::EINVAL));
    }
    let mut body = longs([handle, 0, 4096]);
    body.extend(words([0, 0]));
    client.call(Opcode::Fallocate, entry.nodeid, &body).unwrap();
    let mut body = longs([handle, u64::MAX, 4096]);
    body.extend(words([0, 0]));
    assert!(client.call(Opcode::Fallocate, entry.nodeid, &body).is_err());
    for data_only in [0, 1] {
        let mut body = longs([handle]);
        body.extend(words([data_only, 0]));
        client.call(Opcode::Fsync, entry.nodeid, &body).unwrap();
    }
    let statfs = client.call(Opcode::Statfs, ROOT_ID, &[]).unwrap();
    assert!(long_at(&statfs, 0) > 0 && word_at(&statfs, 44) == 255);
    // Linux stops asking.
    assert_eq!(client.call(Opcode::Flush, entry.nodeid, &longs([handle, 0, 0])), Err(libc::ENOSYS));
}

#[test]
fn writing_back_lets_the_guest_read_and_place_what_it_writes() {
    let dir = tempfile::tempdir().unwrap();
    let config = FsConfig { writeback: true, ..config(dir.path(), CachePolicy::Auto) };
    let mut client = Client::new(config);
    let flags = libc::O_WRONLY | libc::O_APPEND;
    let (entry, handle) = client.create(c"file", flags, 0o600).unwrap();
    client.write(entry.nodeid, handle, 3, b"defg").unwrap();
    client.write(entry.nodeid, handle, 0, b"abc").unwrap();
    assert_eq!(client.read(entry.nodeid, handle, 0, 10).unwrap(), b"abcdefg");
}

#[test]
fn what_is_cached_follows_the_policy() {
    const DIRECT_IO: u32 = 1;
    const KEEP_CACHE: u32 = 2;
    for (cache, flags, seconds) in
        [(CachePolicy::Never, DIRECT_IO, 0), (CachePolicy::Auto, 0, 1), (CachePolicy::Always, KEEP_CACHE, 86_400)]
    {
        let mut world = World::with(cache);
        fs::write(world.path("file"), "").unwrap();
        let entry = world.client.lookup(ROOT_ID, c"file").unwrap();
        assert_eq!((entry.entry_valid, entry.attr_valid), (seconds, seconds));
        let open = world.client.call(Opcode::Open, entry.nodeid, &words([0, 0])).unwrap();
        assert_eq!(word_at(&open, 8), flags, "{cache:?}");
        let missing = world.client.lookup(ROOT_ID, c"missing");
        if cache == CachePolicy::Always {
            let missing = missing.unwrap();
            assert_eq!((missing.nodeid, missing.entry_valid), (0, seconds));
        } else {
            assert_eq!(missing.map(drop), Err(libc::ENOENT));
        }
    }
}

#[test]
fn a_mount_made_later_is_part_of_the_share_and_a_file_system_of_its_own() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let unshared = std::thread::spawn(|| {
        if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_err() {
            return false;
        }
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let mut world = World::new();
        fs::create_dir(world.path("rootfs")).unwrap();
        fs::write(world.path("rootfs/below"), "").unwrap();
        mount(Some("inlay"), &world.path("rootfs"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        fs::write(world.path("rootfs/inside"), "seen").unwrap();
        let below = world.client.lookup(ROOT_ID, c"rootfs").unwrap();
        assert_eq!(world.client.lookup(below.nodeid, c"below").map(drop), Err(libc::ENOENT));
        let inside = world.client.lookup(below.nodeid, c"inside").unwrap();
        let handle = world.client.open(inside.nodeid, libc::O_RDONLY).unwrap();
        assert_eq!(world.client.read(inside.nodeid, handle, 0, 10).unwrap(), b"seen");

        // The same file through a second mount is another, as one of them may be read-only.
        fs::create_dir(world.path("again")).unwrap();
        let (from, to) = (world.path("rootfs"), world.path("again"));
        mount(Some(&from), &to, none, MsFlags::MS_BIND, none).unwrap();
        mount(none, &to, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none).unwrap();
        let again = world.client.lookup(ROOT_ID, c"again").unwrap();
        let twin = world.client.lookup(again.nodeid, c"inside").unwrap();
        assert_ne!(twin.nodeid, inside.nodeid);
        assert_ne!(twin.attr.ino, inside.attr.ino);
        assert_eq!(world.client.open(twin.nodeid, libc::O_RDWR), Err(libc::EROFS));
        assert!(world.client.open(inside.nodeid, libc::O_RDWR).is_ok());
        // Names do not lead across.
        let mut body = longs([again.nodeid]);
        body.extend(b"inside\0stolen\0");
        let across = world.client.call(Opcode::Rename, below.nodeid, &body);
        assert!(matches!(across, Err(libc::EXDEV | libc::EROFS)));
        // What the guest remembers keeps a mount busy until it is made to forget.
        assert!(umount2(&to, MntFlags::empty()).is_err());
        world.client.control.release_mount(&to).unwrap();
        umount2(&to, MntFlags::empty()).unwrap();
        assert_eq!(world.client.lookup(again.nodeid, c"inside").map(drop), Err(libc::EBADF));
        assert!(world.client.open(inside.nodeid, libc::O_RDWR).is_ok());
        // So it is with a file, as volumes may be.
        fs::write(world.path("volume"), "").unwrap();
        let volume = world.path("volume");
        mount(Some(&from.join("inside")), &volume, none, MsFlags::MS_BIND, none).unwrap();
        let mounted = world.client.lookup(ROOT_ID, c"volume").unwrap();
        assert_eq!(mounted.attr.size, 4);
        assert!(umount2(&volume, MntFlags::empty()).is_err());
        world.client.control.release_mount(&volume).unwrap();
        umount2(&volume, MntFlags::empty()).unwrap();
        assert!(world.client.open(inside.nodeid, libc::O_RDWR).is_ok());
        world.client.control.release_mount(&from).unwrap();
        umount2(&from, MntFlags::empty()).unwrap();
        assert!(world.client.control.release_mount(&world.path("")).is_err());
        let below = world.client.lookup(ROOT_ID, c"rootfs").unwrap();
        assert!(world.client.lookup(below.nodeid, c"below").is_ok());
        true
    });
    if !unshared.join().unwrap() {
        eprintln!("Skipped: mounting needs CAP_SYS_ADMIN");
    }
}

#[test]
fn special_files_exist_but_are_not_opened_on_the_host() {
    let mut world = World::new();
    world.client.mknod(c"fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    world.client.mknod(c"socket", libc::S_IFSOCK | 0o600, 0).unwrap();
    world.client.mknod(c"regular", libc::S_IFREG | 0o600, 0).unwrap();
    assert!(fs::metadata(world.path("fifo")).unwrap().file_type().is_fifo());
    assert!(fs::metadata(world.path("socket")).unwrap().file_type().is_socket());
    assert!(fs::metadata(world.path("regular")).unwrap().is_file());
}
