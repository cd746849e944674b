//! A shim's socket for metrics: HTTP, one request a connection, one connection at a time.

use std::fs::File;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::{JSON, TEXT, families, socket_in};

/// Longest time from a connection to its end: whoever is slower is cut off.
const PATIENCE: Duration = Duration::from_secs(2);
/// Shortest time from one connection to the next. Reading a process's memory takes the host time, and an accept that fails
/// for lack of descriptors would fail at once again.
const INTERVAL: Duration = Duration::from_millis(10);
/// Longest request: a scraper's headers take some hundred bytes.
const MAX_REQUEST: usize = 4096;
/// Most headers of a request.
const MAX_HEADERS: usize = 32;

/// An answer.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: &'static str,
    content_type: &'static str,
    body: Vec<u8>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// For Prometheus.
    Text,
    /// For `inlay metrics`.
    Json,
}

impl Page {
    fn content_type(self) -> &'static str {
        match self {
            Self::Text => families::CONTENT_TYPE,
            Self::Json => "application/json",
        }
    }
}

/// Makes the socket in the directory of a sandbox.
pub fn bind(directory: &File) -> io::Result<UnixListener> {
    UnixListener::bind(socket_in(directory))
}

/// Answers whoever connects, with what `page` returns, for as long as it is polled.
pub async fn serve<F: Future<Output = Vec<u8>>>(listener: &UnixListener, page: impl Fn(Page) -> F) {
    let mut turns = interval(INTERVAL);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        let answered = async {
            let (mut stream, _) = listener.accept().await?;
            timeout(PATIENCE, answer(&mut stream, &page)).await?
        };
        if let Err(error) = answered.await {
            tracing::debug!(%error, "A request for metrics was not answered");
        }
    }
}

async fn answer<F: Future<Output = Vec<u8>>>(stream: &mut UnixStream, page: &impl Fn(Page) -> F) -> io::Result<()> {
    let answer = match read_request(stream).await? {
        Ok(wanted) => Answer { status: "200 OK", content_type: wanted.content_type(), body: page(wanted).await },
        Err(status) => Answer { status, content_type: "text/plain", body: format!("{status}\n").into_bytes() },
    };
    let Answer { status, content_type, body } = answer;
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(&body).await?;
    stream.shutdown().await
}

/// What is asked for, or the status with which that is refused.
async fn read_request(stream: &mut UnixStream) -> io::Result<Result<Page, &'static str>> {
    let mut request = Vec::with_capacity(MAX_REQUEST);
    loop {
        let room = MAX_REQUEST.saturating_sub(request.len());
        if room == 0 {
            return Ok(Err("431 Request Header Fields Too Large"));
        }
        if (&mut *stream).take(room as u64).read_buf(&mut request).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(asked) = parse(&request) {
            return Ok(asked);
        }
    }
}

/// `None` while the request is not complete. Pure: whatever the bytes are, it returns.
fn parse(bytes: &[u8]) -> Option<Result<Page, &'static str>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(status) if status.is_partial() => return None,
        Ok(_) => {}
        Err(httparse::Error::TooManyHeaders) => return Some(Err("431 Request Header Fields Too Large")),
        Err(_) => return Some(Err("400 Bad Request")),
    }
    if request.method != Some("GET") {
        return Some(Err("405 Method Not Allowed"));
    }
    Some(match request.path {
        Some(TEXT) => Ok(Page::Text),
        Some(JSON) => Ok(Page::Json),
        _ => Err("404 Not Found"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        let get = |path: &str| parse(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
        assert_eq!((get("/metrics"), get("/figures")), (Ok(Page::Text), Ok(Page::Json)));
        assert_eq!(get("/"), Err("404 Not Found"));
        assert_eq!(parse(b"GET /metrics HTTP/1.1\r\nHost: x\r\n"), None);
        assert_eq!(parse(b"POST /metrics HTTP/1.1\r\n\r\n"), Some(Err("405 Method Not Allowed")));
        assert_eq!(parse(b"\x16\x03\x01"), Some(Err("400 Bad Request")));
        let with_headers = |count: usize| format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(count));
        assert_eq!(parse(with_headers(MAX_HEADERS).as_bytes()), Some(Ok(Page::Text)));
        assert!(parse(with_headers(MAX_HEADERS + 1).as_bytes()).unwrap().unwrap_err().starts_with("431"));
    }

    /// Sends `request` to a server and returns all that it answers.
    async fn ask(request: &[u8]) -> String {
        let directory = tempfile::tempdir().unwrap();
        let listener = bind(&File::open(directory.path()).unwrap()).unwrap();
        let server = serve(&listener, |page| async move { format!("{page:?}").into_bytes() });
        let client = async {
            let mut stream = UnixStream::connect(directory.path().join(super::super::SOCKET)).await.unwrap();
            stream.write_all(request).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        tokio::select! {
            () = server => unreachable!(),
            answer = client => answer,
        }
    }

    #[tokio::test]
    async fn a_request_is_answered_whole() {
        let answer = ask(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text;"), "{answer}");
        assert!(answer.contains("Content-Length: 4\r\n") && answer.ends_with("\r\n\r\nText"), "{answer}");
    }

    #[tokio::test]
    async fn a_request_has_a_longest_length() {
        let request = |length: usize| {
            let head = b"GET /metrics HTTP/1.1\r\nA: ";
            let filling = vec![b'x'; length - head.len() - 4];
            [head.as_slice(), &filling, b"\r\n\r\n"].concat()
        };
        assert!(ask(&request(MAX_REQUEST)).await.starts_with("HTTP/1.1 200"));
        // Not read to its end.
        let endless = &request(MAX_REQUEST + 4)[..MAX_REQUEST];
        assert!(ask(endless).await.starts_with("HTTP/1.1 431"));
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_is_cut_off_and_others_are_served() {
        let directory = tempfile::tempdir().unwrap();
        let listener = bind(&File::open(directory.path()).unwrap()).unwrap();
        let server = serve(&listener, |_| async { b"x".to_vec() });
        let socket = directory.path().join(super::super::SOCKET);
        let clients = async {
            let mut silent = UnixStream::connect(&socket).await.unwrap();
            let mut next = UnixStream::connect(&socket).await.unwrap();
            next.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            next.read_to_string(&mut answer).await.unwrap();
            assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
            answer
        };
        tokio::select! {
            () = server => unreachable!(),
            answer = clients => assert!(answer.ends_with("x")),
        }
    }
}
