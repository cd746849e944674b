//! The agent's log, one JSON record a line, forwarded to the shim's.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use tokio::io::{AsyncBufReadExt, BufReader};

/// The guest is not trusted to end its lines: a longer one is cut.
const MAX_RECORD: usize = 8 << 10;

/// Records that are passed on in each [`WINDOW`]. A sandbox says a few dozen when it starts and hardly anything later; a
/// guest that floods must not fill the host's disk.
const MAX_RECORDS: u32 = 1000;

/// The time in which no more than [`MAX_RECORDS`] are passed on.
const WINDOW: Duration = Duration::from_secs(60);

/// Counts what a guest says.
#[derive(Debug, Default)]
struct Allowance {
    since: Option<Instant>,
    told: u32,
    untold: u64,
}

impl Allowance {
    /// Whether a record may be passed on at this time; then how many were not since the last that was.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            (self.since, self.told) = (Some(now), 0);
        }
        if self.told >= MAX_RECORDS {
            self.untold = self.untold.saturating_add(1);
            return None;
        }
        self.told = self.told.saturating_add(1);
        Some(std::mem::take(&mut self.untold))
    }

    fn pass(&mut self, record: &[u8]) {
        match self.admit(Instant::now()) {
            Some(0) => emit(record),
            Some(untold) => {
                tracing::warn!(untold, "The guest said more than is written down");
                emit(record);
            }
            None => {}
        }
    }
}

/// Forwards records from `stream` until it ends. Must be called within a tokio runtime.
pub fn forward(stream: UnixStream) {
    tokio::spawn(async move {
        let stream = stream.set_nonblocking(true).and_then(|()| tokio::net::UnixStream::from_std(stream));
        match stream {
            Ok(stream) => forward_all(BufReader::new(stream)).await,
            Err(error) => tracing::warn!(%error, "The guest's log cannot be read"),
        }
    });
}

async fn forward_all(mut reader: impl AsyncBufReadExt + Unpin) {
    let mut record = Vec::new();
    let mut allowance = Allowance::default();
    while let Ok(available) = reader.fill_buf().await {
        if available.is_empty() {
            break;
        }
        let end = available.iter().position(|&byte| byte == b'\n');
        let part = available.get(..end.unwrap_or(available.len())).unwrap_or_default();
        let room = MAX_RECORD.saturating_sub(record.len());
        record.extend_from_slice(part.get(..room.min(part.len())).unwrap_or_default());
        let used = part.len().saturating_add(usize::from(end.is_some()));
        reader.consume(used);
        if end.is_some() {
            allowance.pass(&record);
            record.clear();
        }
    }
    if !record.is_empty() {
        allowance.pass(&record);
    }
}

/// `tracing` wants a level that is known when it is compiled, hence one branch for each.
fn emit(record: &[u8]) {
    let (level, text) = render(record);
    match level.as_str() {
        "error" => tracing::error!(target: "agent", "{text}"),
        "warn" => tracing::warn!(target: "agent", "{text}"),
        "debug" => tracing::debug!(target: "agent", "{text}"),
        "trace" => tracing::trace!(target: "agent", "{text}"),
        _ => tracing::info!(target: "agent", "{text}"),
    }
}

/// Level and text of a record. What is no record is its own text.
fn render(record: &[u8]) -> (String, String) {
    let Ok(mut fields) = serde_json::from_slice::<Map<String, Value>>(record) else {
        return ("info".to_owned(), String::from_utf8_lossy(record).into_owned());
    };
    let mut take = |key: &str| match fields.remove(key) {
        Some(Value::String(text)) => text,
        _ => String::new(),
    };
    let (level, mut text) = (take("level"), take("msg"));
    take("ts");
    for (key, value) in &fields {
        text.push_str(&format!(" {key}={value}"));
    }
    (level, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_its_message_and_the_rest() {
        let (level, text) = render(br#"{"ts":"x","level":"warn","msg":"Hello there","container":"c","n":1}"#);
        assert_eq!((level.as_str(), text.as_str()), ("warn", r#"Hello there container="c" n=1"#));
        assert_eq!(render(b"plain \xff"), ("info".to_owned(), "plain \u{fffd}".to_owned()));
    }

    #[test]
    fn records_are_passed_on_up_to_their_limit_and_not_one_past_it() {
        let mut allowance = Allowance::default();
        let start = Instant::now();
        for _ in 0..MAX_RECORDS {
            assert_eq!(allowance.admit(start), Some(0));
        }
        assert_eq!(allowance.admit(start + WINDOW - Duration::from_nanos(1)), None);
        assert_eq!(allowance.admit(start + WINDOW), Some(1));
    }

    #[tokio::test]
    async fn an_endless_line_ends() {
        // Nothing to see but that it returns; the bound is on memory.
        forward_all(&vec![b'x'; 3 * MAX_RECORD][..]).await;
    }
}
