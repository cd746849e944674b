//! Words on StratoVirt's command line.

#![no_main]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmm::stratovirt::CommandLine;

const OPTIONS: [&str; 22] = [
    "-machine",
    "-cpu",
    "-smp",
    "-m",
    "-kernel",
    "-append",
    "-initrd",
    "-drive",
    "-device",
    "-netdev",
    "-chardev",
    "-serial",
    "-qmp",
    "-mon",
    "-object",
    "-numa",
    "-incoming",
    "-global",
    "-mem-path",
    "-D",
    "-daemonize",
    "-S",
];

const PIECES: [&str; 32] = [
    "microvm",
    "type=",
    "id=",
    "file=",
    "drive=",
    "netdev=",
    "chardev=",
    "bus=",
    "addr=",
    "path=",
    "size=",
    "socket,",
    "virtio-blk-device",
    "virtio-net-device",
    "vhost-vsock-device",
    "virtio-serial-device",
    "virtconsole",
    "tap,",
    "memory-backend-ram",
    "rng-random",
    "iothread",
    "mac=",
    "fds=",
    "cpus=",
    "on",
    "off",
    "0x",
    "1G",
    "unix:",
    ",",
    "readonly=",
    "nowait",
];

#[derive(Arbitrary, Debug)]
enum Word {
    Option(u8),
    List(Vec<Piece>),
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Piece {
    Known(u8),
    Number(u64),
    Text(String),
}

impl Word {
    fn text(&self) -> OsString {
        match self {
            Self::Option(index) => OPTIONS[usize::from(*index) % OPTIONS.len()].into(),
            Self::Bytes(bytes) => OsString::from_vec(bytes.clone()),
            Self::List(pieces) => pieces
                .iter()
                .map(|piece| match piece {
                    Piece::Known(index) => PIECES[usize::from(*index) % PIECES.len()].to_owned(),
                    Piece::Number(number) => number.to_string(),
                    Piece::Text(text) => text.clone(),
                })
                .collect::<String>()
                .into(),
        }
    }
}

fuzz_target!(|words: Vec<Word>| {
    // A refusal is a sentence; making it must not fail either.
    let _ = CommandLine::parse(words.iter().map(Word::text)).map_err(|refusal| refusal.to_string());
});
