//! Writes a kernel's `vmlinux` again without the filler between its parts.
//!
//! The linker starts text, read-only data and data at 2 MiB boundaries, in memory and in the file, and with page
//! table isolation the entry code has 2 MiB pages of its own: nearly half of the file is zeros and `int3`. This tool
//! keeps every page that carries something, at its address, and describes the rest by memory sizes alone, so that
//! a loader neither reads nor copies it.
//!
//! ```text
//! compact-elf VMLINUX OUTPUT
//! ```
//!
//! Within the file each kept run lies at the same offset within a page as in memory, so that a loader may map it.
//! Section headers and symbols are dropped; the notes, the PVH entry among them, stay reachable by `PT_NOTE`.
//! Field names and layouts are those of elf(5), 64-bit little-endian.

use std::process::ExitCode;

const PAGE: usize = 4096;
/// Shorter stretches of filler stay: each gap costs a program header, and a loader one more read.
const MIN_GAP_PAGES: usize = 16;
const EHDR_SIZE: usize = 64;
const PHDR_SIZE: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq)]
struct Segment {
    kind: u32,
    flags: u32,
    offset: usize,
    vaddr: u64,
    paddr: u64,
    filesz: usize,
    memsz: u64,
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], String> {
    bytes.get(at..at + N).and_then(|b| b.try_into().ok()).ok_or_else(|| format!("The file ends before byte {at}"))
}

fn u16_at(bytes: &[u8], at: usize) -> Result<usize, String> {
    field(bytes, at).map(|b| u16::from_le_bytes(b).into())
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, String> {
    field(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, String> {
    field(bytes, at).map(u64::from_le_bytes)
}

fn read_segments(elf: &[u8]) -> Result<Vec<Segment>, String> {
    // EI_MAG, ELFCLASS64, ELFDATA2LSB.
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return Err("The input is not a 64-bit little-endian ELF file".into());
    }
    let (table, count) = (u64_at(elf, 32)? as usize, u16_at(elf, 56)?);
    (0..count)
        .map(|i| table + i * PHDR_SIZE)
        .map(|at| {
            let segment = Segment {
                kind: u32_at(elf, at)?,
                flags: u32_at(elf, at + 4)?,
                offset: u64_at(elf, at + 8)? as usize,
                vaddr: u64_at(elf, at + 16)?,
                paddr: u64_at(elf, at + 24)?,
                filesz: u64_at(elf, at + 32)? as usize,
                memsz: u64_at(elf, at + 40)?,
            };
            if segment.offset + segment.filesz > elf.len() {
                return Err(format!("The segment at {:#x} is cut short", segment.paddr));
            }
            Ok(segment)
        })
        .collect()
}

fn is_filler(page: &[u8]) -> bool {
    page.iter().all(|&b| b == 0) || page.iter().all(|&b| b == 0xcc)
}

/// Splits a loadable segment into its runs of pages that carry something. The memory of each run reaches up to the
/// next one, so together they still describe the whole segment.
fn split(segment: &Segment, content: &[u8]) -> Vec<Segment> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (i, page) in content.chunks(PAGE).enumerate().filter(|(_, page)| !is_filler(page)) {
        let end = (i * PAGE + page.len()).min(content.len());
        match runs.last_mut() {
            Some(run) if i * PAGE < run.end + MIN_GAP_PAGES * PAGE => run.end = end,
            _ => runs.push(i * PAGE..end),
        }
    }
    // A segment without content still reserves its memory.
    if runs.first().is_none_or(|run| run.start > 0) {
        runs.insert(0, 0..0);
    }
    let ends = runs.iter().skip(1).map(|run| run.start as u64).chain([segment.memsz]);
    runs.iter()
        .zip(ends)
        .map(|(run, end)| Segment {
            offset: segment.offset + run.start,
            vaddr: segment.vaddr.wrapping_add(run.start as u64),
            paddr: segment.paddr + run.start as u64,
            filesz: run.len(),
            memsz: end - run.start as u64,
            ..*segment
        })
        .collect()
}

fn compact(elf: &[u8]) -> Result<Vec<u8>, String> {
    let segments = read_segments(elf)?;
    let loads: Vec<Segment> = segments
        .iter()
        .filter(|s| s.kind == PT_LOAD)
        .flat_map(|s| split(s, &elf[s.offset..s.offset + s.filesz]))
        .collect();
    let notes: Vec<Segment> = segments.iter().filter(|s| s.kind == PT_NOTE).copied().collect();

    let headers = EHDR_SIZE + (loads.len() + notes.len()) * PHDR_SIZE;
    let mut out = elf.get(..EHDR_SIZE).ok_or("The file has no header")?.to_vec();
    out.resize(headers, 0);
    let mut moved = Vec::new();
    for load in &loads {
        let within_page = load.paddr as usize % PAGE;
        let offset = out.len().next_multiple_of(PAGE) + within_page;
        if load.filesz > 0 {
            out.resize(offset, 0);
            out.extend_from_slice(&elf[load.offset..load.offset + load.filesz]);
        }
        moved.push(Segment { offset: if load.filesz > 0 { offset } else { within_page }, ..*load });
    }
    for note in &notes {
        let (old, new) = loads
            .iter()
            .zip(&moved)
            .find(|(old, _)| old.offset <= note.offset && note.offset + note.filesz <= old.offset + old.filesz)
            .ok_or("A note lies outside of what is loaded")?;
        moved.push(Segment { offset: note.offset - old.offset + new.offset, ..*note });
    }

    for (i, segment) in moved.iter().enumerate() {
        let align: u64 = if segment.kind == PT_LOAD { PAGE as u64 } else { 4 };
        let mut phdr = Vec::with_capacity(PHDR_SIZE);
        phdr.extend(segment.kind.to_le_bytes());
        phdr.extend(segment.flags.to_le_bytes());
        for value in [segment.offset as u64, segment.vaddr, segment.paddr, segment.filesz as u64, segment.memsz, align]
        {
            phdr.extend(value.to_le_bytes());
        }
        let at = EHDR_SIZE + i * PHDR_SIZE;
        out[at..at + PHDR_SIZE].copy_from_slice(&phdr);
    }
    let count = u16::try_from(moved.len()).map_err(|_| "There are too many segments")?;
    out[32..40].copy_from_slice(&(EHDR_SIZE as u64).to_le_bytes()); // e_phoff
    out[40..48].fill(0); // e_shoff
    out[56..58].copy_from_slice(&count.to_le_bytes()); // e_phnum
    out[60..64].fill(0); // e_shnum, e_shstrndx
    Ok(out)
}

fn run() -> Result<(), String> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [input, output] = args.as_slice() else {
        return Err("Usage: compact-elf VMLINUX OUTPUT".into());
    };
    let elf = std::fs::read(input).map_err(|e| format!("Cannot read {input}: {e}"))?;
    std::fs::write(output, compact(&elf)?).map_err(|e| format!("Cannot write {output}: {e}"))
}

fn main() -> ExitCode {
    run().map_or_else(
        |message| {
            eprintln!("{message}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One segment at 16 MiB with `content`, `memsz` bytes in memory, and a note in its first 16 bytes.
    fn elf(content: &[u8], memsz: u64) -> Vec<u8> {
        let mut out = b"\x7fELF\x02\x01".to_vec();
        out.resize(PAGE, 0);
        out[32..40].copy_from_slice(&64u64.to_le_bytes());
        out[56..58].copy_from_slice(&2u16.to_le_bytes());
        for (at, kind, filesz, memsz) in [(64, PT_LOAD, content.len() as u64, memsz), (64 + PHDR_SIZE, PT_NOTE, 16, 16)]
        {
            out[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            let fields = [PAGE as u64, 0xffff_ffff_8100_0000, 0x100_0000, filesz, memsz];
            for (i, value) in fields.into_iter().enumerate() {
                out[at + 8 + i * 8..at + 16 + i * 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        out.extend_from_slice(content);
        out
    }

    /// What a loader would leave in memory from 16 MiB on; `int3` filler reads as zero, as in a compacted file.
    fn load(elf: &[u8]) -> Vec<u8> {
        let mut memory = Vec::new();
        for s in read_segments(elf).unwrap().iter().filter(|s| s.kind == PT_LOAD) {
            let start = (s.paddr - 0x100_0000) as usize;
            memory.resize(memory.len().max(start + s.memsz as usize), 0);
            memory[start..start + s.filesz].copy_from_slice(&elf[s.offset..s.offset + s.filesz]);
        }
        for page in memory.chunks_mut(PAGE).filter(|page| is_filler(page)) {
            page.fill(0);
        }
        memory
    }

    fn content() -> Vec<u8> {
        let mut content = vec![7; PAGE];
        content.extend(vec![0xcc; 40 * PAGE]);
        content.extend(vec![8; 2 * PAGE]);
        content.extend(vec![0; (MIN_GAP_PAGES - 1) * PAGE]);
        content.extend(vec![9; 100]);
        content
    }

    #[test]
    fn memory_is_the_same_and_the_file_smaller() {
        let before = elf(&content(), 100 * PAGE as u64);
        let after = compact(&before).unwrap();
        assert_eq!(load(&after), load(&before));
        assert_eq!(before.len() - after.len(), 40 * PAGE);
    }

    #[test]
    fn short_filler_stays_and_long_filler_splits() {
        let after = compact(&elf(&content(), 100 * PAGE as u64)).unwrap();
        let loads: Vec<_> = read_segments(&after).unwrap().into_iter().filter(|s| s.kind == PT_LOAD).collect();
        let sizes: Vec<_> = loads.iter().map(|s| (s.filesz, s.memsz)).collect();
        let second = (2 + MIN_GAP_PAGES - 1) * PAGE + 100;
        assert_eq!(sizes, [(PAGE, 41 * PAGE as u64), (second, 59 * PAGE as u64)]);
        assert!(loads.iter().all(|s| s.offset % PAGE == s.paddr as usize % PAGE));
    }

    #[test]
    fn notes_keep_pointing_at_their_bytes() {
        let after = compact(&elf(&content(), 100 * PAGE as u64)).unwrap();
        let note = read_segments(&after).unwrap().into_iter().find(|s| s.kind == PT_NOTE).unwrap();
        assert_eq!(after[note.offset..note.offset + note.filesz], [7; 16]);
    }

    #[test]
    fn leading_filler_keeps_its_place_in_memory() {
        let mut content = vec![0; 20 * PAGE];
        content.extend([1; 8]);
        let mut before = elf(&content, content.len() as u64);
        before[56] = 1; // Without the note, which lies in the dropped part.
        let after = compact(&before).unwrap();
        assert_eq!(load(&after), load(&before));
        assert!(after.len() < 3 * PAGE);
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(compact(b"#!/bin/sh").unwrap_err().contains("not a 64-bit"));
        let mut short = elf(&content(), 100 * PAGE as u64);
        short.truncate(2 * PAGE);
        assert!(compact(&short).unwrap_err().contains("cut short"));
    }
}
