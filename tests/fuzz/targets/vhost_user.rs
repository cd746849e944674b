//! Backends that answer a vhost-user frontend with anything.

#![no_main]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use devices::testkit::{Guest, memory};
use devices::virtio::vhost_user::{Patience, VhostUser, VhostUserConfig, VhostUserKind};
use libfuzzer_sys::fuzz_target;
use seccomp::Confinement;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// VERSION_1, protocol features, flush, queues; of the protocol: queues, answers, configuration, requests in flight.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 12 | 1 << 9;
const PROTOCOL: u64 = 1 << 0 | 1 << 3 | 1 << 9 | 1 << 12;

/// A driver waits no longer than this for a device that comes up or gives up.
const PATIENCE: Duration = Duration::from_millis(20);

#[derive(Arbitrary, Debug)]
struct Input {
    kind: u8,
    features: u64,
    protocol: u64,
    /// Instead of the right answer to the nth message.
    answers: Vec<Option<Answer>>,
}

#[derive(Arbitrary, Debug)]
enum Answer {
    Number(u64),
    Body(Vec<u8>),
    File(u64, Vec<u8>),
    /// Another header.
    Header {
        request: u32,
        flags: u32,
        size: u32,
        body: Vec<u8>,
    },
    Bytes(Vec<u8>),
    Twice,
    HangUp,
}

struct Backend {
    stream: UnixStream,
    input: Arc<Input>,
    enabled: Arc<AtomicBool>,
}

impl Backend {
    /// Serves until the frontend or the input has enough.
    fn serve(mut self) {
        let input = Arc::clone(&self.input);
        let mut count = 0;
        while let Some((request, flags, body)) = self.receive() {
            let right = self.right_answer(request, flags, &body);
            let wanted = right.is_some();
            let wrong = input.answers.get(count).and_then(Option::as_ref).filter(|_| wanted);
            let done = match wrong {
                None => right.is_none_or(|right| self.say(request, &right, None)),
                Some(wrong) => self.say_wrong(wrong, request, &right.unwrap_or_default()),
            };
            if !done {
                return;
            }
            self.enabled.fetch_or(request == SET_VRING_ENABLE, Ordering::Release);
            count += usize::from(wanted);
        }
    }

    fn receive(&mut self) -> Option<(u32, u32, Vec<u8>)> {
        let mut header = [0; 12];
        let mut fds = [-1; 32];
        let mut part = [libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() }];
        // SAFETY: the part is the whole of an array that outlives the call.
        let (length, files) = unsafe { self.stream.recv_with_fds(&mut part, &mut fds) }.ok()?;
        close(&fds[..files]);
        self.stream.read_exact(header.get_mut(length..).filter(|_| length > 0)?).ok()?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut body = vec![0; usize::try_from(word(8)).ok().filter(|size| *size < 0x1_0000)?];
        self.stream.read_exact(&mut body).ok()?;
        Some((word(0), word(4), body))
    }

    fn right_answer(&self, request: u32, flags: u32, body: &[u8]) -> Option<Vec<u8>> {
        match request {
            GET_FEATURES => Some((self.input.features ^ FEATURES).to_le_bytes().into()),
            GET_PROTOCOL_FEATURES => Some((self.input.protocol ^ PROTOCOL).to_le_bytes().into()),
            GET_QUEUE_NUM => Some(8_u64.to_le_bytes().into()),
            GET_VRING_BASE => Some(body.to_vec()),
            GET_CONFIG => Some([&body[..body.len().min(12)], &[1; 60]].concat()),
            GET_INFLIGHT_FD => Some([&4096_u64.to_le_bytes()[..], &[0; 16]].concat()),
            _ if flags & NEED_REPLY != 0 => Some(vec![0; 8]),
            _ => None,
        }
    }

    fn say(&mut self, request: u32, body: &[u8], file: Option<RawFd>) -> bool {
        let words = [request, VERSION | REPLY, body.len() as u32];
        let message = [&words.map(u32::to_le_bytes).concat()[..], body].concat();
        match file {
            Some(file) => self.stream.send_with_fd(&message[..], file).is_ok(),
            None if request == GET_INFLIGHT_FD => {
                tempfile::tempfile_in("/dev/shm").is_ok_and(|file| self.say(request, body, Some(file.as_raw_fd())))
            }
            None => self.stream.write_all(&message).is_ok(),
        }
    }

    /// What cannot be an answer ends the connection, so that nobody waits for the rest of it.
    fn say_wrong(&mut self, answer: &Answer, request: u32, right: &[u8]) -> bool {
        match answer {
            Answer::Number(number) => self.say(request, &number.to_le_bytes(), None),
            Answer::Twice => self.say(request, right, None) && self.say(request, right, None),
            Answer::HangUp => false,
            Answer::Body(body) => self.say(request, body, None) && body.len() == right.len(),
            Answer::File(size, body) => {
                let file: File = tempfile::tempfile_in("/dev/shm").expect("A file");
                let _ = file.set_len(size % (1 << 20));
                self.say(request, body, Some(file.as_raw_fd())) && body.len() == right.len()
            }
            Answer::Header { request, flags, size, body } => {
                let words = [*request, *flags, *size].map(u32::to_le_bytes).concat();
                let _ = self.stream.write_all(&[&words[..], body].concat());
                false
            }
            Answer::Bytes(bytes) => {
                let _ = self.stream.write_all(bytes);
                false
            }
        }
    }
}

fn close(fds: &[RawFd]) {
    for fd in fds {
        // SAFETY: they came with a message and nobody else knows them.
        unsafe { libc::close(*fd) };
    }
}

fuzz_target!(|input: Input| {
    let dir = tempfile::tempdir().expect("A directory");
    let socket = dir.path().join("socket");
    let listener = UnixListener::bind(&socket).expect("A socket");
    let kind = match input.kind % 3 {
        0 => VhostUserKind::Blk,
        1 => VhostUserKind::Fs { tag: "shared".into() },
        _ => VhostUserKind::Net { mac: None },
    };
    let enabled = Arc::new(AtomicBool::new(false));
    let (seen, input) = (Arc::clone(&enabled), Arc::new(input));
    let backend = thread::spawn(move || {
        // The listener goes when the first connection has come: there is no other backend.
        let stream = listener.accept().expect("A frontend").0;
        drop(listener);
        Backend { stream, input, enabled: seen }.serve();
    });
    let patience = Patience { answers: PATIENCE, first_retry: PATIENCE, longest_retry: PATIENCE, absence: PATIENCE };
    let config = VhostUserConfig { id: "backend".into(), socket, kind, num_queues: 1, queue_size: 16, patience };
    let memory = memory();
    if let Ok(device) = VhostUser::new(config, &memory, Confinement::On) {
        let guest = Guest::with_memory(Box::new(device), memory);
        let running = guest.bring_up(0, |_, _| {});
        let deadline = Instant::now() + PATIENCE;
        while !enabled.load(Ordering::Acquire)
            && running.guest.status() & 0x40 == 0
            && !backend.is_finished()
            && Instant::now() < deadline
        {
            thread::yield_now();
        }
        running.guest.kick(0);
        assert_eq!(running.guest.set_status(0), 0, "A reset always works");
    }
    backend.join().expect("A backend that ends");
});
