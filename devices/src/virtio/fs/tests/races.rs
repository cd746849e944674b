//! A host that moves things about while the guest works on them, as a guest with two sandboxes would have it do.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::testkit::Meanwhile;

/// Rounds of a race. A leak that needs luck has had some.
const ROUNDS: u32 = 300;

/// Swaps two names of the host, again and again.
fn swap_meanwhile(first: &Path, second: &Path) -> Meanwhile {
    use std::os::unix::ffi::OsStrExt;
    let name = |path: &Path| CString::new(path.as_os_str().as_bytes()).unwrap();
    let (first, second) = (name(first), name(second));
    Meanwhile::repeat(move |_| {
        // SAFETY: both names end with a zero.
        let result = unsafe {
            libc::renameat2(libc::AT_FDCWD, first.as_ptr(), libc::AT_FDCWD, second.as_ptr(), libc::RENAME_EXCHANGE)
        };
        assert_eq!(result, 0);
    })
}

#[test]
fn a_file_and_a_symbolic_link_that_change_places() {
    let mut world = World::new();
    fs::write(world.path("file"), "good").unwrap();
    symlink(world.secret(), world.path("link")).unwrap();
    let race = swap_meanwhile(&world.path("file"), &world.path("link"));
    for _ in 0..ROUNDS {
        let client = &mut world.client;
        let entry = client.lookup(ROOT_ID, c"file").unwrap();
        if let Ok(handle) = client.open(entry.nodeid, libc::O_RDWR) {
            assert_eq!(client.read(entry.nodeid, handle, 0, 100).unwrap(), b"good");
            client.release(entry.nodeid, handle).unwrap();
        }
        client.forget(entry.nodeid, 1);
        if let Ok((entry, handle)) = client.create(c"file", libc::O_RDWR | libc::O_TRUNC, 0o600) {
            client.write(entry.nodeid, handle, 0, b"good").unwrap();
            client.release(entry.nodeid, handle).unwrap();
            client.forget(entry.nodeid, 1);
        }
    }
    drop(race);
    assert_eq!(fs::read(world.secret()).unwrap(), b"secret");
}

#[test]
fn a_directory_and_a_symbolic_link_that_change_places() {
    let mut world = World::new();
    fs::create_dir(world.path("dir")).unwrap();
    symlink(world.dir.path(), world.path("link")).unwrap();
    let race = swap_meanwhile(&world.path("dir"), &world.path("link"));
    for _ in 0..ROUNDS {
        let client = &mut world.client;
        let entry = client.lookup(ROOT_ID, c"dir").unwrap();
        assert!(client.lookup(entry.nodeid, c"secret").is_err());
        if client.create_in(entry.nodeid, c"made", libc::O_RDWR, 0o600).is_ok() {
            client.call(Opcode::Unlink, entry.nodeid, b"made\0").unwrap();
        }
        client.forget(entry.nodeid, 1);
        let mut rename = longs([ROOT_ID]);
        rename.extend(b"dir\0dir\0");
        let _ = client.call(Opcode::Rename, ROOT_ID, &rename);
    }
    drop(race);
    assert!(!world.dir.path().join("made").exists());
    assert_eq!(fs::read(world.secret()).unwrap(), b"secret");
}

#[test]
fn a_directory_that_is_moved_out_of_the_share_keeps_its_guest_inside_itself() {
    let mut world = World::new();
    fs::create_dir_all(world.path("dir/inner")).unwrap();
    let client = &mut world.client;
    let dir = client.lookup(ROOT_ID, c"dir").unwrap().nodeid;
    let inner = client.lookup(dir, c"inner").unwrap().nodeid;
    fs::rename(world.path("dir"), world.dir.path().join("away")).unwrap();
    let client = &mut world.client;
    assert_eq!(client.lookup(ROOT_ID, c"dir").map(drop), Err(libc::ENOENT));
    // What it has it keeps, and there is no way up from it.
    for name in [c"..", c".", c"../secret", c"secret"] {
        assert!(client.lookup(dir, name).is_err() && client.lookup(inner, name).is_err(), "{name:?}");
    }
    let listed = client.list(dir, true, 4096);
    assert!(listed.iter().all(|(name, ..)| [".", "..", "inner"].contains(&name.as_str())), "{listed:?}");
}
