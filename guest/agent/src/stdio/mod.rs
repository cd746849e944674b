//! Standard streams of processes: a pipe or a terminal on the process's side, on the other a vsock connection or RPCs.

mod connections;
mod ends;
mod terminal;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use agent_proto::NULL_STREAM_PORT;
use nix::unistd::{Uid, fchown};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::Mutex;

use crate::reaper::{Exit, ended};
use crate::transport::Connection;
pub use connections::Connections;
use ends::{Sink, Source};
pub use terminal::{Console, Terminal};

/// Bytes moved at once: what a pipe holds by default (pipe(7)).
const CHUNK: usize = 64 << 10;
/// Most that one ReadStdout or ReadStderr answers, well below ttrpc's limit of 4 MiB a message.
const MAX_READ: usize = 1 << 20;

/// A stream could not be set up or used.
#[derive(Debug, Error)]
pub enum Error {
    /// The host named the same port for two streams.
    #[error("Port {0} is named for two streams")]
    PortTwice(u32),
    /// The host named a port from which it has not connected.
    #[error("No stdio connection from port {0} arrived")]
    NoConnection(u32),
    /// The stream does not go by RPC, or is closed.
    #[error("The stream is not open for this call")]
    NotOpen,
    /// The process has no terminal.
    #[error("The process has no terminal")]
    NoTerminal,
    /// The operating system refused.
    #[error("{what} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

/// What a request says about the streams of a process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ports {
    /// Of the connection that carries standard input; 0 is none.
    pub stdin: u32,
    /// Of the connection that carries standard output, or all output of a terminal.
    pub stdout: u32,
    /// Of the connection that carries standard error.
    pub stderr: u32,
}

impl Ports {
    fn by_rpc(self) -> bool {
        self.stdin == 0 && self.stdout == 0 && self.stderr == 0
    }

    /// A connection carries one stream.
    fn check(self) -> Result<(), Error> {
        let named = |port: u32| port != 0 && port != NULL_STREAM_PORT;
        for (port, others) in [(self.stdout, [self.stdin, self.stderr]), (self.stderr, [self.stdin, self.stdout])] {
            if named(port) && others.contains(&port) {
                return Err(Error::PortTwice(port));
            }
        }
        Ok(())
    }
}

/// Where a stream goes on the host's side.
enum Route {
    /// Nowhere: the process has `/dev/null`.
    Null,
    /// Through calls of the agent API.
    Rpc,
    /// Over a connection of its own.
    Connection(Connection),
}

/// The descriptors that the process gets as 0, 1 and 2.
pub struct ProcessEnds(pub [OwnedFd; 3]);

/// Streams of a process that is about to be made.
pub struct Prepared {
    process: ProcessEnds,
    /// Set when the process gets a terminal, which comes while it is made.
    console: Option<Console>,
    routes: [Route; 3],
    ends: Option<(Sink, Source, Source)>,
    owner: Uid,
}

/// Streams of a process that runs, as far as RPCs use them.
#[derive(Default)]
pub struct Streams {
    stdin: Mutex<Option<Sink>>,
    stdout: Mutex<Option<Source>>,
    stderr: Mutex<Option<Source>>,
    terminal: Option<Arc<Terminal>>,
    /// Ends the task that carries standard input.
    close_stdin: tokio::sync::Notify,
}

impl Prepared {
    /// Takes the connections that the ports name and makes pipes, or a console socket when `console` says where. They
    /// belong to `owner`, the user of the process: it can then open `/dev/stdout` as well as write to 1.
    pub async fn new(
        connections: &Connections,
        ports: Ports,
        console: Option<PathBuf>,
        owner: u32,
    ) -> Result<Self, Error> {
        let owner = Uid::from_raw(owner);
        let mut routes = [Route::Null, Route::Null, Route::Null];
        let list = [ports.stdin, ports.stdout, ports.stderr];
        ports.check()?;
        for (route, port) in routes.iter_mut().zip(list) {
            *route = match port {
                _ if ports.by_rpc() => Route::Rpc,
                0 | NULL_STREAM_PORT => Route::Null,
                port => Route::Connection(connections.take(port).await?),
            };
        }
        let null = || std::fs::File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        let null = || null().map_err(failed("Opening /dev/null"));
        if let Some(path) = console {
            let process = ProcessEnds([null()?, null()?, null()?]);
            let console = Console::listen(path).map_err(failed("Making the console socket"))?;
            return Ok(Self { process, console: Some(console), routes, ends: None, owner });
        }
        let pipe_failed = || failed("Making a pipe");
        let (stdin, stdin_end) = pipe::pipe().map_err(pipe_failed())?;
        let (stdout, stdout_end) = pipe::pipe().map_err(pipe_failed())?;
        let (stderr, stderr_end) = pipe::pipe().map_err(pipe_failed())?;
        // into_blocking_fd: the process must find descriptors that behave as a shell's do.
        let mut process = [
            stdin_end.into_blocking_fd().map_err(pipe_failed())?,
            stdout.into_blocking_fd().map_err(pipe_failed())?,
            stderr.into_blocking_fd().map_err(pipe_failed())?,
        ];
        for (end, route) in process.iter_mut().zip(&routes) {
            if matches!(route, Route::Null) {
                *end = null()?;
            } else {
                fchown(&*end, Some(owner), None).map_err(|errno| failed("Giving a pipe to the user")(errno.into()))?;
            }
        }
        let ends = Some((Sink::Pipe(stdin), Source::Pipe(stdout_end), Source::Pipe(stderr_end)));
        Ok(Self { process: ProcessEnds(process), console: None, routes, ends, owner })
    }

    /// Gives the process's ends away. They must be closed here once the process has them, else its output never ends.
    pub fn split(self) -> (ProcessEnds, Waiting) {
        let Self { process, console, routes, ends, owner } = self;
        (process, Waiting { routes, ends, console, owner })
    }
}

/// What is left of [`Prepared`] once the process has its ends.
pub struct Waiting {
    routes: [Route; 3],
    ends: Option<(Sink, Source, Source)>,
    console: Option<Console>,
    owner: Uid,
}

impl Waiting {
    /// Starts carrying the streams of the process whose end `exit` tells. `size` is the terminal's, rows and columns.
    pub async fn attach(self, exit: &Exit, size: Option<(u16, u16)>) -> Result<Arc<Streams>, Error> {
        let mut terminal = None;
        let (sink, stdout, stderr) = match (self.ends, self.console) {
            (Some((sink, stdout, stderr)), _) => (sink, stdout, Some(stderr)),
            (None, Some(console)) => {
                let pty = Arc::new(console.receive().await.map_err(failed("Receiving the terminal"))?);
                pty.give_to(self.owner).map_err(failed("Giving the terminal to the user"))?;
                if let Some((rows, columns)) = size {
                    pty.resize(rows, columns).map_err(failed("Setting the terminal's size"))?;
                }
                terminal = Some(Arc::clone(&pty));
                (Sink::Terminal(Arc::clone(&pty)), Source::Terminal(pty), None)
            }
            (None, None) => return Err(Error::NotOpen),
        };
        let [stdin_route, stdout_route, stderr_route] = self.routes;
        let mut streams = Streams { terminal, ..Streams::default() };
        let stdin = match stdin_route {
            Route::Rpc => {
                streams.stdin = Mutex::new(Some(sink));
                None
            }
            Route::Null => None,
            Route::Connection(connection) => Some((connection, sink)),
        };
        carry_out(stdout_route, Some(stdout), &mut streams.stdout);
        carry_out(stderr_route, stderr, &mut streams.stderr);
        let streams = Arc::new(streams);
        if let Some((connection, sink)) = stdin {
            tokio::spawn(carry_in(connection, sink, exit.clone(), Arc::clone(&streams)));
        }
        Ok(streams)
    }
}

fn carry_out(route: Route, source: Option<Source>, by_rpc: &mut Mutex<Option<Source>>) {
    match (route, source) {
        (Route::Rpc, source) => *by_rpc = Mutex::new(source),
        (Route::Connection(connection), Some(source)) => {
            tokio::spawn(copy_out(source, connection));
        }
        // Read all the same: see copy_out.
        (Route::Null, Some(source @ Source::Terminal(_))) => {
            tokio::spawn(copy_out(source, tokio::io::sink()));
        }
        (Route::Null | Route::Connection(_), _) => {}
    }
}

/// Until the last writer is gone and all that was written is delivered, or the host no longer wants it.
async fn copy_out(mut source: Source, mut target: impl tokio::io::AsyncWrite + Unpin) {
    let mut buffer = vec![0; CHUNK];
    let mut wanted = true;
    while let Ok(count @ 1..) = source.read(&mut buffer).await {
        let Some(data) = buffer.get(..count) else { break };
        if wanted && target.write_all(data).await.is_err() {
            match source {
                // Dropping the source closes the pipe: the process gets SIGPIPE, as if the reader had been its own.
                Source::Pipe(_) => return,
                // A terminal that nobody reads stops its processes when it is full.
                Source::Terminal(_) => wanted = false,
            }
        }
    }
    let _ = target.shutdown().await;
}

/// Until the host closes its side, CloseStdin is called, or the process has ended or reads no more.
async fn carry_in(mut connection: Connection, mut sink: Sink, exit: Exit, streams: Arc<Streams>) {
    let copy = async {
        let mut buffer = vec![0; CHUNK];
        while let Ok(count @ 1..) = connection.read(&mut buffer).await {
            let Some(data) = buffer.get(..count) else { break };
            if sink.write_all(data).await.is_err() {
                break;
            }
        }
    };
    tokio::select! {
        () = copy => {}
        () = streams.close_stdin.notified() => {}
        _ = ended(exit) => {}
    }
}

impl Streams {
    /// WriteStdin: all of `data`, which is at most one message.
    pub async fn write_stdin(&self, data: &[u8]) -> Result<(), Error> {
        let mut stdin = self.stdin.lock().await;
        let sink = stdin.as_mut().ok_or(Error::NotOpen)?;
        sink.write_all(data).await.map_err(failed("Writing to standard input"))
    }

    /// CloseStdin. What is in the pipe can still be read; a terminal stays open, its line discipline has no end of
    /// file that could be sent from here.
    pub async fn close_stdin(&self) {
        self.close_stdin.notify_one();
        let mut stdin = self.stdin.lock().await;
        if matches!(*stdin, Some(Sink::Pipe(_))) {
            *stdin = None;
        }
    }

    /// ReadStdout: up to `length` bytes; empty at the end of the stream.
    pub async fn read_stdout(&self, length: usize) -> Result<Vec<u8>, Error> {
        read(&self.stdout, length).await
    }

    /// ReadStderr, likewise.
    pub async fn read_stderr(&self, length: usize) -> Result<Vec<u8>, Error> {
        read(&self.stderr, length).await
    }

    /// TtyWinResize.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), Error> {
        let terminal = self.terminal.as_ref().ok_or(Error::NoTerminal)?;
        terminal.resize(rows, columns).map_err(failed("Setting the terminal's size"))
    }
}

async fn read(source: &Mutex<Option<Source>>, length: usize) -> Result<Vec<u8>, Error> {
    let mut source = source.lock().await;
    let Some(source) = source.as_mut() else { return Err(Error::NotOpen) };
    let mut buffer = vec![0; length.clamp(1, MAX_READ)];
    let count = source.read(&mut buffer).await.map_err(failed("Reading the stream"))?;
    buffer.truncate(count);
    Ok(buffer)
}
