//! The Unix socket that other programs use.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;

use super::*;

fn start_with_socket() -> (Driver, Connector, tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let (vsock, connector) = device(Some(path.clone()));
    (Driver::start(vsock), connector, dir, path)
}

#[test]
fn a_client_connects_and_may_talk_ahead() {
    let (mut driver, _connector, _dir, path) = start_with_socket();
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"CONNECT 52\nahead").unwrap();
    let ports = driver.answer(52);
    let mut client = BufReader::new(client);
    let mut line = String::new();
    client.read_line(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", ports.host));
    assert_eq!(driver.expect(op::RW).data, b"ahead");
    driver.data(ports, b"back");
    let mut back = [0; 4];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"back");
}

#[test]
fn a_client_may_stutter() {
    let (mut driver, _connector, _dir, path) = start_with_socket();
    let mut client = UnixStream::connect(&path).unwrap();
    for part in ["CON", "NECT 5", "2", "\n"] {
        client.write_all(part.as_bytes()).unwrap();
        driver.settle();
    }
    driver.answer(52);
}

#[test]
fn clients_that_are_refused_or_make_no_sense_see_the_end() {
    let (mut driver, _connector, _dir, path) = start_with_socket();
    for nonsense in ["HELLO\n", "CONNECT x\n", &"C".repeat(100)] {
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(nonsense.as_bytes()).unwrap();
        // Closed with unread bytes, a socket is reset rather than ended.
        assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)), "{nonsense}");
    }
    driver.expect_silence();
    // A client that goes away before it finishes its line leaves nothing behind.
    UnixStream::connect(&path).unwrap().write_all(b"CONN").unwrap();

    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"CONNECT 52\n").unwrap();
    let request = driver.expect(op::REQUEST).header;
    driver.control(Ports { host: request.src_port, guest: 52 }, op::RST);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_guest_reaches_who_listens_beside_the_socket() {
    let (mut driver, connector, _dir, path) = start_with_socket();
    let port_path = |port| PathBuf::from(format!("{}_{port}", path.display()));
    let listener = UnixListener::bind(port_path(7)).unwrap();
    let ports = Ports { host: 7, guest: 1 };
    driver.request(ports);
    driver.data(ports, b"hi");
    let (mut stream, _) = listener.accept().unwrap();
    let mut hi = [0; 2];
    stream.read_exact(&mut hi).unwrap();
    assert_eq!(&hi, b"hi");

    driver.control(Ports { host: 8, guest: 1 }, op::REQUEST);
    driver.expect(op::RST);

    // A listener in this process comes first.
    let _other = UnixListener::bind(port_path(9)).unwrap();
    let (sender, receiver) = channel();
    connector.listen(9, Box::new(move |stream| sender.send(stream).unwrap()));
    driver.request(Ports { host: 9, guest: 1 });
    receiver.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn the_socket_file_goes_with_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let (vsock, _connector) = device(Some(path.clone()));
    let busy = Vsock::new(VsockConfig { guest_cid: CID, uds_path: Some(path.clone()) });
    assert!(matches!(busy, Err(VsockError::Listen { .. })));
    assert!(path.exists());
    drop(vsock);
    assert!(!path.exists());
}
