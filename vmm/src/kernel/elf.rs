//! ELF kernels. Segments are mapped or copied by [`ImageFile::place`], which linux-loader's own
//! loader (a copy of everything) cannot do; its ELF structures are used.

use linux_loader::elf::{Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use vm_memory::{ByteValued, GuestAddress};

use devices::GuestMemory;

use super::{FormatError, LoadedKernel};
use crate::arch::x86_64::layout;
use crate::arch::x86_64::regs::Entry;
use crate::memory::image::{ImageFile, Placement};

const MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const MACHINE_X86_64: u16 = 62;
/// `PF_W`: the program writes to the segment.
const WRITABLE: u32 = 2;
/// A Linux kernel has a handful; with many more a file is not one.
const MAX_PROGRAM_HEADERS: u64 = 64;
/// A Linux kernel's notes take a few hundred bytes.
const MAX_NOTES: u64 = 64 << 10;

/// The note that names the 32-bit entry point of the PVH boot protocol.
const PVH_NOTE_NAME: &[u8] = b"Xen\0";
const PVH_NOTE_TYPE: u32 = 18;

/// Whether the file starts like an ELF file.
pub fn is_elf(image: &ImageFile) -> bool {
    super::first_bytes::<4>(image) == MAGIC
}

/// Loads the segments and finds the entry point.
pub fn load(memory: &GuestMemory, image: &ImageFile, placement: Placement) -> Result<LoadedKernel, FormatError> {
    let header = read_header(image)?;
    let mut pvh = None;
    let mut segments = Vec::new();
    for segment in read_program_headers(image, &header)? {
        match segment.p_type {
            PT_LOAD if segment.p_memsz > 0 => {
                load_segment(memory, image, &segment, placement)?;
                segments.push(segment.p_paddr..segment.p_paddr + segment.p_memsz);
            }
            PT_NOTE if pvh.is_none() => pvh = find_pvh_entry(image, &segment)?,
            _ => {}
        }
    }
    let (entry, address) = match pvh {
        Some(address) => (Entry::Pvh(address), u64::from(address)),
        None => (Entry::Linux64(header.e_entry), header.e_entry),
    };
    if !segments.iter().any(|segment| segment.contains(&address)) {
        return Err(FormatError::Entry(address));
    }
    let end = segments.iter().map(|segment| segment.end).max().unwrap_or_default();
    Ok(LoadedKernel { entry, end, header: None })
}

fn read_header(image: &ImageFile) -> Result<Elf64_Ehdr, FormatError> {
    let header: Elf64_Ehdr = read_struct(image, 0, "ELF header")?;
    let [_, _, _, _, class, data, ..] = header.e_ident;
    let known = class == CLASS_64
        && data == LITTLE_ENDIAN
        && header.e_type == TYPE_EXECUTABLE
        && header.e_machine == MACHINE_X86_64
        && usize::from(header.e_phentsize) == size_of::<Elf64_Phdr>();
    if known { Ok(header) } else { Err(FormatError::ForeignElf) }
}

fn read_program_headers(image: &ImageFile, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, FormatError> {
    const WHAT: &str = "program header table";
    let count = u64::from(header.e_phnum);
    check_count("number of program headers", count, MAX_PROGRAM_HEADERS)?;
    let size = size_of::<Elf64_Phdr>() as u64;
    check_inside(image, WHAT, header.e_phoff, count * size)?;
    (0..count).map(|index| read_struct(image, header.e_phoff + index * size, WHAT)).collect()
}

fn load_segment(
    memory: &GuestMemory,
    image: &ImageFile,
    segment: &Elf64_Phdr,
    placement: Placement,
) -> Result<(), FormatError> {
    let address = segment.p_paddr;
    let end = address.checked_add(segment.p_memsz);
    if address < layout::HIGH_MEMORY || end.is_none() || segment.p_filesz > segment.p_memsz {
        return Err(FormatError::Segment { address });
    }
    check_inside(image, "segment", segment.p_offset, segment.p_filesz)?;
    // What the file does not fill stays as it is: fresh memory is zero.
    image.check_room(memory, GuestAddress(address), segment.p_memsz)?;
    // What is written to would not stay shared.
    let placement = if segment.p_flags & WRITABLE == 0 { placement } else { Placement::Copied };
    Ok(image.place(memory, segment.p_offset, GuestAddress(address), segment.p_filesz, placement)?)
}

fn find_pvh_entry(image: &ImageFile, segment: &Elf64_Phdr) -> Result<Option<u32>, FormatError> {
    check_count("size of notes", segment.p_filesz, MAX_NOTES)?;
    check_inside(image, "note segment", segment.p_offset, segment.p_filesz)?;
    let mut notes = vec![0; usize::try_from(segment.p_filesz).unwrap_or_default()];
    image.read_at(&mut notes, segment.p_offset)?;
    Ok(pvh_entry(&notes))
}

/// Walks the notes: header, name, description, the last two padded to 4 bytes. A note that runs
/// past the end ends the walk.
fn pvh_entry(mut notes: &[u8]) -> Option<u32> {
    loop {
        let (header, rest) = notes.split_at_checked(size_of::<Elf64_Nhdr>())?;
        let header = Elf64_Nhdr::from_slice(header)?;
        let name_length = usize::try_from(header.n_namesz).ok()?;
        let description_length = usize::try_from(header.n_descsz).ok()?;
        let (name, rest) = rest.split_at_checked(name_length.checked_next_multiple_of(4)?)?;
        // The last description may lack its padding.
        let padded = description_length.checked_next_multiple_of(4)?.min(rest.len());
        let (description, rest) = rest.split_at_checked(padded)?;
        if header.n_type == PVH_NOTE_TYPE && name.get(..name_length) == Some(PVH_NOTE_NAME) {
            return Some(u32::from_le_bytes(*description.first_chunk()?));
        }
        notes = rest;
    }
}

fn read_struct<T: ByteValued + Default>(image: &ImageFile, offset: u64, what: &'static str) -> Result<T, FormatError> {
    check_inside(image, what, offset, size_of::<T>() as u64)?;
    let mut value = T::default();
    image.read_at(value.as_mut_slice(), offset)?;
    Ok(value)
}

fn check_inside(image: &ImageFile, what: &'static str, offset: u64, length: u64) -> Result<(), FormatError> {
    let end = offset.saturating_add(length);
    if end > image.size() {
        return Err(FormatError::Truncated { what, end, size: image.size() });
    }
    Ok(())
}

fn check_count(what: &'static str, value: u64, limit: u64) -> Result<(), FormatError> {
    if value > limit {
        return Err(FormatError::TooMany { what, value, limit });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(kind: u32, name: &[u8], description: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for field in [name.len(), description.len()] {
            note.extend(u32::try_from(field).expect("small").to_le_bytes());
        }
        note.extend(kind.to_le_bytes());
        for part in [name, description] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    #[test]
    fn the_pvh_note_is_found_among_others() {
        let mut notes = note(1, b"GNU\0", &[1; 20]);
        notes.extend(note(18, b"Linux\0", &[1; 3]));
        assert_eq!(pvh_entry(&notes), None);
        notes.extend(note(18, b"Xen\0", &0x0100_0440u64.to_le_bytes()));
        assert_eq!(pvh_entry(&notes), Some(0x0100_0440));
    }

    #[test]
    fn broken_notes_end_the_search() {
        for broken in [
            note(18, b"Xen\0", &[1, 2]),
            vec![0xff; 12],
            vec![0xff; 64],
            vec![4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, b'X', b'e', b'n', 0],
            vec![0; 11],
        ] {
            // Padding makes a short description long enough; what must not happen is a panic.
            let _ = pvh_entry(&broken);
        }
        assert_eq!(pvh_entry(&[0xff; 64]), None);
        assert_eq!(pvh_entry(&[]), None);
    }
}
