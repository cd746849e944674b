//! What the guest knows by number: nodes it looked up, and handles it opened.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use fuse_backend_rs::api::filesystem::ROOT_ID;

/// What makes a file the same file. The mount belongs to it: the same directory mounted twice,
/// once read-only, is two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Id {
    /// `st_dev`
    pub dev: u64,
    /// `st_ino`
    pub ino: u64,
    /// `stx_mnt_id`
    pub mount: u64,
}

/// A file or directory that the guest looked up.
#[derive(Debug)]
pub struct Node {
    /// A handle for looking at it. While it is open the inode number means this file alone.
    handle: OwnedFd,
    /// Its identity.
    pub id: Id,
    /// The type bits of its mode, which never change.
    pub kind: u32,
}

impl Node {
    /// A node that `handle` stands for.
    pub fn new(handle: OwnedFd, id: Id, mode: u32) -> Self {
        Self { handle, id, kind: mode & libc::S_IFMT }
    }

    /// For looking at it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
    node: u64,
    mount: u64,
    file: File,
    /// A directory is read from where it stands, by one request at a time.
    position: Mutex<()>,
}

impl Handle {
    /// The file, for what needs no position: requests for it may run side by side.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The file for a call that wants it mutable and moves data to or from a position that it is told.
    pub fn at_position<T>(&self, call: impl FnOnce(&mut File) -> T) -> T {
        // SAFETY: the descriptor is open as long as `self` is borrowed; this second owner never closes it and ends here.
        let mut file = ManuallyDrop::new(unsafe { File::from_raw_fd(self.file.as_raw_fd()) });
        call(&mut file)
    }

    /// The directory, for a call that moves its position.
    pub fn with_position<T>(&self, call: impl FnOnce(&mut File) -> T) -> T {
        let _alone = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        self.at_position(call)
    }
}

/// Nodes and handles of one guest. Their number is bounded: each is a descriptor.
#[derive(Debug)]
pub struct Table {
    nodes: HashMap<u64, Counted>,
    by_id: HashMap<Id, u64>,
    handles: HashMap<u64, Arc<Handle>>,
    /// By node and owner: what an owner has locked of a file is locked through a description of its own.
    locks: HashMap<(u64, u64), Lock>,
    /// Numbers are never used twice, so one that the guest forgot means nothing ever after.
    next: u64,
    limit: usize,
}

#[derive(Debug)]
struct Lock {
    mount: u64,
    file: Arc<File>,
}

#[derive(Debug)]
struct Counted {
    node: Arc<Node>,
    /// How often the guest was told of it, less what it forgot.
    lookups: u64,
}

impl Table {
    /// A table with the root alone, for at most `limit` descriptors.
    pub fn new(root: Node, limit: usize) -> Self {
        let id = root.id;
        let root = Counted { node: Arc::new(root), lookups: 1 };
        Self {
            nodes: HashMap::from([(ROOT_ID, root)]),
            by_id: HashMap::from([(id, ROOT_ID)]),
            handles: HashMap::new(),
            locks: HashMap::new(),
            next: ROOT_ID.saturating_add(1),
            limit,
        }
    }

    /// Forgets all but the root.
    pub fn clear(&mut self) {
        self.handles.clear();
        self.locks.clear();
        self.nodes.retain(|number, _| *number == ROOT_ID);
        self.by_id.retain(|_, number| *number == ROOT_ID);
    }

    /// Fails when there is no room for another descriptor.
    pub fn check_room(&self) -> io::Result<()> {
        if self.len() < self.limit { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENFILE)) }
    }

    /// A node by its number.
    pub fn node(&self, number: u64) -> io::Result<Arc<Node>> {
        let counted = self.nodes.get(&number);
        counted.map(|counted| Arc::clone(&counted.node)).ok_or_else(bad_number)
    }

    /// Counts a lookup of `node` and returns its number.
    pub fn enter(&mut self, node: Node) -> io::Result<u64> {
        if let Some(number) = self.by_id.get(&node.id) {
            if let Some(counted) = self.nodes.get_mut(number) {
                counted.lookups = counted.lookups.saturating_add(1);
            }
            return Ok(*number);
        }
        self.check_room()?;
        let number = self.take_number();
        self.by_id.insert(node.id, number);
        self.nodes.insert(number, Counted { node: Arc::new(node), lookups: 1 });
        Ok(number)
    }

    /// The guest forgot `count` lookups.
    pub fn forget(&mut self, number: u64, count: u64) {
        if number == ROOT_ID {
            return;
        }
        let Some(counted) = self.nodes.get_mut(&number) else { return };
        counted.lookups = counted.lookups.saturating_sub(count);
        if counted.lookups == 0 {
            self.by_id.remove(&counted.node.id);
            self.nodes.remove(&number);
        }
    }

    /// Forgets all nodes of a mount, and closes what is open there.
    pub fn forget_mount(&mut self, mount: u64) {
        self.handles.retain(|_, handle| handle.mount != mount);
        self.locks.retain(|_, lock| lock.mount != mount);
        self.nodes.retain(|_, counted| counted.node.id.mount != mount);
        self.by_id.retain(|id, _| id.mount != mount);
    }

    /// Adds an open file of a node and returns the handle's number.
    pub fn open(&mut self, node: u64, file: File) -> io::Result<u64> {
        self.check_room()?;
        let mount = self.node(node)?.id.mount;
        let number = self.take_number();
        self.handles.insert(number, Arc::new(Handle { node, mount, file, position: Mutex::default() }));
        Ok(number)
    }

    /// A handle by its number, when it is one of `node`.
    pub fn handle(&self, number: u64, node: u64) -> io::Result<Arc<Handle>> {
        let handle = self.handles.get(&number).filter(|handle| handle.node == node);
        handle.cloned().ok_or_else(bad_number)
    }

    /// Closes a handle of `node`.
    pub fn close(&mut self, number: u64, node: u64) -> io::Result<()> {
        self.handle(number, node)?;
        self.handles.remove(&number);
        Ok(())
    }

    /// What `owner` locks `node` through, if it has locked anything.
    pub fn lock(&self, node: u64, owner: u64) -> Option<Arc<File>> {
        self.locks.get(&(node, owner)).map(|lock| Arc::clone(&lock.file))
    }

    /// Adds what `owner` locks `node` through.
    pub fn add_lock(&mut self, node: u64, owner: u64, file: File) -> io::Result<Arc<File>> {
        self.check_room()?;
        let mount = self.node(node)?.id.mount;
        let lock = self.locks.entry((node, owner)).or_insert_with(|| Lock { mount, file: Arc::new(file) });
        Ok(Arc::clone(&lock.file))
    }

    /// Gives up everything that `owner` has locked of `node`.
    pub fn unlock(&mut self, node: u64, owner: u64) {
        self.locks.remove(&(node, owner));
    }

    fn take_number(&mut self) -> u64 {
        let number = self.next;
        self.next = number.saturating_add(1);
        number
    }

    /// Nodes, handles and locks, the root included.
    pub fn len(&self) -> usize {
        self.nodes.len().saturating_add(self.handles.len()).saturating_add(self.locks.len())
    }
}

fn bad_number() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(ino: u64) -> Node {
        let file = File::open("/").unwrap();
        Node::new(file.into(), Id { dev: 1, ino, mount: 1 }, libc::S_IFDIR | 0o755)
    }

    fn table() -> Table {
        Table::new(node(1), 4)
    }

    #[test]
    fn the_same_file_has_one_number_until_it_is_forgotten() {
        let mut table = table();
        let number = table.enter(node(2)).unwrap();
        assert_eq!(table.enter(node(2)).unwrap(), number);
        table.forget(number, 1);
        assert!(table.node(number).is_ok());
        table.forget(number, 1);
        assert!(table.node(number).is_err());
        assert_ne!(table.enter(node(2)).unwrap(), number);
    }

    #[test]
    fn the_root_is_never_forgotten() {
        let mut table = table();
        assert_eq!(table.enter(node(1)).unwrap(), ROOT_ID);
        table.forget(ROOT_ID, u64::MAX);
        assert!(table.node(ROOT_ID).is_ok());
    }

    #[test]
    fn forgetting_too_much_or_nothing_known_is_harmless() {
        let mut table = table();
        let number = table.enter(node(2)).unwrap();
        table.forget(number, u64::MAX);
        table.forget(number, 1);
        table.forget(12345, 1);
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn room_ends_at_the_limit() {
        let mut table = table();
        let number = table.enter(node(2)).unwrap();
        table.enter(node(3)).unwrap();
        table.open(number, File::open("/").unwrap()).unwrap();
        assert!(table.enter(node(4)).is_err());
        assert!(table.open(number, File::open("/").unwrap()).is_err());
        // What is known already needs no room.
        assert!(table.enter(node(2)).is_ok());
    }

    #[test]
    fn a_mount_is_forgotten_whole_and_alone() {
        let mut table = Table::new(node(1), 10);
        let there = Node { id: Id { mount: 2, ..node(2).id }, ..node(2) };
        let (here, there) = (table.enter(node(2)).unwrap(), table.enter(there).unwrap());
        let open = |table: &mut Table, node| table.open(node, File::open("/").unwrap()).unwrap();
        let (file_here, file_there) = (open(&mut table, here), open(&mut table, there));
        table.forget_mount(2);
        assert!(table.node(here).is_ok() && table.handle(file_here, here).is_ok());
        assert!(table.node(there).is_err() && table.handle(file_there, there).is_err());
        assert_eq!(table.len(), 3);
    }

    #[test]
    fn handles_belong_to_their_node_and_outlive_its_number() {
        let mut table = table();
        let number = table.enter(node(2)).unwrap();
        let handle = table.open(number, File::open("/").unwrap()).unwrap();
        assert!(table.handle(handle, ROOT_ID).is_err());
        assert!(table.close(handle, ROOT_ID).is_err());
        table.forget(number, 1);
        assert!(table.handle(handle, number).is_ok());
        assert!(table.close(handle, number).is_ok());
        assert!(table.close(handle, number).is_err());
    }
}
