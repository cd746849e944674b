//! The forms in which containerd names a stream.

use std::path::PathBuf;

use super::{StdioError, is_fifo};
use crate::helper::Program;

/// What a stream is tied to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A FIFO.
    Fifo(PathBuf),
    /// A file to append to.
    File(PathBuf),
    /// A program that reads standard output and error.
    Binary(Program),
}

impl Target {
    /// Reads a path or URI; an empty text is no stream.
    pub fn parse(text: &str) -> Result<Option<Self>, StdioError> {
        if text.is_empty() {
            return Ok(None);
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            let path = PathBuf::from(text);
            return Ok(Some(if is_fifo(&path) { Self::Fifo(path) } else { Self::File(path) }));
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = PathBuf::from(decode(path));
        match scheme {
            "fifo" => Ok(Some(Self::Fifo(path))),
            "file" => Ok(Some(Self::File(path))),
            "binary" => Ok(Some(Self::Binary(Program { path, arguments: arguments(query) }))),
            _ => Err(StdioError::Scheme(text.to_owned())),
        }
    }
}

fn arguments(query: &str) -> Vec<String> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .flat_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            [decode(&key.replace('+', " ")), decode(&value.replace('+', " "))]
        })
        .filter(|argument| !argument.is_empty())
        .collect()
}

/// Undoes percent encoding (RFC 3986 section 2.1). What is no encoding stays.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) if first == b'%' => {
                bytes.push(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read() {
        let parse = |text| Target::parse(text).unwrap();
        assert_eq!(parse(""), None);
        assert_eq!(parse("fifo:///run/f"), Some(Target::Fifo("/run/f".into())));
        assert_eq!(parse("file:///var/log/a%20b"), Some(Target::File("/var/log/a b".into())));
        let program =
            Program { path: "/bin/logger".into(), arguments: ["id", "x y", "flag"].map(str::to_owned).into() };
        assert_eq!(parse("binary:///bin/logger?id=x+y&flag"), Some(Target::Binary(program)));
        assert!(matches!(Target::parse("http://x"), Err(StdioError::Scheme(_))));
    }

    #[test]
    fn decoding_leaves_what_is_not_encoded() {
        assert_eq!(decode("%41%4g%"), "A%4g%");
    }
}
