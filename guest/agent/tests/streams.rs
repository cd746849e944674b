//! Standard streams: pipes and terminals, by connections and by RPC.

mod harness;

use std::time::Duration;

use agent_proto::agent;
use harness::{Agent, can_run, deadline};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// More than any buffer on the way holds.
const TEN_MEGABYTES: usize = 10 << 20;

/// Bytes in which a lost, repeated or swapped piece shows.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 1u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..length).map(next).collect()
}

#[tokio::test]
async fn ten_megabytes_go_in_and_come_out_as_they_were() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let (stdin_port, mut stdin) = agent.connect();
    let (stdout_port, mut stdout) = agent.connect();
    let mut request = agent.request("c1", "exec cat");
    (request.stdin_port, request.stdout_port) = (stdin_port, stdout_port);
    agent.run(&request).await;
    let sent = pattern(TEN_MEGABYTES);
    let write = async {
        stdin.write_all(&sent).await.expect("Open");
        stdin.shutdown().await.expect("Open");
    };
    let mut received = Vec::new();
    let ((), count) = tokio::join!(write, stdout.read_to_end(&mut received));
    assert_eq!(count.expect("Open to the end"), TEN_MEGABYTES);
    assert!(received == sent, "What came out is not what went in");
    assert_eq!(agent.wait("c1", "").await, 0);
}

#[tokio::test]
async fn nothing_is_lost_when_the_process_ends_before_it_is_read() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let (stdout_port, mut stdout) = agent.connect();
    let mut request = agent.request("c1", "i=0; while [ $i -lt 5000 ]; do echo 0123456789; i=$((i+1)); done");
    request.stdout_port = stdout_port;
    agent.run(&request).await;
    // Waiting does not wait for the streams: 55 KB are in the pipe and nobody has read.
    assert_eq!(agent.wait("c1", "").await, 0);
    agent.remove("c1").await;
    let mut out = String::new();
    stdout.read_to_string(&mut out).await.expect("Open to the end");
    assert_eq!(out.len(), 5000 * 11);
}

#[tokio::test]
async fn a_host_that_closes_output_is_a_broken_pipe_to_the_process() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let (stdout_port, stdout) = agent.connect();
    let (stderr_port, stderr) = agent.connect();
    // In a subshell: the kernel spares the first process of a PID namespace signals that it does not handle.
    let mut request = agent.request("c1", "(while true; do echo x; done); echo $? >&2");
    (request.stdout_port, request.stderr_port) = (stdout_port, stderr_port);
    agent.run(&request).await;
    drop(stdout);
    assert_eq!(harness::line(stderr).await, format!("{}\n", 128 + libc::SIGPIPE));
}

#[tokio::test]
async fn streams_of_an_ended_process_are_closed_to_the_host() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let (stdin_port, mut stdin) = agent.connect();
    let mut request = agent.request("c1", "exit 0");
    request.stdin_port = stdin_port;
    agent.run(&request).await;
    assert_eq!(agent.wait("c1", "").await, 0);
    let mut byte = [0];
    let read = tokio::time::timeout(Duration::from_secs(10), stdin.read(&mut byte)).await;
    assert_eq!(read.expect("Closed in time").expect("Closed in order"), 0);
}

#[tokio::test]
async fn a_terminal_is_one_stream_with_a_size() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let (stdin_port, mut stdin) = agent.connect();
    let (stdout_port, mut stdout) = agent.connect();
    let script = "stty size; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo terminal >&2; read line; stty size; echo got $line; exit 6";
    let mut request = agent.request("c1", script);
    (request.stdin_port, request.stdout_port) = (stdin_port, stdout_port);
    let process = request.OCI.mut_or_insert_default().Process.mut_or_insert_default();
    process.Terminal = true;
    process.ConsoleSize =
        protobuf::MessageField::some(agent_proto::oci::Box { Height: 24, Width: 80, ..Default::default() });
    agent.run(&request).await;
    let mut out = String::new();
    while !out.contains("terminal") {
        let mut bytes = [0; 256];
        let count = stdout.read(&mut bytes).await.expect("Open");
        assert!(count > 0, "{out}");
        out.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    let resize = agent::TtyWinResizeRequest { container_id: "c1".into(), row: 50, column: 132, ..Default::default() };
    agent.api.tty_win_resize(deadline(), &resize).await.expect("A terminal");
    stdin.write_all(b"typed\n").await.expect("Open");
    stdout.read_to_string(&mut out).await.expect("Open to the end");
    assert_eq!(out, "24 80\r\nterminal\r\ntyped\r\n50 132\r\ngot typed\r\n");
    assert_eq!(agent.wait("c1", "").await, 6);
}

#[tokio::test]
async fn a_terminal_that_nobody_reads_does_not_stop_its_process() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let script = "i=0; while [ $i -lt 5000 ]; do echo 0123456789; i=$((i+1)); done; exit 8";
    for (id, closed) in [("never", false), ("closed", true)] {
        let mut request = agent.request(id, script);
        request.OCI.mut_or_insert_default().Process.mut_or_insert_default().Terminal = true;
        if closed {
            // The end of the connection is dropped at once.
            request.stdout_port = agent.connect().0;
        }
        agent.run(&request).await;
        assert_eq!(agent.wait(id, "").await, 8);
    }
}

#[tokio::test]
async fn a_further_process_has_a_terminal_of_its_own() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    agent.run(&agent.request("c1", "exec sleep 100")).await;
    let mut exec = agent.exec_request("c1", "e1", "[ -t 0 ] && echo yes; exit 2");
    exec.process.mut_or_insert_default().Terminal = true;
    assert_eq!(agent.exec_output(&mut exec).await, (2, "yes\r\n".into(), String::new()));
    let resize = agent::TtyWinResizeRequest { container_id: "c1".into(), row: 1, column: 1, ..Default::default() };
    let error = agent.api.tty_win_resize(deadline(), &resize).await.expect_err("No terminal");
    assert!(error.to_string().contains("has no terminal"), "{error}");
}

#[tokio::test]
async fn a_user_can_open_its_own_streams() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let script = "echo out > /dev/stdout; echo err > /dev/stderr";
    let mut request = agent.request("c1", &format!("{script}; exec sleep 100 > /dev/null 2>&1"));
    let spec = request.OCI.mut_or_insert_default();
    spec.Process.mut_or_insert_default().User.mut_or_insert_default().UID = 1000;
    let (stdout_port, mut stdout) = agent.connect();
    let (stderr_port, mut stderr) = agent.connect();
    (request.stdout_port, request.stderr_port) = (stdout_port, stderr_port);
    agent.run(&request).await;
    let (mut out, mut err) = (String::new(), String::new());
    stdout.read_to_string(&mut out).await.expect("Open to the end");
    stderr.read_to_string(&mut err).await.expect("Open to the end");
    assert_eq!((out.as_str(), err.as_str()), ("out\n", "err\n"));

    for terminal in [false, true] {
        let mut exec = agent.exec_request("c1", "e1", script);
        let process = exec.process.mut_or_insert_default();
        process.User.mut_or_insert_default().UID = 1000;
        process.Terminal = terminal;
        let expected = if terminal { ("out\r\nerr\r\n", "") } else { ("out\n", "err\n") };
        let (code, out, err) = agent.exec_output(&mut exec).await;
        assert_eq!((code, out.as_str(), err.as_str()), (0, expected.0, expected.1));
    }
}

#[tokio::test]
async fn streams_go_by_rpc_when_no_port_is_named() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let mut request = agent.request("c1", "cat; echo done >&2");
    (request.stdin_port, request.stdout_port, request.stderr_port) = (0, 0, 0);
    agent.run(&request).await;
    let write = agent::WriteStreamRequest { container_id: "c1".into(), data: b"hello".to_vec(), ..Default::default() };
    assert_eq!(agent.api.write_stdin(deadline(), &write).await.expect("Written").len, 5);
    let read = agent::ReadStreamRequest { container_id: "c1".into(), len: 100, ..Default::default() };
    assert_eq!(agent.api.read_stdout(deadline(), &read).await.expect("Read").data, b"hello");
    let close = agent::CloseStdinRequest { container_id: "c1".into(), ..Default::default() };
    agent.api.close_stdin(deadline(), &close).await.expect("Closed");
    assert_eq!(agent.api.read_stderr(deadline(), &read).await.expect("Read").data, b"done\n");
    assert_eq!(agent.api.read_stdout(deadline(), &read).await.expect("Read").data, b"", "The end");
    assert_eq!(agent.wait("c1", "").await, 0);
    assert!(agent.api.write_stdin(deadline(), &write).await.is_err(), "It was closed");
}

#[tokio::test]
async fn a_port_that_nobody_connected_from_is_named() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let mut request = agent.request("c1", "true");
    request.stdout_port = 77;
    let error = agent.api.create_container(deadline(), &request).await.expect_err("None");
    assert!(error.to_string().contains("No stdio connection from port 77 arrived"), "{error}");
    request.stderr_port = 77;
    let error = agent.api.create_container(deadline(), &request).await.expect_err("Twice");
    assert!(error.to_string().contains("port 77") || error.to_string().contains("Port 77"), "{error}");
}
