//! The memory file.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use vm_memory::{Bytes, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use devices::GuestMemory;
use devices::virtio::WriteLog;

use super::layers::{Head, Layers, LayersError};
use super::manifest::{MemoryFile, StateFile};
use super::pieces::runs;
use super::{MEMORY, Manifest, STATE, SnapshotError, hex};
use crate::memory::PAGE_SIZE;
use crate::memory::source::{Source, SourceError};
use crate::memory::working_set::WorkingSet;

type Region = vm_memory::GuestRegionMmap<()>;

/// Bytes of a chunk, which has one checksum: the unit in which damage is found.
const CHUNK: u64 = 1 << 20;

/// Bits of an entry of `/proc/self/pagemap`: the page is present, or in swap.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;

/// The page is the file's; one of a private mapping that was written is not any more.
const OF_FILE: u64 = 1 << 61;

/// Why the files of a snapshot are not what the manifest says.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// A file cannot be read.
    #[error("Cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file has another length.
    #[error("{} has {present} bytes where the manifest says {expected}", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// In the manifest.
        expected: u64,
        /// What is there.
        present: u64,
    },
    /// A file was changed.
    #[error("{} is damaged in the {length} bytes from {offset:#x} on", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// How much the checksum covers.
        length: u64,
    },
    /// A memory that is elsewhere does not come.
    #[error(transparent)]
    Source(SourceError),
    /// The manifest contradicts itself.
    #[error("The manifest has {present} checksums for a memory of {length} bytes in chunks of {chunk}")]
    Chunks {
        /// Checksums.
        present: usize,
        /// Bytes.
        length: u64,
        /// Bytes of a chunk.
        chunk: u64,
    },
}

/// Writes `memory` to a fresh file, without its pages of zeros.
pub(crate) fn write(memory: &GuestMemory, file: &File, path: &Path) -> Result<MemoryFile, SnapshotError> {
    write_chunks(memory, file, |region, _| {
        let touched = Touched::of(region)?;
        Ok(
            move |chunk: &mut [u8], offset| {
                if touched.any(offset, chunk.len() as u64) {
                    read(region, chunk, offset).map(|()| true)
                } else {
                    Ok(false)
                }
            },
        )
    })
    .map_err(SnapshotError::write(path))
}

/// Writes the pages that `log` has of `memory` to a fresh file, each at its place; returns which they are.
pub(crate) fn write_noted(
    memory: &GuestMemory,
    log: &WriteLog,
    file: &File,
    path: &Path,
) -> Result<(MemoryFile, Vec<(u64, u64)>), SnapshotError> {
    let mut pages = Vec::new();
    let mut first = 0;
    for (index, region) in memory.iter().enumerate() {
        let count = region.len() / PAGE_SIZE;
        pages.extend(runs(&log.pages(index), count, first));
        first += count;
    }
    let written = write_chunks(memory, file, |region, start| {
        let mut noted = pages.iter().map(|(page, count)| page * PAGE_SIZE..(page + count) * PAGE_SIZE).peekable();
        Ok(move |chunk: &mut [u8], offset| {
            let (begin, end) = (start + offset, start + offset + chunk.len() as u64);
            while noted.next_if(|run| run.end <= begin).is_some() {}
            if noted.peek().is_none_or(|run| run.start >= end) {
                return Ok(false);
            }
            chunk.fill(0);
            // The last run may go on in the next chunk.
            for run in noted.clone().take_while(|run| run.start < end) {
                let (from, to) = (run.start.max(begin), run.end.min(end));
                let place = usize::try_from(from - begin).ok().zip(usize::try_from(to - begin).ok());
                let part = place.and_then(|(from, to)| chunk.get_mut(from..to)).unwrap_or_default();
                read(region, part, from - start)?;
            }
            Ok(true)
        })
    });
    Ok((written.map_err(SnapshotError::write(path))?, pages))
}

/// Writes what `reader` makes of each region at its place in the file: a function that fills the chunk at an offset into
/// the region, or says that there is nothing in it.
fn write_chunks<'m, R: FnMut(&mut [u8], u64) -> io::Result<bool>>(
    memory: &'m GuestMemory,
    file: &File,
    reader: impl Fn(&'m Region, u64) -> io::Result<R>,
) -> io::Result<MemoryFile> {
    let length: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    file.set_len(length)?;
    let mut sha256 = Vec::new();
    let mut buffer = vec![0; usize::try_from(CHUNK).map_err(io::Error::other)?];
    let mut start = 0;
    for region in memory.iter() {
        // Regions are multiples of a chunk but for the last, as the hole in memory begins at one.
        let mut fill = reader(region, start)?;
        let mut offset = 0;
        while offset < region.len() {
            let length = CHUNK.min(region.len() - offset);
            let chunk = buffer.get_mut(..usize::try_from(length).map_err(io::Error::other)?).unwrap_or_default();
            let zero = !fill(chunk, offset)? || write_pages(chunk, file, start + offset)?;
            sha256.push((!zero).then(|| hex(&Sha256::digest(&*chunk))));
            offset += length;
        }
        start += region.len();
    }
    Ok(MemoryFile { length, chunk: CHUNK, sha256 })
}

fn read(region: &Region, chunk: &mut [u8], offset: u64) -> io::Result<()> {
    region.read_slice(chunk, MemoryRegionAddress(offset)).map_err(io::Error::other)
}

/// Writes the runs of pages that are not zeros; true when there are none.
pub(crate) fn write_pages(chunk: &[u8], file: &File, start: u64) -> io::Result<bool> {
    const PAGE: usize = 4096;
    static ZEROS: [u8; PAGE] = [0; PAGE];
    let is_zero = |page: &&[u8]| ZEROS.starts_with(page);
    let pages: Vec<&[u8]> = chunk.chunks(PAGE).collect();
    let mut zero = true;
    let mut offset = 0;
    for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let length = run.iter().map(|page| page.len()).sum::<usize>();
        if !run.first().is_some_and(is_zero) {
            zero = false;
            let bytes = chunk.get(offset..offset + length).unwrap_or_default();
            file.write_all_at(bytes, start + offset as u64)?;
        }
        offset += length;
    }
    Ok(zero)
}

/// What the manifest says of a memory file that has its contents already.
pub(crate) fn describe(file: &File, length: u64) -> io::Result<MemoryFile> {
    let mut sha256 = Vec::new();
    let mut buffer = vec![0; usize::try_from(CHUNK).map_err(io::Error::other)?];
    let mut offset = 0;
    while offset < length {
        let piece = CHUNK.min(length - offset);
        let chunk = buffer.get_mut(..usize::try_from(piece).map_err(io::Error::other)?).unwrap_or_default();
        file.read_exact_at(chunk, offset)?;
        let zero = chunk.iter().all(|byte| *byte == 0);
        sha256.push((!zero).then(|| hex(&Sha256::digest(&*chunk))));
        offset += piece;
    }
    Ok(MemoryFile { length, chunk: CHUNK, sha256 })
}

/// Which pages of a memory may have something in them, at one moment.
pub(super) struct Existing(Vec<(u64, Touched)>);

impl Existing {
    pub fn of(memory: &GuestMemory) -> io::Result<Self> {
        Self::by(memory, Touched::of)
    }

    /// Of private mappings of files, the pages that differ from the file, or did: they were written.
    pub fn written(memory: &GuestMemory) -> io::Result<Self> {
        Self::by(memory, Touched::written)
    }

    fn by(memory: &GuestMemory, touched: impl Fn(&Region) -> io::Result<Touched>) -> io::Result<Self> {
        let mut end = 0;
        let regions = memory.iter().map(|region| {
            end += region.len();
            Ok((end, touched(region)?))
        });
        regions.collect::<io::Result<_>>().map(Self)
    }

    /// Whether the page at an offset of the memory is one of them.
    pub fn has(&self, offset: u64) -> bool {
        let mut start = 0;
        for (end, touched) in &self.0 {
            if offset < *end {
                return touched.any(offset - start, PAGE_SIZE);
            }
            start = *end;
        }
        false
    }
}

/// The pages of private mappings of files that were written, in their order in memory.
pub(crate) fn written_pages(memory: &GuestMemory) -> io::Result<WorkingSet> {
    let written = Existing::written(memory)?;
    let length = memory.iter().map(GuestMemoryRegion::len).sum();
    let mut set = WorkingSet::new(length);
    for page in (0..length / PAGE_SIZE).map(|page| page * PAGE_SIZE).filter(|page| written.has(*page)) {
        // Past its limit it is left out.
        set.push(page..page + PAGE_SIZE);
    }
    Ok(set)
}

/// Which pages of an anonymous region exist. Of others, nobody knows what the file has.
struct Touched(Option<Pages>);

/// The pages of an anonymous region.
struct Pages {
    /// An entry of `/proc/self/pagemap` for each.
    entries: Vec<u64>,
    /// Parts over which a file was mapped, as images are: what is not there is in the file.
    files: Vec<Range<u64>>,
}

impl Touched {
    fn of(region: &Region) -> io::Result<Self> {
        if region.file_offset().is_some() {
            return Ok(Self(None));
        }
        let (host, entries) = pagemap(region)?;
        let files = file_mappings(&fs::read_to_string("/proc/self/maps")?, host..host + region.len());
        Ok(Self(Some(Pages { entries, files })))
    }

    fn written(region: &Region) -> io::Result<Self> {
        let (_, mut entries) = pagemap(region)?;
        entries.iter_mut().filter(|entry| **entry & OF_FILE != 0).for_each(|entry| *entry = 0);
        Ok(Self(Some(Pages { entries, files: Vec::new() })))
    }

    fn any(&self, offset: u64, length: u64) -> bool {
        let Some(Pages { entries, files }) = &self.0 else { return true };
        let index = |bytes: u64| usize::try_from(bytes / PAGE_SIZE).unwrap_or(usize::MAX);
        let pages = entries.get(index(offset)..index(offset + length));
        pages.is_none_or(|pages| pages.iter().any(|entry| entry & PRESENT_OR_SWAPPED != 0))
            || files.iter().any(|file| file.start < offset + length && offset < file.end)
    }
}

/// Where a region is in this process, and what the kernel says of each of its pages.
fn pagemap(region: &Region) -> io::Result<(u64, Vec<u64>)> {
    let host = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)? as u64;
    let entries = usize::try_from(region.len() / PAGE_SIZE).map_err(io::Error::other)?;
    let mut bytes = vec![0; entries * 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut bytes, host / PAGE_SIZE * 8)?;
    let (entries, _) = bytes.as_chunks::<8>();
    Ok((host, entries.iter().map(|entry| u64::from_le_bytes(*entry)).collect()))
}

/// Where in a range of host addresses files are mapped, from its start, by the lines of `/proc/self/maps`: the range, rights, offset, device and
/// inode of a mapping, which is 0 where there is no file.
fn file_mappings(maps: &str, host: Range<u64>) -> Vec<Range<u64>> {
    let mapping = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).ok();
        let (start, end) = (address(start)?.max(host.start), address(end)?.min(host.end));
        (words.nth(3)? != "0" && start < end).then(|| start - host.start..end - host.start)
    };
    maps.lines().filter_map(mapping).collect()
}

/// Opens the memory file for mapping. Its size is what the manifest says, so that no page of the mapping is missing.
pub(crate) fn open(directory: &Path, expected: &MemoryFile) -> Result<File, VerifyError> {
    open_exact(directory.join(MEMORY), expected.length)
}

fn open_exact(path: PathBuf, expected: u64) -> Result<File, VerifyError> {
    match File::open(&path).and_then(|file| Ok((file.metadata()?, file))) {
        Ok((metadata, _)) if !metadata.is_file() => {
            Err(VerifyError::Read { path, source: io::ErrorKind::InvalidInput.into() })
        }
        Ok((metadata, file)) if metadata.len() == expected => Ok(file),
        Ok((metadata, _)) => Err(VerifyError::Length { path, expected, present: metadata.len() }),
        Err(source) => Err(VerifyError::Read { path, source }),
    }
}

/// Reads the state file, which must be what the manifest says.
pub(crate) fn read_state(directory: &Path, expected: &StateFile) -> Result<Vec<u8>, VerifyError> {
    let path = directory.join(STATE);
    let length = expected.length;
    if length > super::codec::MAX_LEN {
        return Err(VerifyError::Length { path, expected: super::codec::MAX_LEN, present: length });
    }
    let file = open_exact(path.clone(), length)?;
    let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
    if let Err(source) = file.read_exact_at(&mut bytes, 0) {
        return Err(VerifyError::Read { path, source });
    }
    if hex(&Sha256::digest(&bytes)) != expected.sha256 {
        return Err(VerifyError::Damaged { path, offset: 0, length });
    }
    Ok(bytes)
}

/// Compares all of the snapshot in `directory`, and of those that it is the difference to, with their manifests.
/// Restoring looks at the state and at sizes alone, as reading all memory takes longer than everything else that it does:
/// call this first for a snapshot that comes from far away.
pub fn verify(directory: &Path) -> Result<(), LayersError> {
    let layers = Layers::open(directory)?;
    layers.pieces()?;
    Ok(layers.memories().try_for_each(verify_memory)?)
}

/// As [`verify`], of a snapshot whose memory is `source`, and not in `directory`.
pub fn verify_elsewhere(directory: &Path, source: &mut dyn Source) -> Result<(), LayersError> {
    let head = Head::open(directory)?;
    let MemoryFile { length, .. } = head.manifest().memory;
    if source.length() != length {
        return Err(LayersError::Size { length, base: source.length() });
    }
    let fill = |bytes: &mut [u8], offset| source.read(offset, bytes).map_err(VerifyError::Source);
    Ok(compare(&head.manifest().memory, Path::new("The memory"), fill)?)
}

fn verify_memory((directory, manifest, file): (&Path, &Manifest, &File)) -> Result<(), VerifyError> {
    let path = directory.join(MEMORY);
    let fill = |bytes: &mut [u8], offset| {
        file.read_exact_at(bytes, offset).map_err(|source| VerifyError::Read { path: path.clone(), source })
    };
    compare(&manifest.memory, &path, fill)
}

/// Compares what `fill` makes of each chunk, at its offset, with its checksum. `path` names the memory in errors.
fn compare(
    memory: &MemoryFile,
    path: &Path,
    mut fill: impl FnMut(&mut [u8], u64) -> Result<(), VerifyError>,
) -> Result<(), VerifyError> {
    let MemoryFile { length, chunk, sha256 } = memory;
    let chunks = if *chunk == CHUNK { length.div_ceil(CHUNK) } else { u64::MAX };
    if chunks != sha256.len() as u64 {
        return Err(VerifyError::Chunks { present: sha256.len(), length: *length, chunk: *chunk });
    }
    let mut buffer = vec![0; usize::try_from(CHUNK).unwrap_or_default()];
    for (index, sum) in (0..).zip(sha256) {
        let offset = index * CHUNK;
        let piece = CHUNK.min(length - offset);
        let bytes = buffer.get_mut(..usize::try_from(piece).unwrap_or_default()).unwrap_or_default();
        fill(bytes, offset)?;
        let sound = match sum {
            Some(sum) => hex(&Sha256::digest(&*bytes)) == *sum,
            None => bytes.iter().all(|byte| *byte == 0),
        };
        if !sound {
            return Err(VerifyError::Damaged { path: path.to_owned(), offset, length: piece });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_in_a_memory_map() {
        let maps = "\
            00001000-00005000 rw-p 00000000 00:00 0 \n\
            00005000-00007000 rw-p 00003000 fe:00 4711                       /a kernel\n\
            00007000-00009000 rw-p 00000000 00:00 0                          [anon: guest]\n\
            0000f000-00013000 rw-s 00000000 00:01 12                         /memfd:x (deleted)\n\
            no line of a map\n";
        assert_eq!(file_mappings(maps, 0x1000..0x11000), [0x4000..0x6000, 0xe000..0x10000]);
        assert_eq!(file_mappings(maps, 0x6000..0x10000), [0..0x1000, 0x9000..0xa000]);
        assert_eq!(file_mappings(maps, 0x7000..0xf000), []);
    }
}
