//! A server and its clients, and servers that are none.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use sha2::{Digest, Sha256};

use super::super::cache::{ChunkCache, NoChunks};
use super::super::chunked::ChunkedSource;
use super::super::pack::packed;
use super::super::remote::{RemoteChunks, RemoteError};
use super::super::stream::Address;
use super::super::{Source, SourceError};
use super::*;

const CHUNK: u64 = 65536;
const LENGTH_OF_ALL: u64 = 16 * CHUNK;
const SHORT: Duration = Duration::from_millis(200);

/// Each chunk is full of its number, the first ones of zeros.
fn template() -> (Arc<ChunkIndex>, File) {
    let memory = tempfile::tempfile().expect("file");
    memory.set_len(LENGTH_OF_ALL).expect("length");
    for number in 2..16_u8 {
        memory.write_all_at(&[number; 65536], u64::from(number) * CHUNK).expect("write");
    }
    packed(memory, 65536)
}

struct Running {
    stop: Arc<EventFd>,
    address: Address,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.write(1).expect("stop");
        self.thread.take().expect("once").join().expect("join");
    }
}

fn running(index: &ChunkIndex, file: File, tcp: bool) -> Running {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("chunks");
    let (listener, address) = if tcp {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address").to_string();
        (Listener::Tcp(listener), Address::Tcp(address))
    } else {
        (Listener::Unix(UnixListener::bind(&path).expect("bind")), Address::Unix(path))
    };
    let stop = Arc::new(EventFd::new(libc::EFD_NONBLOCK).expect("event"));
    let server = ChunkServer::new(index, file, Arc::clone(&stop), Confinement::On).expect("server");
    let thread = std::thread::spawn(move || server.run(&listener).expect("run"));
    Running { stop, address, thread: Some(thread), _directory: directory }
}

fn remote(index: &Arc<ChunkIndex>, address: &Address, patience: Duration, cache: Option<ChunkCache>) -> ChunkedSource {
    let chunks = RemoteChunks::connect(address, patience).expect("connect");
    ChunkedSource::new(Arc::clone(index), chunks, cache).expect("source")
}

fn check(source: &mut ChunkedSource) {
    let mut buffer = vec![0xaa; usize::try_from(4 * CHUNK).expect("small")];
    for offset in (0..LENGTH_OF_ALL).step_by(buffer.len()) {
        source.read(offset, &mut buffer).expect("read");
        for (index, chunk) in buffer.chunks(65536).enumerate() {
            let number = u8::try_from(offset / CHUNK + index as u64).expect("small");
            let expected = if number < 2 { 0 } else { number };
            assert!(chunk.iter().all(|byte| *byte == expected));
        }
    }
}

#[test]
fn a_memory_comes_over_a_socket() {
    let (index, file) = template();
    for tcp in [false, true] {
        let server = running(&index, file.try_clone().expect("clone"), tcp);
        let mut chunks = RemoteChunks::connect(&server.address, PATIENCE).expect("connect");
        let sum = Sha256::digest(index.encode().expect("encode")).into();
        let fetched = Arc::new(chunks.index(&sum).expect("index"));
        assert_eq!(fetched, index);
        assert!(matches!(chunks.index(&[0; 32]), Err(RemoteError::Other)));
        check(&mut remote(&fetched, &server.address, PATIENCE, None));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| check(&mut remote(&index, &server.address, PATIENCE, None)));
            }
        });
    }
}

#[test]
fn what_is_in_the_cache_needs_no_server() {
    let (index, file) = template();
    let directory = tempfile::tempdir().expect("directory");
    let cache = || Some(ChunkCache::open(&directory.path().join("cache"), CHUNK, 64 * (CHUNK + 32)).expect("cache"));
    let server = running(&index, file, false);
    let mut first = remote(&index, &server.address, PATIENCE, cache());
    check(&mut first);
    let mut second = remote(&index, &server.address, PATIENCE, cache());
    drop(server);
    check(&mut second);
    assert!(cache().expect("cache").has_all(&index));
    check(&mut ChunkedSource::new(Arc::clone(&index), NoChunks, cache()).expect("source"));
    // The cache is lost.
    std::fs::write(directory.path().join("cache"), "").expect("write");
    assert!(!cache().expect("cache").has_all(&index));
    for mut source in [second, ChunkedSource::new(Arc::clone(&index), NoChunks, cache()).expect("source")] {
        source.recent.clear();
        let error = source.read(2 * CHUNK, &mut [0; 4096]).expect_err("nobody is there");
        assert!(matches!(error, SourceError::Gone(_)), "{error}");
    }
}

#[test]
fn clients_have_a_limit() {
    let clients = Arc::new(AtomicUsize::new(0));
    let seats: Vec<_> = (0..=MAX_CLIENTS).map_while(|_| Seat::take(&clients)).collect();
    assert_eq!(seats.len(), MAX_CLIENTS);
    drop(seats);
    assert!(Seat::take(&clients).is_some());
}

#[test]
fn a_client_that_talks_nonsense_is_left_and_others_are_not() {
    let (index, file) = template();
    let server = running(&index, file, false);
    let Address::Unix(path) = &server.address else { unreachable!() };
    for nonsense in [&[0xff; 64][..], &[0, 0, 0, 0], &[1, 0, 0, 0, 9], &[65, 0, 0, 0]] {
        let mut client = UnixStream::connect(path).expect("connect");
        client.write_all(nonsense).expect("write");
        let mut rest = Vec::new();
        // It may be reset, as not all was read.
        let _ = client.read_to_end(&mut rest);
        assert!(rest.is_empty());
    }
    let mut chunks = RemoteChunks::connect(&server.address, PATIENCE).expect("connect");
    let unknown = Chunk { sum: [9; 32], offset: 0, stored: 10 };
    use super::super::chunked::ChunkStore;
    chunks.want(&[&unknown]).expect("want");
    let error = chunks.take(&unknown, &mut Vec::new()).expect_err("missing");
    assert_eq!(error.to_string(), "The server has no chunk 09090909");
    check(&mut remote(&index, &server.address, PATIENCE, None));
}

/// A server that takes one request and does this.
fn other_server(does: impl FnOnce(UnixStream) + Send + 'static) -> (Address, tempfile::TempDir) {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("chunks");
    let listener = UnixListener::bind(&path).expect("bind");
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        let mut request = [0; 37];
        stream.read_exact(&mut request).expect("request");
        does(stream);
    });
    (Address::Unix(path), directory)
}

fn failure(does: impl FnOnce(UnixStream) + Send + 'static) -> SourceError {
    let (index, _) = template();
    let (address, _directory) = other_server(does);
    let mut source = remote(&index, &address, SHORT, None);
    source.read(2 * CHUNK, &mut [0; 4096]).expect_err("no such server")
}

fn reply(stream: &mut UnixStream, reply: &Reply, bytes: &[u8]) {
    stream.write_all(&wire::encode(reply)).expect("write");
    stream.write_all(bytes).expect("write");
}

#[test]
fn servers_that_lie_are_slow_or_gone_are_named() {
    let (index, _) = template();
    let stored = index.at(2 * CHUNK).expect("a chunk").stored;
    let length = usize::try_from(stored).expect("small");
    // Something else of the right length, of another length, the chunk of somebody else, nonsense.
    let lies: [Box<dyn FnOnce(UnixStream) + Send>; 3] = [
        Box::new(move |mut stream| reply(&mut stream, &Reply::Found(stored), &vec![7; length])),
        Box::new(move |mut stream| reply(&mut stream, &Reply::Found(stored + 1), &[])),
        Box::new(move |mut stream| reply(&mut stream, &Reply::Found(u32::MAX), &[])),
    ];
    for lie in lies {
        let error = failure(lie).to_string();
        assert!(error.contains("is not what the index says"), "{error}");
    }
    assert!(matches!(failure(|mut stream| stream.write_all(&[0xff; 20]).expect("write")), SourceError::Nonsense));
    assert!(matches!(failure(|mut stream| reply(&mut stream, &Reply::Missing, &[])), SourceError::Missing { .. }));
    assert!(matches!(failure(drop), SourceError::Gone(_)));
    assert!(matches!(failure(move |mut stream| reply(&mut stream, &Reply::Found(stored), &[1])), SourceError::Gone(_)));
    // Nothing at all, and a byte now and then: the deadline is for the whole chunk.
    let error = failure(|stream| {
        std::thread::sleep(3 * SHORT);
        drop(stream);
    });
    assert_eq!(error.to_string(), "The server of chunks has not answered within 0.2 s");
    let error = failure(move |mut stream| {
        stream.write_all(&wire::encode(&Reply::Found(stored))).expect("write");
        for _ in 0..40 {
            std::thread::sleep(SHORT / 10);
            if stream.write_all(&[0]).is_err() {
                return;
            }
        }
    });
    assert!(matches!(error, SourceError::Slow { .. }), "{error}");
    let nowhere = RemoteChunks::connect(&Address::Unix("/nonexistent".into()), SHORT).expect_err("nobody there");
    assert!(matches!(nowhere, SourceError::Gone(_)));
}

#[test]
fn whoever_waits_gives_up_at_the_end() {
    let (index, _) = template();
    let (address, _directory) = other_server(|stream| {
        std::thread::sleep(Duration::from_secs(5));
        drop(stream);
    });
    let mut source = remote(&index, &address, Duration::from_secs(60), None);
    let ended = Arc::new(EventFd::new(libc::EFD_NONBLOCK).expect("event"));
    source.give_up_on(Arc::clone(&ended));
    let begin = Instant::now();
    let waiting = std::thread::spawn(move || source.read(2 * CHUNK, &mut [0; 4096]).expect_err("given up"));
    std::thread::sleep(SHORT);
    ended.write(1).expect("write");
    assert!(matches!(waiting.join().expect("join"), SourceError::GivenUp));
    assert!(begin.elapsed() < Duration::from_secs(4));
}
