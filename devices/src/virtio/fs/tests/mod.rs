//! A guest that speaks FUSE to the device, friendly and hostile.

mod hostile;
mod pool;
mod races;
mod semantics;
mod switches;
mod throughput;

use std::ffi::CStr;

use fuse_backend_rs::abi::fuse_abi::{EntryOut, InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::filesystem::ROOT_ID;
use vm_memory::ByteValued;

use super::*;
use crate::testkit::{Buffer, Guest, Running};

/// Where the driver keeps its messages.
const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x28_0000;

/// The first request queue.
const QUEUE: usize = 1;

/// Bytes of an answer's header.
const HEAD: usize = 16;

/// A FUSE client.
struct Client {
    running: Running,
    control: ShareControl,
    unique: u64,
    uid: u32,
    gid: u32,
}

/// What an answer says: an errno, or data.
type Answer = Result<Vec<u8>, i32>;

fn config(dir: &Path, cache: CachePolicy) -> FsConfig {
    FsConfig {
        tag: "kataShared".into(),
        shared_dir: dir.into(),
        cache,
        num_request_queues: 1,
        queue_size: 1024,
        writeback: false,
        workers: 2,
        xattr: true,
        posix_locks: false,
    }
}

/// A directory with a shared one and a secret one in it, and a client of the shared one.
struct World {
    dir: tempfile::TempDir,
    client: Client,
}

impl World {
    fn new() -> Self {
        Self::with(CachePolicy::Auto)
    }

    fn with(cache: CachePolicy) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("share")).unwrap();
        std::fs::write(dir.path().join("secret"), "secret").unwrap();
        let client = Client::new(config(&dir.path().join("share"), cache));
        Self { dir, client }
    }

    /// A path in the shared directory.
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("share").join(name)
    }

    fn secret(&self) -> PathBuf {
        self.dir.path().join("secret")
    }
}

/// A structure of 32-bit numbers, as FUSE has them.
fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn longs<const N: usize>(longs: [u64; N]) -> Vec<u8> {
    longs.into_iter().flat_map(u64::to_le_bytes).collect()
}

fn long_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn word_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn entry_of(bytes: &[u8]) -> EntryOut {
    let mut entry = EntryOut::default();
    entry.as_mut_slice().copy_from_slice(&bytes[..size_of::<EntryOut>()]);
    entry
}

impl Client {
    fn new(config: FsConfig) -> Self {
        let mut client = Self::uninitialized(config);
        client.init().unwrap();
        client
    }

    fn uninitialized(config: FsConfig) -> Self {
        let fs = Fs::new(config, Confinement::On).unwrap();
        let control = fs.control();
        let running = Guest::new(Box::new(fs)).start(0);
        Self { running, control, unique: 0, uid: 0, gid: 0 }
    }

    fn init(&mut self) -> Answer {
        // Everything that Linux can do.
        self.call(Opcode::Init, 0, &words([7, 38, 0x2_0000, 0x73ff_fffb, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]))
    }

    /// Sends a request whose answer may have up to `room` bytes; an oddity is `None`.
    fn send(&mut self, opcode: u32, node: u64, body: &[u8], claimed: u32, room: u32) -> Option<Answer> {
        self.unique += 1;
        let header = InHeader {
            len: claimed,
            opcode,
            unique: self.unique,
            nodeid: node,
            uid: self.uid,
            gid: self.gid,
            pid: 1,
            padding: 0,
        };
        let guest = &self.running.guest;
        guest.poke(REQUEST, header.as_slice());
        guest.poke(REQUEST + 40, body);
        guest.poke(ANSWER, &[0xee; HEAD]);
        let mut chain = vec![Buffer::readable(REQUEST, 40 + body.len() as u32)];
        if room > 0 {
            chain.push(Buffer::writable(ANSWER, room));
        }
        self.running.rings[QUEUE].offer(&chain);
        self.running.guest.kick(QUEUE as u32);
        let used = self.running.wait_used(QUEUE, 1)[0].1;
        if used == 0 {
            return None;
        }
        let mut out = OutHeader::default();
        let bytes = self.running.guest.peek(ANSWER, used as usize);
        out.as_mut_slice().copy_from_slice(&bytes[..HEAD]);
        assert_eq!((out.unique, out.len), (self.unique, used), "opcode {opcode}");
        Some(if out.error == 0 { Ok(bytes[HEAD..].to_vec()) } else { Err(-out.error) })
    }

    fn call_with_room(&mut self, opcode: Opcode, node: u64, body: &[u8], room: u32) -> Answer {
        let claimed = 40 + body.len() as u32;
        self.send(opcode as u32, node, body, claimed, room).expect("An answer")
    }

    fn call(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> Answer {
        self.call_with_room(opcode, node, body, 0x4000)
    }

    fn lookup(&mut self, parent: u64, name: &CStr) -> Result<EntryOut, i32> {
        self.call(Opcode::Lookup, parent, name.to_bytes_with_nul()).map(|bytes| entry_of(&bytes))
    }

    fn forget(&mut self, node: u64, count: u64) {
        assert_eq!(self.send(Opcode::Forget as u32, node, &longs([count]), 48, 0), None);
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.call(Opcode::Open, node, &words([flags as u32, 0])).map(|bytes| long_at(&bytes, 0))
    }

    fn create(&mut self, name: &CStr, flags: i32, mode: u32) -> Result<(EntryOut, u64), i32> {
        self.create_in(ROOT_ID, name, flags, mode)
    }

    fn create_in(&mut self, parent: u64, name: &CStr, flags: i32, mode: u32) -> Result<(EntryOut, u64), i32> {
        let mut body = words([flags as u32, mode, 0, 0]);
        body.extend(name.to_bytes_with_nul());
        let bytes = self.call(Opcode::Create, parent, &body)?;
        Ok((entry_of(&bytes), long_at(&bytes, size_of::<EntryOut>())))
    }

    fn mkdir(&mut self, parent: u64, name: &CStr, mode: u32) -> Result<EntryOut, i32> {
        let mut body = words([mode, 0]);
        body.extend(name.to_bytes_with_nul());
        self.call(Opcode::Mkdir, parent, &body).map(|bytes| entry_of(&bytes))
    }

    fn mknod(&mut self, name: &CStr, mode: u32, device: u32) -> Result<EntryOut, i32> {
        let mut body = words([mode, device, 0, 0]);
        body.extend(name.to_bytes_with_nul());
        self.call(Opcode::Mknod, ROOT_ID, &body).map(|bytes| entry_of(&bytes))
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Answer {
        let mut body = longs([handle, offset]);
        body.extend(words([size, 0, 0, 0, 0, 0]));
        self.call_with_room(Opcode::Read, node, &body, HEAD as u32 + size.min(1 << 20))
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        self.write_flagged(node, handle, offset, data, 0)
    }

    fn write_flagged(&mut self, node: u64, handle: u64, offset: u64, data: &[u8], flags: u32) -> Result<u32, i32> {
        let mut body = longs([handle, offset]);
        body.extend(words([data.len() as u32, flags, 0, 0, 0, 0]));
        body.extend(data);
        self.call(Opcode::Write, node, &body).map(|bytes| word_at(&bytes, 0))
    }

    fn release(&mut self, node: u64, handle: u64) -> Answer {
        let mut body = longs([handle]);
        body.extend(words([0, 0, 0, 0]));
        self.call(Opcode::Release, node, &body)
    }

    /// SETATTR with what `set` fills in of its 88 bytes.
    fn setattr(&mut self, node: u64, valid: u32, set: impl FnOnce(&mut [u8])) -> Answer {
        let mut body = vec![0; 88];
        body[..4].copy_from_slice(&valid.to_le_bytes());
        set(&mut body);
        self.call(Opcode::Setattr, node, &body)
    }

    /// All entries of a directory, in steps of `size` bytes: name, type and what a lookup told.
    fn list(&mut self, node: u64, plus: bool, size: u32) -> Vec<(String, u32, EntryOut)> {
        let handle = long_at(&self.call(Opcode::Opendir, node, &words([0, 0])).unwrap(), 0);
        let mut entries = Vec::new();
        let mut offset = 0;
        loop {
            let mut body = longs([handle, offset]);
            body.extend(words([size, 0, 0, 0, 0, 0]));
            let opcode = if plus { Opcode::Readdirplus } else { Opcode::Readdir };
            let bytes = self.call_with_room(opcode, node, &body, HEAD as u32 + size).unwrap();
            let mut rest = bytes.as_slice();
            if rest.is_empty() {
                break;
            }
            while !rest.is_empty() {
                let mut entry = EntryOut::default();
                if plus {
                    entry = entry_of(rest);
                    rest = &rest[size_of::<EntryOut>()..];
                }
                offset = long_at(rest, 8);
                let len = word_at(rest, 16) as usize;
                let name = String::from_utf8(rest[24..24 + len].to_vec()).unwrap();
                entries.push((name, word_at(rest, 20), entry));
                rest = &rest[(24 + len).next_multiple_of(8)..];
            }
        }
        let mut body = longs([handle]);
        body.extend(words([0, 0, 0, 0]));
        self.call(Opcode::Releasedir, node, &body).unwrap();
        entries
    }
}
