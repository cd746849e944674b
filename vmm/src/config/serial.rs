//! The console.

use std::fs::File;
use std::io::{self, LineWriter, Write};

/// Where the console's output goes, besides the tail that is always kept.
#[derive(Debug)]
pub enum SerialConfig {
    /// Nowhere else.
    Null,
    /// This process's standard output.
    Stdout,
    /// A file, pipe or terminal, line by line. A guest waits while a write blocks.
    File(File),
    /// A terminal or socket that does not block, byte by byte. What it does not take at once is lost.
    Stream(File),
}

impl SerialConfig {
    pub(crate) fn into_writer(self) -> Box<dyn Write + Send> {
        match self {
            Self::Null => Box::new(io::sink()),
            Self::Stdout => Box::new(io::stdout()),
            Self::Stream(file) => Box::new(file),
            Self::File(file) => Box::new(LineWriter::new(file)),
        }
    }
}
