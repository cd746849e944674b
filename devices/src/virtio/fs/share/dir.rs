//! Reading directories.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};

use super::table::Node;
use super::{Share, names, sys};

/// Bytes of directory entries that are read from the host at a time: at least one entry of the
/// longest name beside `.` and `..`, at most what a guest with 1 MiB buffers fills in a few steps.
const MIN_READ: u32 = 4 << 10;
const MAX_READ: u32 = 64 << 10;

/// Fixed part of a `linux_dirent64`: inode number, position after it, length and type.
const ENTRY_HEAD: usize = 19;

/// An entry as the host has it.
struct HostEntry<'a> {
    ino: u64,
    /// Position of the next entry.
    next: u64,
    kind: u8,
    name: &'a [u8],
}

/// Where entries go: returns whether there was room.
type Sink<'a> = &'a mut dyn FnMut(&HostEntry<'_>) -> io::Result<bool>;

impl Share {
    /// Gives the guest the entries of `dir` from `offset` on, in the order of the host.
    pub(super) fn list(
        &self,
        dir: &Node,
        file: &mut File,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        read(file, size, offset, &mut |entry| Ok(add(self.guest_entry(dir, entry))? > 0))
    }

    /// The same, with what a lookup of each entry would tell.
    pub(super) fn list_plus(
        &self,
        dir: &Node,
        file: &mut File,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        read(file, size, offset, &mut |host_entry| {
            let mut entry = self.guest_entry(dir, host_entry);
            // An entry without node is one that the guest has to look up if it wants more: `.`
            // and `..`, and what went away just now or finds no room.
            let found = self.look_at(dir, host_entry.name).unwrap_or_default();
            if found.inode != 0 {
                entry.ino = found.attr.st_ino;
            }
            let added = add(entry, found);
            if found.inode != 0 && !matches!(added, Ok(size) if size > 0) {
                self.table().forget(found.inode, 1);
            }
            Ok(added? > 0)
        })
    }

    fn look_at(&self, dir: &Node, name: &[u8]) -> io::Result<Entry> {
        let name = std::ffi::CString::new(name)?;
        names::check(&name)?;
        self.enter(dir, &name)
    }

    fn guest_entry<'a>(&self, dir: &Node, entry: &HostEntry<'a>) -> DirEntry<'a> {
        // What the root's parent is called on the host is no business of the guest.
        let ino = if entry.name == b".." { dir.id.ino } else { entry.ino };
        DirEntry {
            ino: self.guest_inode_number(ino, dir.id.mount),
            offset: entry.next,
            type_: u32::from(entry.kind),
            name: entry.name,
        }
    }
}

/// Reads entries once. None means the end of the directory.
fn read(file: &mut File, size: u32, offset: u64, sink: Sink<'_>) -> io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    let mut buffer = vec![0; size.clamp(MIN_READ, MAX_READ) as usize];
    let count = sys::read_dir(file, &mut buffer)?;
    let mut rest = buffer.get(..count).unwrap_or_default();
    let mut any = false;
    while let Some((entry, after)) = parse(rest) {
        match sink(&entry) {
            Ok(true) => any = true,
            Ok(false) => break,
            // The guest has the entries before; the next request begins with this one.
            Err(_) if any => break,
            Err(error) => return Err(error),
        }
        rest = after;
    }
    Ok(())
}

/// Takes one entry off the front of what `getdents64` wrote.
fn parse(bytes: &[u8]) -> Option<(HostEntry<'_>, &[u8])> {
    let (ino, rest) = bytes.split_first_chunk()?;
    let (next, rest) = rest.split_first_chunk()?;
    let (len, rest) = rest.split_first_chunk()?;
    let (kind, _) = rest.split_first()?;
    let (entry, after) = bytes.split_at_checked(usize::from(u16::from_ne_bytes(*len)))?;
    // Padded with zeroes to a multiple of 8.
    let name = entry.get(ENTRY_HEAD..)?.split(|byte| *byte == 0).next()?;
    let entry = HostEntry { ino: u64::from_ne_bytes(*ino), next: u64::from_ne_bytes(*next), kind: *kind, name };
    Some((entry, after))
}
