//! What the server writes.

use serde::Serialize;
use serde_json::Value;

use super::error::{CommandError, ErrorClass};

/// The version that QEMU's clients look at: kata's wants a major of at least 5.
#[derive(Debug, Clone, Copy, Serialize)]
struct QemuVersion {
    micro: u8,
    minor: u8,
    major: u8,
}

/// What is spoken here, and by whom.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Version {
    qemu: QemuVersion,
    package: &'static str,
}

impl Default for Version {
    fn default() -> Self {
        let qemu = QemuVersion { micro: 1, minor: 0, major: 5 };
        Self { qemu, package: concat!("Inlay-", env!("CARGO_PKG_VERSION")) }
    }
}

/// The first line on each connection.
#[derive(Debug, Default, Serialize)]
pub struct Greeting {
    #[serde(rename = "QMP")]
    qmp: Introduction,
}

#[derive(Debug, Default, Serialize)]
struct Introduction {
    version: Version,
    /// Out-of-band commands would be one.
    capabilities: [&'static str; 0],
}

/// The answer to a request.
#[derive(Debug, Serialize)]
pub struct Reply {
    #[serde(flatten)]
    outcome: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Value>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Return(Value),
    Error { class: ErrorClass, desc: String },
}

impl Reply {
    /// The reply to the request that came with `id`.
    pub fn new(answer: Result<Value, CommandError>, id: Option<Value>) -> Self {
        let outcome = match answer {
            Ok(value) => Outcome::Return(value),
            Err(error) => Outcome::Error { class: error.class(), desc: error.description() },
        };
        Self { outcome, id }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn text(message: &impl Serialize) -> String {
        serde_json::to_string(message).expect("JSON")
    }

    #[test]
    fn the_greeting_names_a_qemu_that_clients_accept() {
        assert_eq!(
            text(&Greeting::default()),
            format!(
                r#"{{"QMP":{{"version":{{"qemu":{{"micro":1,"minor":0,"major":5}},"package":"Inlay-{}"}},"capabilities":[]}}}}"#,
                env!("CARGO_PKG_VERSION")
            )
        );
    }

    #[test]
    fn replies_carry_the_id_of_their_request() {
        assert_eq!(text(&Reply::new(Ok(json!({})), None)), r#"{"return":{}}"#);
        assert_eq!(text(&Reply::new(Ok(json!([])), Some(json!("a\"b")))), r#"{"return":[],"id":"a\"b"}"#);
        let error = Reply::new(Err(CommandError::Unknown("fly".into())), Some(json!(7)));
        assert_eq!(text(&error), r#"{"error":{"class":"GenericError","desc":"There is no command fly"},"id":7}"#);
    }
}
