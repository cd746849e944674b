//! FUSE messages to a shared directory (virtio 1.2 section 5.11.6).

#![no_main]

use std::fs;
use std::os::unix::fs::symlink;

use arbitrary::Arbitrary;
use devices::virtio::fs::{CachePolicy, Fs, FsConfig};
use inlay_fuzz::{Case, Request, become_nobody, play};
use libfuzzer_sys::fuzz_target;
use seccomp::Confinement;

const NAMES: [&[u8]; 12] = [
    b"file\0",
    b"dir\0",
    b"link\0",
    b"new\0",
    b"..\0",
    b".\0",
    b"\0",
    b"dir/deep\0",
    b"/etc/passwd\0",
    b"../secret\0",
    b"user.name\0",
    b"no-end",
];

#[derive(Arbitrary, Debug)]
struct FuseRequest {
    opcode: u8,
    len: Option<u32>,
    node: u8,
    far: Option<u64>,
    unique: u8,
    ids: Option<(u32, u32)>,
    body: Vec<Piece>,
}

#[derive(Arbitrary, Debug)]
enum Piece {
    Name(u8),
    Word(u32),
    Number(u8),
    Handle(u8),
    Zeros(u8),
    Bytes(Vec<u8>),
}

impl Request for FuseRequest {
    fn bytes(&self) -> Vec<u8> {
        let mut body = Vec::new();
        for piece in &self.body {
            match piece {
                Piece::Name(index) => body.extend(NAMES[usize::from(*index) % NAMES.len()]),
                Piece::Word(word) => body.extend(word.to_le_bytes()),
                Piece::Number(number) => body.extend(u32::from(*number).to_le_bytes()),
                Piece::Handle(handle) => body.extend(u64::from(*handle % 8).to_le_bytes()),
                Piece::Zeros(count) => body.resize(body.len() + usize::from(*count), 0),
                Piece::Bytes(bytes) => body.extend(bytes),
            }
        }
        let (uid, gid) = self.ids.unwrap_or((0, 0));
        let len = self.len.unwrap_or(40 + body.len() as u32);
        [
            &len.to_le_bytes()[..],
            &u32::from(self.opcode % 56).to_le_bytes(),
            &u64::from(self.unique).to_le_bytes(),
            &self.far.unwrap_or(u64::from(self.node % 6)).to_le_bytes(),
            &uid.to_le_bytes(),
            &gid.to_le_bytes(),
            &1_u32.to_le_bytes(),
            &0_u32.to_le_bytes(),
            &body,
        ]
        .concat()
    }
}

fuzz_target!(init: become_nobody(), |input: (bool, bool, Case<FuseRequest>)| {
    let (writeback, posix_locks, case) = input;
    let dir = tempfile::tempdir().expect("A directory");
    let shared_dir = dir.path().join("shared");
    fs::create_dir_all(shared_dir.join("dir/deep")).expect("Directories");
    fs::write(dir.path().join("secret"), "secret").expect("A file outside");
    fs::write(shared_dir.join("file"), "some bytes").expect("A file");
    symlink("../secret", shared_dir.join("link")).expect("A way out");
    let config = FsConfig {
        tag: "shared".into(),
        shared_dir,
        cache: CachePolicy::Auto,
        num_request_queues: 1,
        queue_size: 64,
        writeback,
        // A message is answered before the next is said.
        workers: 0,
        xattr: true,
        posix_locks,
    };
    play(Box::new(Fs::new(config, Confinement::On).expect("A shared directory")), &case);
    assert_eq!(fs::read(dir.path().join("secret")).ok().as_deref(), Some(&b"secret"[..]), "Nothing outside is touched");
});
