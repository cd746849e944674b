//! A memory file of this host.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::{Run, Source, SourceError};

/// Parts of a file that are remembered: more than a file of 256 MiB can have. What is behind them is taken for data, and looked at when
/// it is read.
const MAX_EXTENTS: usize = 1 << 15;

/// The memory file of a snapshot, which may have holes.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    length: u64,
    /// What is no hole, in order.
    data: Vec<(u64, u64)>,
}

impl FileSource {
    /// All of `file`.
    pub fn new(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        let data = extents(&file, length)?;
        Ok(Self { file, length, data })
    }
}

impl Source for FileSource {
    fn length(&self) -> u64 {
        self.length
    }

    fn run(&self, offset: u64) -> Run {
        let next = self.data.partition_point(|(_, end)| *end <= offset);
        match self.data.get(next) {
            Some((start, end)) if *start <= offset => Run { zeros: false, end: *end },
            Some((start, _)) => Run { zeros: true, end: *start },
            None => Run { zeros: true, end: self.length },
        }
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        self.file.read_exact_at(buffer, offset).map_err(|source| {
            let present = self.file.metadata().map_or(0, |metadata| metadata.len());
            match source.kind() {
                io::ErrorKind::UnexpectedEof => SourceError::Cut { length: self.length, present },
                _ => SourceError::Read { offset, source },
            }
        })
    }
}

/// The parts of a file that are no holes.
fn extents(file: &File, length: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut extents = Vec::new();
    let mut offset = 0;
    while offset < length {
        let Some(start) = seek(file, offset, libc::SEEK_DATA)? else { break };
        let end = match extents.len() {
            MAX_EXTENTS => length,
            _ => seek(file, start, libc::SEEK_HOLE)?.unwrap_or(length).min(length),
        };
        extents.push((start, end));
        offset = end;
    }
    Ok(extents)
}

/// The next hole or data; none behind the last one.
fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let from = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: no pointers.
    let found = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn holes_are_zeros_and_the_rest_is_read() {
        let file = tempfile::tempfile().expect("file");
        file.set_len(8 * MIB).expect("length");
        file.write_all_at(&[7; 4096], 2 * MIB).expect("write");
        file.write_all_at(&[8; 4096], 8 * MIB - 4096).expect("write");
        let mut source = FileSource::new(file).expect("source");
        assert_eq!(source.length(), 8 * MIB);
        // The file system may keep more than was written, but not less.
        let first = source.run(0);
        assert!(first.zeros && first.end <= 2 * MIB, "{first:?}");
        assert!(!source.run(2 * MIB).zeros);
        assert!(!source.run(8 * MIB - 1).zeros);
        let mut end = 0;
        while end < 8 * MIB {
            let run = source.run(end);
            assert!(run.end > end);
            end = run.end;
        }
        let mut page = [0; 4096];
        source.read(2 * MIB, &mut page).expect("read");
        assert_eq!(page, [7; 4096]);
    }

    #[test]
    fn a_file_that_was_cut_says_so() {
        let file = tempfile::tempfile().expect("file");
        file.set_len(MIB).expect("length");
        let mut source = FileSource::new(file.try_clone().expect("clone")).expect("source");
        file.set_len(4096).expect("cut");
        let error = source.read(8192, &mut [0; 4096]).expect_err("cut");
        assert_eq!(error.to_string(), "The template's memory has 4096 bytes where there were 1048576: it was cut");
    }

    #[test]
    fn an_empty_file_has_nothing() {
        let source = FileSource::new(tempfile::tempfile().expect("file")).expect("source");
        assert_eq!((source.length(), source.run(0)), (0, Run { zeros: true, end: 0 }));
    }
}
