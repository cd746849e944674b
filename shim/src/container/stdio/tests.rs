use std::io::{Read, Write};

use super::*;

fn fifo(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A helper for logging programs, which ends with its last client.
fn helper() -> Arc<Helper> {
    let dir = tempfile::tempdir().unwrap();
    crate::helper::in_thread(dir.path())
}

async fn open(streams: &Streams) -> (Stdio, GuestEnds) {
    Stdio::open(streams, "c", "ns", &helper()).await.unwrap()
}

fn file(fd: OwnedFd) -> std::fs::File {
    std::fs::File::from(fd)
}

#[tokio::test]
async fn no_paths_are_no_streams() {
    let (stdio, ends) = open(&Streams::default()).await;
    assert!(ends.stdin.is_none() && ends.stdout.is_none() && ends.stderr.is_none());
    stdio.drained().await;
}

#[tokio::test]
async fn output_waits_for_a_late_client_and_ends_with_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let streams = Streams { stdout: fifo(dir.path(), "out"), ..Streams::default() };
    let (stdio, ends) = open(&streams).await;
    let mut guest = file(ends.stdout.unwrap());
    guest.write_all(b"early").unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(50), stdio.drained()).await.is_err());
    let mut client = std::fs::File::open(&streams.stdout).unwrap();
    guest.write_all(b" late").unwrap();
    drop(guest);
    stdio.drained().await;
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "early late");
}

#[tokio::test]
async fn input_ends_when_the_client_has_left_and_close_io_was_called() {
    let dir = tempfile::tempdir().unwrap();
    let streams = Streams { stdin: fifo(dir.path(), "in"), ..Streams::default() };
    let (stdio, ends) = open(&streams).await;
    let mut guest = file(ends.stdin.unwrap());
    let mut client = OpenOptions::new().write(true).open(&streams.stdin).unwrap();
    client.write_all(b"x").unwrap();
    drop(client);
    let mut buffer = [0; 4];
    assert_eq!(guest.read(&mut buffer).unwrap(), 1);
    assert_eq!(guest.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    stdio.close_stdin();
    assert_eq!(guest.read(&mut buffer).unwrap(), 0);
}

#[tokio::test]
async fn a_terminal_has_no_standard_error() {
    let dir = tempfile::tempdir().unwrap();
    let streams =
        Streams { stdout: fifo(dir.path(), "o"), stderr: fifo(dir.path(), "e"), terminal: true, ..Streams::default() };
    let (_stdio, ends) = open(&streams).await;
    assert!(ends.stdout.is_some() && ends.stderr.is_none());
}

#[tokio::test]
async fn a_file_is_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("logs/out");
    for text in ["one", " two"] {
        let streams = Streams { stdout: format!("file://{}", path.display()), ..Streams::default() };
        let (stdio, ends) = open(&streams).await;
        file(ends.stdout.unwrap()).write_all(text.as_bytes()).unwrap();
        stdio.drained().await;
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "one two");
}

#[tokio::test]
async fn a_logging_program_reads_both_outputs() {
    let dir = tempfile::tempdir().unwrap();
    let (script, log) = (dir.path().join("logger"), dir.path().join("log"));
    let text = format!(
        "#!/bin/sh\nexec 5>&-\n(cat <&3; cat <&4; echo $CONTAINER_ID $CONTAINER_NAMESPACE $*) >{}.part\nmv {0}.part {0}\n",
        log.display()
    );
    std::fs::write(&script, text.replace("{0}", log.to_str().unwrap())).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}?a=b", script.display());
    let streams = Streams { stdout: uri.clone(), stderr: uri, ..Streams::default() };
    let (stdio, ends) = open(&streams).await;
    file(ends.stdout.unwrap()).write_all(b"out ").unwrap();
    file(ends.stderr.unwrap()).write_all(b"err ").unwrap();
    stdio.drained().await;
    while !log.exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "out err c ns a b\n");
}

#[tokio::test]
async fn a_stream_that_cannot_be_opened_is_named() {
    let streams = Streams { stdout: "fifo:///nonexistent/f".to_owned(), ..Streams::default() };
    let error = Stdio::open(&streams, "c", "ns", &helper()).await.unwrap_err();
    assert_eq!(error.to_string(), "Cannot open /nonexistent/f as a standard stream");
}
