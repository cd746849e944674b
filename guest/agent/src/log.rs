//! The log: one JSON object a line, to the host's log port when it listens, else to the kernel's log.
//!
//! The connection may end under the agent: a guest that was restored from a template finds another host. So each record
//! that has no connection tries to make one.
//!
//! A subscriber of our own instead of `tracing-subscriber`: no spans, one level for all, no filter language, and
//! several hundred KiB less in every guest.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tokio::sync::oneshot;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Records that wait to be written. When the host does not read, the newest are dropped and counted: a full log must
/// not stop a container.
const QUEUE: usize = 1024;

/// What the writing thread is to do next.
enum Entry {
    /// Write a line.
    Line(String),
    /// Let go of the connection, and say so.
    Close(oneshot::Sender<()>),
}

struct JsonLines {
    level: Level,
    queue: SyncSender<Entry>,
    dropped: AtomicU64,
}

impl Subscriber for JsonLines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        // Spans are not recorded; the number only has to be valid.
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Entry::Line(render(event, dropped))) {
            self.dropped.fetch_add(dropped.saturating_add(1), Ordering::Relaxed);
        }
    }
}

struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(name(field), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(name(field), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(name(field), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(name(field), value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        // Writing to a String fails only when the value's own Debug does.
        let _ = write!(text, "{value:?}");
        self.0.insert(name(field), text.into());
    }
}

fn name(field: &Field) -> String {
    if field.name() == "message" { "msg".to_owned() } else { field.name().to_owned() }
}

fn render(event: &Event<'_>, dropped: u64) -> String {
    let metadata = event.metadata();
    let mut fields = Fields(Map::new());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    fields.0.insert("ts".into(), format!("{}.{:06}", now.as_secs(), now.subsec_micros()).into());
    fields.0.insert("level".into(), metadata.level().as_str().to_ascii_lowercase().into());
    fields.0.insert("target".into(), metadata.target().into());
    event.record(&mut fields);
    if dropped > 0 {
        fields.0.insert("dropped_before".into(), dropped.into());
    }
    let mut line = Value::Object(fields.0).to_string();
    line.push('\n');
    line
}

/// The end of the queue that [`drain`] writes from.
pub struct Records(Receiver<Entry>);

/// A hold on the log's connection.
#[derive(Clone)]
pub struct Connection(SyncSender<Entry>);

impl Connection {
    /// Writes what was logged so far and lets go of the connection. The next record makes another one.
    pub async fn close(&self) -> io::Result<()> {
        let (closed, done) = oneshot::channel();
        self.0.try_send(Entry::Close(closed)).map_err(|_| io::Error::other("The log is full"))?;
        done.await.map_err(|_| io::Error::other("The log has ended"))
    }
}

/// Makes every `tracing` event of this process a record. The records wait until [`drain`] is called.
pub fn init(level: Level) -> (Records, Connection) {
    let (queue, records) = sync_channel(QUEUE);
    let subscriber = JsonLines { level, queue: queue.clone(), dropped: AtomicU64::new(0) };
    // A second subscriber is refused; there is none, since only main calls this.
    let _ = tracing::subscriber::set_global_default(subscriber);
    (Records(records), Connection(queue))
}

/// Writes records on a thread of its own, to `stream` while that takes them, then to what `connect` makes, and to the
/// kernel's log while nobody listens.
///
/// The thread is what keeps a slow reader on the host from holding up the agent.
pub fn drain(records: Records, stream: Option<File>, connect: impl Fn() -> io::Result<File> + Send + 'static) {
    let write_all = move || {
        let mut sink = Sink { stream, connect };
        for entry in records.0 {
            match entry {
                Entry::Line(line) => sink.write(&line),
                Entry::Close(closed) => {
                    sink.stream = None;
                    // Whoever asked may have given up.
                    let _ = closed.send(());
                }
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("log".into()).stack_size(64 << 10).spawn(write_all) {
        write_to_kernel(&format!("The log thread did not start: {error}\n"));
    }
}

/// Where lines go.
struct Sink<C> {
    stream: Option<File>,
    connect: C,
}

impl<C: Fn() -> io::Result<File>> Sink<C> {
    /// Writes a line, whole, to a connection that takes it: the one that is there, else a fresh one.
    fn write(&mut self, line: &str) {
        if self.write_to_host(line) {
            return;
        }
        self.stream = (self.connect)().ok();
        if !self.write_to_host(line) {
            write_to_kernel(line);
        }
    }

    fn write_to_host(&mut self, line: &str) -> bool {
        let written = self.stream.as_mut().is_some_and(|stream| stream.write_all(line.as_bytes()).is_ok());
        if !written {
            self.stream = None;
        }
        written
    }
}

/// A line of the kernel's log, which the guest's memory alone has.
pub fn note_in_kernel(text: &str) {
    write_to_kernel(&format!("{text}\n"));
}

/// `/dev/kmsg` takes one record a write and cuts at its own limit; without it the record goes to standard error.
fn write_to_kernel(line: &str) {
    let written = File::options()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut kmsg| kmsg.write_all(format!("inlay-agent: {line}").as_bytes()));
    if written.is_err() {
        eprint!("{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_json_lines_of_the_chosen_level() {
        let (queue, records) = sync_channel(1);
        let subscriber = JsonLines { level: Level::INFO, queue, dropped: AtomicU64::new(0) };
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!("not this");
            tracing::info!(container = "c1", pid = 7u64, ok = true, "A \"quoted\" message");
            tracing::info!("One more than the queue takes");
            let line = next_line(&records);
            let value: Value = serde_json::from_str(&line).expect("JSON");
            assert!(line.ends_with('\n') && !line.trim_end().contains('\n'));
            assert_eq!(value["msg"], "A \"quoted\" message");
            assert_eq!((&value["container"], &value["pid"], &value["ok"]), (&"c1".into(), &7.into(), &true.into()));
            assert_eq!(value["level"], "info");
            tracing::info!("After the loss");
        });
        let value: Value = serde_json::from_str(&next_line(&records)).expect("JSON");
        assert_eq!((&value["msg"], &value["dropped_before"]), (&"After the loss".into(), &1.into()));
    }

    fn next_line(records: &Receiver<Entry>) -> String {
        match records.recv().expect("An entry") {
            Entry::Line(line) => line,
            Entry::Close(_) => panic!("Not a line"),
        }
    }

    #[tokio::test]
    async fn a_connection_that_ended_is_made_again() {
        use std::io::Read;
        use std::os::fd::OwnedFd;
        use std::os::unix::net::UnixStream;
        use std::sync::mpsc::channel;

        let (made, hosts) = channel();
        let connect = move || {
            let (host, guest) = UnixStream::pair()?;
            made.send(host).map_err(io::Error::other)?;
            Ok(File::from(OwnedFd::from(guest)))
        };
        let first = connect().expect("A pair");
        let (queue, records) = sync_channel(QUEUE);
        let connection = Connection(queue.clone());
        drain(Records(records), Some(first), connect);
        let say = |line: &str| queue.send(Entry::Line(format!("{line}\n"))).expect("The thread lives");
        let hear = |host: &mut UnixStream| {
            let mut line = [0; 4];
            host.read_exact(&mut line).map(|()| String::from_utf8_lossy(&line).into_owned())
        };

        let mut host = hosts.recv().expect("Made");
        say("one");
        assert_eq!(hear(&mut host).expect("A line"), "one\n");
        // Given up by the agent: the host sees the end, and the next line comes on another connection.
        connection.close().await.expect("Closed");
        assert_eq!(host.read(&mut [0]).expect("The end"), 0);
        say("two");
        let mut host = hosts.recv().expect("Made");
        assert_eq!(hear(&mut host).expect("A line"), "two\n");
        // Gone with the host: no line is lost.
        drop(host);
        say("six");
        let mut host = hosts.recv().expect("Made");
        assert_eq!(hear(&mut host).expect("A line"), "six\n");
    }
}
