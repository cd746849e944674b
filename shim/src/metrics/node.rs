//! The figures of all sandboxes of the node.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::families::Node;
use super::{Figures, JSON, socket_in};
use crate::ids::Id;
use crate::run_dir::RunDir;
use crate::sandbox::persist::Record;

/// How long a shim may take to answer. One that is well takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(3);
/// Sandboxes that are asked at a time: each takes two descriptors.
const AT_A_TIME: usize = 128;
/// Longest answer that is read: it has a kilobyte.
const MAX_ANSWER: u64 = 64 << 10;
/// Most headers of an answer.
const MAX_HEADERS: usize = 32;

/// What asking a sandbox came to.
enum Found {
    Figures(Box<Figures>),
    Starting,
    Unreachable,
    /// It ended meanwhile.
    Gone,
}

/// Asks all sandboxes of the node; in the order of their names. None holds up the others.
pub async fn ask(run_dir: &RunDir) -> io::Result<(Node, Vec<(String, Figures)>)> {
    let turns = Arc::new(Semaphore::new(AT_A_TIME));
    let mut asked = JoinSet::new();
    for id in names(&run_dir.sandboxes())? {
        let (run_dir, turns) = (run_dir.clone(), Arc::clone(&turns));
        asked.spawn(async move {
            // The semaphore is never closed.
            let _turn = turns.acquire().await;
            let found = ask_one(&run_dir, &id).await;
            (id, found)
        });
    }
    let (mut node, mut sandboxes) = (Node::default(), Vec::new());
    while let Some(answer) = asked.join_next().await {
        let (id, found) = answer.map_err(io::Error::other)?;
        match found {
            Found::Figures(figures) => sandboxes.push((id.to_string(), *figures)),
            Found::Starting => node.starting = node.starting.saturating_add(1),
            Found::Unreachable => node.unreachable = node.unreachable.saturating_add(1),
            Found::Gone => continue,
        }
        node.sandboxes = node.sandboxes.saturating_add(1);
    }
    sandboxes.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok((node, sandboxes))
}

fn names(directory: &Path) -> io::Result<Vec<Id>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().to_str().and_then(|name| Id::try_from(name).ok()));
    }
    Ok(names)
}

async fn ask_one(run_dir: &RunDir, id: &Id) -> Found {
    let path = run_dir.sandbox(id);
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(&path);
    let asked = match opened {
        Ok(directory) => timeout(PATIENCE, fetch(&directory)).await.unwrap_or_else(|late| Err(late.into())),
        Err(error) => Err(error),
    };
    match asked {
        Ok(figures) => Found::Figures(Box::new(figures)),
        Err(_) if !path.exists() => Found::Gone,
        // The socket is there from the end of the start on.
        Err(error) if error.kind() == io::ErrorKind::NotFound && lives(run_dir, id) => Found::Starting,
        Err(error) => {
            eprintln!("inlay: The sandbox {id} does not answer: {error}");
            Found::Unreachable
        }
    }
}

fn lives(run_dir: &RunDir, id: &Id) -> bool {
    // The record is written a moment after the directory is made.
    Record::load(run_dir, id).is_none_or(|record| record.shim.is_alive())
}

async fn fetch(directory: &File) -> io::Result<Figures> {
    let mut stream = UnixStream::connect(socket_in(directory)).await?;
    stream.write_all(format!("GET {JSON} HTTP/1.0\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer).await?;
    parse(&answer)
}

/// Pure: whatever the bytes are, it returns.
fn parse(answer: &[u8]) -> io::Result<Figures> {
    let nonsense = |error: &str| io::Error::new(io::ErrorKind::InvalidData, format!("It answers nonsense: {error}"));
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(answer).map_err(|error| nonsense(&error.to_string()))? {
        httparse::Status::Complete(length) => length,
        httparse::Status::Partial => return Err(nonsense("its head has no end")),
    };
    if response.code != Some(200) {
        return Err(nonsense(&format!("the status is {}", response.code.unwrap_or_default())));
    }
    let body = answer.get(head..).unwrap_or_default();
    serde_json::from_slice(body).map_err(|error| nonsense(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::metrics::{SOCKET, server};

    fn sandbox(root: &Path, name: &str) -> std::path::PathBuf {
        let path = root.join("sandboxes").join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[tokio::test(start_paused = true)]
    async fn sandboxes_are_counted_by_whether_they_answer() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = RunDir::at(root.path().into());
        assert_eq!(ask(&run_dir).await.unwrap(), (Node::default(), vec![]));

        // The longest name that containerd gives.
        let well = "w".repeat(76);
        let listener = server::bind(&File::open(sandbox(root.path(), &well)).unwrap()).unwrap();
        let figures = Figures { guest_memory: 7, ..Figures::default() };
        let page = || async { serde_json::to_vec(&figures).unwrap() };
        // It takes a connection and says nothing.
        let _silent = UnixListener::bind(sandbox(root.path(), "silent").join(SOCKET)).unwrap();
        drop(UnixListener::bind(sandbox(root.path(), "dead").join(SOCKET)).unwrap());
        sandbox(root.path(), "new");
        let answered = tokio::select! {
            () = server::serve(&listener, |_| page()) => unreachable!(),
            answered = ask(&run_dir) => answered.unwrap(),
        };
        assert_eq!(answered, (Node { sandboxes: 4, starting: 1, unreachable: 2 }, vec![(well, figures.clone())]));
    }

    #[test]
    fn nonsense_is_told_from_figures() {
        assert!(parse(b"HTTP/1.1 200 OK\r\n\r\n{}").is_ok());
        for bad in ["", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 500 No\r\n\r\n{}", "HTTP/1.1 200 OK\r\n\r\n{", "{}"] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }
}
