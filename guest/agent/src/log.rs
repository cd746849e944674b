//! The log: one JSON object a line, to the host's log port when it listens, else to the kernel's log.
//!
//! A subscriber of our own instead of `tracing-subscriber`: no spans, one level for all, no filter language, and
//! several hundred KiB less in every guest.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Records that wait to be written. When the host does not read, the newest are dropped and counted: a full log must
/// not stop a container.
const QUEUE: usize = 1024;

struct JsonLines {
    level: Level,
    queue: SyncSender<String>,
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
        if let Err(TrySendError::Full(_)) = self.queue.try_send(render(event, dropped)) {
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
pub struct Records(Receiver<String>);

/// Makes every `tracing` event of this process a record. The records wait until [`drain`] is called.
pub fn init(level: Level) -> Records {
    let (queue, records) = sync_channel(QUEUE);
    let subscriber = JsonLines { level, queue, dropped: AtomicU64::new(0) };
    // A second subscriber is refused; there is none, since only main calls this.
    let _ = tracing::subscriber::set_global_default(subscriber);
    Records(records)
}

/// Writes records on a thread of its own, to `sink` until that fails, then to the kernel's log.
///
/// The thread is what keeps a slow reader on the host from holding up the agent.
pub fn drain(records: Records, sink: Option<File>) {
    let write_all = move || {
        let mut sink = sink;
        for line in records.0 {
            if let Some(stream) = &mut sink {
                if stream.write_all(line.as_bytes()).is_ok() {
                    continue;
                }
                sink = None;
            }
            write_to_kernel(&line);
        }
    };
    if let Err(error) = std::thread::Builder::new().name("log".into()).stack_size(64 << 10).spawn(write_all) {
        write_to_kernel(&format!("The log thread did not start: {error}\n"));
    }
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
            let line = records.recv().expect("A record");
            let value: Value = serde_json::from_str(&line).expect("JSON");
            assert!(line.ends_with('\n') && !line.trim_end().contains('\n'));
            assert_eq!(value["msg"], "A \"quoted\" message");
            assert_eq!((&value["container"], &value["pid"], &value["ok"]), (&"c1".into(), &7.into(), &true.into()));
            assert_eq!(value["level"], "info");
            tracing::info!("After the loss");
        });
        let value: Value = serde_json::from_str(&records.recv().expect("A record")).expect("JSON");
        assert_eq!((&value["msg"], &value["dropped_before"]), (&"After the loss".into(), &1.into()));
    }
}
