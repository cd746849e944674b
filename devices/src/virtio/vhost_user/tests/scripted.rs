//! A backend that speaks the protocol byte by byte, and lies where a test wants it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;
use crate::testkit::eventually;

/// A message of the frontend.
pub struct Message {
    /// Which connection it came over, from 0.
    pub connection: usize,
    pub request: u32,
    pub flags: u32,
    pub body: Vec<u8>,
    pub files: Vec<File>,
}

impl Message {
    /// A number of 32 bits in the body.
    pub fn word(&self, index: usize) -> u32 {
        u32::from_le_bytes(self.body[4 * index..4 * index + 4].try_into().unwrap())
    }
}

/// What a backend does about a message.
pub enum Reaction {
    /// What a friendly one does.
    Friendly,
    /// The answer with this body.
    Answer(Vec<u8>),
    /// These bytes, whatever they are.
    Raw(Vec<u8>),
    /// These bytes, and the end of the connection.
    RawAndHangUp(Vec<u8>),
    /// The answer with this body, and a descriptor that nobody asked for.
    AnswerWithFile(Vec<u8>),
    /// Nothing at all.
    Silence,
}

/// What a backend is.
pub struct Script {
    pub features: u64,
    pub protocol: u64,
    pub queues: u64,
    pub config: Vec<u8>,
    pub react: Box<dyn FnMut(&Message) -> Reaction + Send>,
}

impl Default for Script {
    fn default() -> Self {
        let mut config = vec![0; 60];
        config[0] = 100;
        config[12] = 126;
        Self {
            features: 1 << VIRTIO_F_VERSION_1 | PROTOCOL | FLUSH,
            protocol: REPLY_ACK | CONFIG | MQ,
            queues: 8,
            config,
            react: Box::new(|_| Reaction::Friendly),
        }
    }
}

impl Script {
    /// A friendly backend but for what `react` does.
    pub fn reacting(react: impl FnMut(&Message) -> Reaction + Send + 'static) -> Self {
        Self { react: Box::new(react), ..Self::default() }
    }
}

/// A backend in threads of its own. One connection is served at a time.
pub struct Backend {
    dir: tempfile::TempDir,
    pub log: Arc<Mutex<Vec<Message>>>,
    /// The connection that is served.
    current: Arc<Mutex<Option<UnixStream>>>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    pub fn new(script: Script) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let (log, current, ending) = (Arc::default(), Arc::default(), Arc::new(AtomicBool::new(false)));
        let mut serving = Serving { script, log: Arc::clone(&log), inflight: None };
        let (shared, ended): (Arc<Mutex<Option<UnixStream>>>, _) = (Arc::clone(&current), Arc::clone(&ending));
        let thread = std::thread::spawn(move || {
            for (connection, stream) in listener.incoming().enumerate() {
                let stream = stream.unwrap();
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                *shared.lock().unwrap() = Some(stream.try_clone().unwrap());
                serving.serve(connection, stream);
            }
        });
        Self { dir, log, current, ending, thread: Some(thread) }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Ends the connection, as the death of a process does; another may be made.
    pub fn hang_up(&self) {
        if let Some(stream) = self.current.lock().unwrap().take() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Says something without being asked.
    pub fn blurt(&self, bytes: &[u8]) {
        self.current.lock().unwrap().as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// How many messages of a kind came over a connection.
    pub fn count(&self, connection: usize, request: u32) -> usize {
        let log = self.log.lock().unwrap();
        log.iter().filter(|message| (message.connection, message.request) == (connection, request)).count()
    }

    /// Waits until the rings were enabled over a connection.
    pub fn wait_enabled(&self, connection: usize) {
        eventually("Rings are enabled", || self.count(connection, SET_VRING_ENABLE) > 0);
    }

    /// The bodies of all messages of a kind, by their first and second number.
    pub fn states(&self, connection: usize, request: u32) -> Vec<(u32, u32)> {
        let log = self.log.lock().unwrap();
        let wanted = log.iter().filter(|message| (message.connection, message.request) == (connection, request));
        wanted.map(|message| (message.word(0), message.word(1))).collect()
    }

    /// The event descriptor that came with the last message of a kind.
    pub fn event(&self, request: u32) -> EventFd {
        let log = self.log.lock().unwrap();
        let message = log.iter().rfind(|message| message.request == request).unwrap();
        let file = message.files[0].try_clone().unwrap();
        // SAFETY: the descriptor is given away by its owner.
        unsafe { EventFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(file)) }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        self.hang_up();
        let _ = UnixStream::connect(self.socket());
        let result = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            result.unwrap().unwrap();
        }
    }
}

struct Serving {
    script: Script,
    log: Arc<Mutex<Vec<Message>>>,
    inflight: Option<File>,
}

impl Serving {
    fn serve(&mut self, connection: usize, mut stream: UnixStream) {
        while let Some(message) = receive(connection, &mut stream) {
            let reaction = (self.script.react)(&message);
            let (bytes, hang_up) = match reaction {
                Reaction::Friendly => (self.friendly(&message, &stream), false),
                Reaction::Answer(body) => (Some(answer(&message, &body)), false),
                Reaction::Raw(bytes) => (Some(bytes), false),
                Reaction::RawAndHangUp(bytes) => (Some(bytes), true),
                Reaction::AnswerWithFile(body) => {
                    stream.send_with_fd(&answer(&message, &body)[..], stream.as_raw_fd()).unwrap();
                    (None, false)
                }
                Reaction::Silence => (None, false),
            };
            self.log.lock().unwrap().push(message);
            let sent = bytes.is_none_or(|bytes| stream.write_all(&bytes).is_ok());
            if hang_up || !sent {
                let _ = stream.shutdown(std::net::Shutdown::Both);
                return;
            }
        }
    }

    fn friendly(&mut self, message: &Message, stream: &UnixStream) -> Option<Vec<u8>> {
        let body = match message.request {
            GET_FEATURES => self.script.features.to_le_bytes().to_vec(),
            GET_PROTOCOL_FEATURES => self.script.protocol.to_le_bytes().to_vec(),
            GET_QUEUE_NUM => self.script.queues.to_le_bytes().to_vec(),
            GET_CONFIG => [&message.body[..12], &self.script.config].concat(),
            GET_VRING_BASE => message.body.clone(),
            GET_INFLIGHT_FD => {
                let file = tempfile::tempfile().unwrap();
                file.set_len(4096).unwrap();
                let mut body = message.body.clone();
                body[..8].copy_from_slice(&4096_u64.to_le_bytes());
                stream.send_with_fd(&answer(message, &body)[..], file.as_raw_fd()).unwrap();
                self.inflight = Some(file);
                return None;
            }
            // The frontend wants to know that it was done.
            _ if message.flags & 8 != 0 => 0_u64.to_le_bytes().to_vec(),
            _ => return None,
        };
        Some(answer(message, &body))
    }
}

/// An answer to `message`.
pub fn answer(message: &Message, body: &[u8]) -> Vec<u8> {
    header(message.request, 5, body.len() as u32).into_iter().chain(body.iter().copied()).collect()
}

pub fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size].into_iter().flat_map(u32::to_le_bytes).collect()
}

fn receive(connection: usize, stream: &mut UnixStream) -> Option<Message> {
    let mut head = [0; 12];
    let mut fds: [RawFd; 16] = [-1; 16];
    let mut vectors = [libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() }];
    // SAFETY: the vector describes a buffer that any bytes may be written to.
    let (count, received) = unsafe { stream.recv_with_fds(&mut vectors, &mut fds) }.ok()?;
    // SAFETY: the descriptors were just received, and nobody else has them.
    let files = fds.iter().take(received).map(|fd| unsafe { File::from_raw_fd(*fd) }).collect();
    if count == 0 {
        return None;
    }
    stream.read_exact(&mut head[count..]).ok()?;
    let word = |index: usize| u32::from_le_bytes(head[4 * index..4 * index + 4].try_into().unwrap());
    let mut body = vec![0; word(2) as usize];
    stream.read_exact(&mut body).ok()?;
    Some(Message { connection, request: word(0), flags: word(1), body, files })
}
