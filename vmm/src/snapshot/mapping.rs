//! Guest memory out of the files of a snapshot.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use vm_memory::{GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress, VolatileSlice};

use devices::GuestMemory;

use super::pieces::Piece;

/// Mappings that the pieces of differences may take: a process has 65,530 unless it is told otherwise, and cutting one
/// out of another can make three of one.
pub(crate) const MAX_MAPPINGS: usize = 16_384;

/// Puts `pieces` over `memory`, which KVM does not know yet: private mappings of their files, at most `mappings` of them.
/// The shortest of more are read.
pub(crate) fn overlay(memory: &GuestMemory, pieces: &[(Piece, &File)], mappings: usize) -> io::Result<()> {
    let shortest = shortest_mapped(pieces, mappings);
    let mut start = 0;
    for region in memory.iter() {
        let whole = start..start + region.len();
        for (piece, file) in pieces {
            let bytes = piece.bytes();
            let part = bytes.start.max(whole.start)..bytes.end.min(whole.end);
            if part.is_empty() {
                continue;
            }
            let length = usize::try_from(part.end - part.start).map_err(io::Error::other)?;
            let host = region.get_slice(MemoryRegionAddress(part.start - start), length).map_err(io::Error::other)?;
            if piece.count >= shortest { map(&host, file, part)? } else { fill(&host, file, part)? }
        }
        start = whole.end;
    }
    Ok(())
}

/// Pages of the shortest piece that is mapped when all from a length on are, and no more than `mappings`.
fn shortest_mapped(pieces: &[(Piece, &File)], mappings: usize) -> u64 {
    let mut counts: Vec<u64> = pieces.iter().map(|(piece, _)| piece.count).collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    counts.get(mappings).map_or(0, |count| count + 1)
}

fn map(host: &VolatileSlice<'_>, file: &File, part: Range<u64>) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let offset = libc::off_t::try_from(part.start).map_err(io::Error::other)?;
    let address = host.ptr_guard_mut().as_ptr().cast();
    // SAFETY: the range is guest memory, pages of a mapping that stays the region's, of which nobody holds a reference.
    let mapped =
        unsafe { libc::mmap(address, host.len(), libc::PROT_READ | libc::PROT_WRITE, flags, file.as_raw_fd(), offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn fill(host: &VolatileSlice<'_>, file: &File, part: Range<u64>) -> io::Result<()> {
    let mut done = 0;
    while done < host.len() {
        let rest = host.offset(done).map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(part.start + done as u64).map_err(io::Error::other)?;
        // SAFETY: guest memory of that length, which the kernel writes to as the guest will.
        let count = unsafe { libc::pread(file.as_raw_fd(), rest.ptr_guard_mut().as_ptr().cast(), rest.len(), offset) };
        match usize::try_from(count) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    const PAGE: usize = 4096;

    /// Two regions: pages 0 to 7 at 0, pages 8 to 11 at 1 GiB.
    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 8 << 12), (GuestAddress(1 << 30), 4 << 12)]).expect("memory")
    }

    /// A file whose pages have their numbers and `mark`.
    fn file(mark: u8) -> File {
        let file = tempfile::tempfile().expect("file");
        for page in 0..12_u8 {
            file.write_all_at(&[mark + page; PAGE], u64::from(page) << 12).expect("write");
        }
        file
    }

    fn seen(memory: &GuestMemory) -> Vec<u8> {
        let page = |page: u64| if page < 8 { page << 12 } else { (1 << 30) + ((page - 8) << 12) };
        (0..12)
            .map(|number| {
                let mut bytes = [0; PAGE];
                memory.read_slice(&mut bytes, GuestAddress(page(number))).expect("read");
                assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                bytes[0]
            })
            .collect()
    }

    #[test]
    fn pieces_lie_over_memory_mapped_or_read() {
        let (one, two) = (file(100), file(200));
        let pieces = [
            (Piece { page: 1, count: 1, layer: 0 }, &one),
            // Over the edge of a region.
            (Piece { page: 6, count: 4, layer: 1 }, &two),
            (Piece { page: 11, count: 1, layer: 0 }, &one),
        ];
        for mappings in [0, 1, 2, 3, 100] {
            let memory = memory();
            overlay(&memory, &pieces, mappings).expect("overlay");
            assert_eq!(seen(&memory), [0, 101, 0, 0, 0, 0, 206, 207, 208, 209, 0, 111], "{mappings}");
            // It is the guest's own.
            memory.write_obj(7_u8, GuestAddress(1 << 12)).expect("write");
            let mut byte = [0];
            one.read_exact_at(&mut byte, 1 << 12).expect("read");
            assert_eq!(byte, [101]);
        }
    }

    #[test]
    fn at_most_so_many_pieces_are_mapped() {
        let file = file(0);
        let pieces =
            |counts: &[u64]| counts.iter().map(|count| Piece { page: 0, count: *count, layer: 0 }).collect::<Vec<_>>();
        for (counts, mappings, shortest) in [
            (&[5, 1, 3][..], 3, 0),
            (&[5, 1, 3], 2, 2),
            (&[5, 1, 3], 1, 4),
            (&[2, 2, 2], 2, 3),
            (&[], 0, 0),
            (&[1], 0, 2),
        ] {
            let pieces = pieces(counts);
            let pieces: Vec<_> = pieces.iter().map(|piece| (*piece, &file)).collect();
            let found = shortest_mapped(&pieces, mappings);
            assert_eq!(found, shortest, "{counts:?} {mappings}");
            assert!(pieces.iter().filter(|(piece, _)| piece.count >= found).count() <= mappings);
        }
    }

    #[test]
    fn a_file_that_ends_too_early_is_an_error() {
        let file = file(0);
        file.set_len(2 << 12).expect("cut");
        let pieces = [(Piece { page: 1, count: 2, layer: 0 }, &file)];
        let refused = overlay(&memory(), &pieces, 0).expect_err("refused");
        assert_eq!(refused.kind(), io::ErrorKind::UnexpectedEof);
    }
}
