//! The agent's log, one JSON record a line, forwarded to the shim's.

use std::os::unix::net::UnixStream;

use serde_json::{Map, Value};
use tokio::io::{AsyncBufReadExt, BufReader};

/// The guest is not trusted to end its lines: a longer one is cut.
const MAX_RECORD: usize = 8 << 10;

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
    while let Ok(available) = reader.fill_buf().await {
        if available.is_empty() {
            break;
        }
        let end = available.iter().position(|&byte| byte == b'\n');
        let part = available.get(..end.unwrap_or(available.len())).unwrap_or_default();
        let room = MAX_RECORD.saturating_sub(record.len());
        record.extend_from_slice(part.get(..room.min(part.len())).unwrap_or_default());
        let used = part.len() + usize::from(end.is_some());
        reader.consume(used);
        if end.is_some() {
            emit(&record);
            record.clear();
        }
    }
    if !record.is_empty() {
        emit(&record);
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

    #[tokio::test]
    async fn an_endless_line_ends() {
        // Nothing to see but that it returns; the bound is on memory.
        forward_all(&vec![b'x'; 3 * MAX_RECORD][..]).await;
    }
}
