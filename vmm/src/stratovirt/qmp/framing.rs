//! Requests out of a stream of bytes: JSON values one after another, with or without anything between.

use serde::Deserialize;
use serde_json::Value;

/// Bytes of one request. The longest sensible one names a path of 4 KiB, each byte of it written as `\u00xx`; this is
/// twice that.
pub const MAX_REQUEST: usize = 64 << 10;

/// A request as it stands on the wire.
#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The command's name.
    pub execute: String,
    /// What the command makes of it.
    pub arguments: Option<Value>,
    /// Comes back with the reply.
    pub id: Option<Value>,
}

/// What a client sent that is no request.
#[derive(Debug, thiserror::Error)]
pub enum FramingError {
    /// No JSON, or too deeply nested; what was received with it is dropped.
    #[error("Invalid JSON expression")]
    Json(#[source] serde_json::Error),
    /// JSON, but not of a request's form.
    #[error("The JSON expression is not a request")]
    Request {
        /// Why.
        #[source]
        source: serde_json::Error,
        /// The identifier that the client may wait for.
        id: Option<Value>,
    },
    /// The rest of the stream cannot be told apart from this request.
    #[error("A request is longer than {MAX_REQUEST} bytes")]
    TooLong,
}

/// Collects bytes until they are requests.
#[derive(Debug, Default)]
pub struct Framing {
    buffer: Vec<u8>,
}

impl Framing {
    /// Adds what was received.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next request, once all of it has come.
    pub fn next_request(&mut self) -> Option<Result<Request, FramingError>> {
        let mut values = serde_json::Deserializer::from_slice(&self.buffer).into_iter::<Value>();
        let value = values.next();
        let consumed = values.byte_offset();
        match value {
            None => {
                // Nothing but white space.
                self.buffer.clear();
                None
            }
            Some(Ok(_)) if consumed > MAX_REQUEST => Some(Err(self.too_long())),
            Some(Ok(value)) => {
                self.buffer.drain(..consumed);
                Some(parse(value))
            }
            Some(Err(error)) if error.is_eof() && self.buffer.len() <= MAX_REQUEST => None,
            Some(Err(error)) if error.is_eof() => Some(Err(self.too_long())),
            Some(Err(error)) => {
                self.buffer.clear();
                Some(Err(FramingError::Json(error)))
            }
        }
    }

    fn too_long(&mut self) -> FramingError {
        self.buffer = Vec::new();
        FramingError::TooLong
    }
}

fn parse(value: Value) -> Result<Request, FramingError> {
    let id = value.get("id").cloned();
    Request::deserialize(value).map_err(|source| FramingError::Request { source, id })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn all(framing: &mut Framing) -> Vec<Result<Request, FramingError>> {
        std::iter::from_fn(|| framing.next_request()).collect()
    }

    fn names(framing: &mut Framing) -> Vec<String> {
        all(framing).into_iter().map(|request| request.expect("a request").execute).collect()
    }

    #[test]
    fn requests_need_nothing_between_them() {
        let mut framing = Framing::default();
        framing.push(br#"{"execute":"a"}{"execute":"b"}"#);
        framing.push(b"\r\n {\"execute\":\"c\"}\n");
        assert_eq!(names(&mut framing), ["a", "b", "c"]);
    }

    #[test]
    fn a_request_may_come_in_two_parts_cut_anywhere() {
        let text = "{\"execute\":\"device_add\",\"arguments\":{\"id\":\"d\u{e9}\\u00e9\",\"n\":-1.5e3},\"id\":\"7\"}";
        for cut in 1..text.len() {
            let (head, tail) = text.as_bytes().split_at(cut);
            let mut framing = Framing::default();
            framing.push(head);
            assert!(framing.next_request().is_none(), "cut at {cut}");
            framing.push(tail);
            let request = framing.next_request().expect("complete").expect("a request");
            assert_eq!(request.arguments, Some(json!({"id": "d\u{e9}\u{e9}", "n": -1500.0})));
            assert_eq!(request.id, Some(json!("7")));
        }
    }

    #[test]
    fn what_is_no_json_is_dropped_and_the_next_request_is_heard() {
        let nested = "[".repeat(200);
        for garbage in [&b"hello"[..], b"}", b"{\"a\" 1}", b"{\"execute\":\"\xff\"}", nested.as_bytes(), b"\0"] {
            let mut framing = Framing::default();
            framing.push(garbage);
            assert!(matches!(framing.next_request(), Some(Err(FramingError::Json(_)))), "{garbage:?}");
            framing.push(br#"{"execute":"a"}"#);
            assert_eq!(names(&mut framing), ["a"]);
        }
    }

    #[test]
    fn json_of_another_form_is_refused_with_its_id() {
        for (text, expected) in [
            (r#"{"id":3}"#, Some(json!(3))),
            (r#"{"execute":1,"id":"x"}"#, Some(json!("x"))),
            (r#"{"execute":"a","more":1}"#, None),
            ("[1]", None),
            ("17 ", None),
        ] {
            let mut framing = Framing::default();
            framing.push(text.as_bytes());
            match framing.next_request() {
                Some(Err(FramingError::Request { id, .. })) => assert_eq!(id, expected, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_request_of_the_largest_size_is_taken_and_one_byte_more_is_not() {
        let frame = r#"{"execute":""}"#.len();
        let request = |size: usize| format!(r#"{{"execute":"{}"}}"#, "x".repeat(size - frame));
        let mut framing = Framing::default();
        framing.push(request(MAX_REQUEST).as_bytes());
        assert_eq!(names(&mut framing)[0].len(), MAX_REQUEST - frame);

        framing.push(request(MAX_REQUEST + 1).as_bytes());
        assert!(matches!(framing.next_request(), Some(Err(FramingError::TooLong))));

        let mut unfinished = request(MAX_REQUEST + 2);
        unfinished.truncate(MAX_REQUEST);
        framing.push(unfinished.as_bytes());
        assert!(framing.next_request().is_none());
        framing.push(b"x");
        assert!(matches!(framing.next_request(), Some(Err(FramingError::TooLong))));
        assert_eq!(framing.buffer.capacity(), 0);
    }
}
