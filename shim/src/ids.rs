//! Identifiers that containerd gives: checked once, then safe as a file name.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest identifier: containerd allows 76 characters, and an id becomes one path component.
const MAX_LEN: usize = 76;

/// A container, exec or sandbox identifier. It is never empty, never `.` or `..`, and holds no separator.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(String);

/// Why a text is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "The identifier {text:?} must have 1 to {MAX_LEN} letters, digits, '.', '-' or '_' and start with a letter or digit"
)]
pub struct IdError {
    text: String,
}

impl Id {
    /// An identifier that is written in this program.
    pub fn of_literal(text: &'static str) -> Self {
        debug_assert!(Self::try_from(text).is_ok(), "{text:?} is no identifier");
        Self(text.to_owned())
    }

    /// The identifier as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Id {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if text.len() <= MAX_LEN && starts_well && text.chars().all(plain) {
            Ok(Self(text))
        } else {
            Err(IdError { text })
        }
    }
}

impl TryFrom<&str> for Id {
    type Error = IdError;

    fn try_from(text: &str) -> Result<Self, IdError> {
        Self::try_from(text.to_owned())
    }
}

impl From<Id> for String {
    fn from(id: Id) -> Self {
        id.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_containerd_gives() {
        for text in ["a", "redis-0", "0123456789abcdef", "A.b_c-d"] {
            assert!(Id::try_from(text).is_ok(), "{text}");
        }
        assert!(Id::try_from("x".repeat(MAX_LEN)).is_ok());
    }

    #[test]
    fn refuses_what_would_leave_its_directory() {
        for text in ["", ".", "..", "../x", "a/b", "-a", "a b", "a\0b", "é"] {
            assert!(Id::try_from(text).is_err(), "{text:?}");
        }
        assert!(Id::try_from("x".repeat(MAX_LEN + 1)).is_err());
    }
}
