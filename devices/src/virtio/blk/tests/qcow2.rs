//! qcow2 images, made here byte by byte, honest and hostile.

use std::io::{Seek, SeekFrom};

use proptest::prelude::*;

use super::*;

const CLUSTER: u64 = 1 << 16;

/// Fields of the header (version 2) that a test may want otherwise.
struct Header {
    backing: &'static [u8],
    cluster_bits: u32,
    size: u64,
    l1_entries: u32,
    l1_offset: u64,
    refcounts: u64,
}

impl Header {
    fn new(size: u64) -> Self {
        let l1_entries = size.div_ceil(CLUSTER * CLUSTER / 8).max(1) as u32;
        Self { backing: b"", cluster_bits: 16, size, l1_entries, l1_offset: 3 * CLUSTER, refcounts: CLUSTER }
    }

    /// An empty image: header, refcount table, refcount block, L1 table.
    fn write(&self) -> File {
        let mut bytes = Vec::new();
        bytes.extend(b"QFI\xfb");
        bytes.extend(2_u32.to_be_bytes());
        let name_offset: u64 = if self.backing.is_empty() { 0 } else { 256 };
        bytes.extend(name_offset.to_be_bytes());
        bytes.extend((self.backing.len() as u32).to_be_bytes());
        bytes.extend(self.cluster_bits.to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend(0_u32.to_be_bytes());
        bytes.extend(self.l1_entries.to_be_bytes());
        bytes.extend(self.l1_offset.to_be_bytes());
        bytes.extend(self.refcounts.to_be_bytes());
        bytes.extend(1_u32.to_be_bytes());
        bytes.extend([0; 12]);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        file.write_all_at(self.backing, 256).unwrap();
        file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER).unwrap();
        // Four clusters are in use once.
        file.write_all_at(&[0, 1, 0, 1, 0, 1, 0, 1], 2 * CLUSTER).unwrap();
        file.set_len(4 * CLUSTER).unwrap();
        file
    }
}

/// An empty image of a disk of `size` bytes.
pub(super) fn image(size: u64) -> File {
    Header::new(size).write()
}

fn open(file: File, backing: Option<BackingImage>) -> Result<Blk, BlkErrorKind> {
    let format = ImageFormat::Qcow2 { backing: backing.map(Box::new) };
    Blk::new(BlkConfig { format, ..BlkConfig::new("q", file) }, Confinement::On).map_err(|error| error.kind)
}

fn refusal(file: File, backing: Option<BackingImage>) -> Qcow2Error {
    match open(file, backing) {
        Err(BlkErrorKind::Image(ImageError::Qcow2(error))) => error,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("The image is refused"),
    }
}

#[test]
fn what_is_written_is_there_when_the_image_is_opened_again() {
    let image = image(1 << 30);
    let device = Box::new(open(image.try_clone().unwrap(), None).unwrap());
    let mut running = Guest::new(device).start(ALL);
    assert_eq!(u64::from_le_bytes(running.guest.read_config(0)), (1 << 30) / 512);
    running.guest.poke(DATA, &[0x42; 1024]);
    assert_eq!(request(&mut running, WRITE, 1_000_001, &[Buffer::readable(DATA, 1024)]).0, OK);
    assert_eq!(request(&mut running, FLUSH, 0, &[]).0, OK);
    drop(running);
    let device = Box::new(open(image.try_clone().unwrap(), None).unwrap());
    let mut running = Guest::new(device).start(ALL);
    assert_eq!(request(&mut running, READ, 1_000_000, &[Buffer::writable(DATA, 2048)]).0, OK);
    assert_eq!(running.guest.peek(DATA, 2048), [[0; 512], [0x42; 512], [0x42; 512], [0; 512]].concat());
    assert!(image.metadata().unwrap().len() < 1 << 20, "Only what was written takes room");
}

#[test]
fn a_backing_file_in_the_image_is_not_opened_unless_it_is_named() {
    let with_backing = || Header { backing: b"/etc/passwd", ..Header::new(1 << 20) }.write();
    assert!(matches!(refusal(with_backing(), None), Qcow2Error::BackingNotNamed(name) if name == "/etc/passwd"));

    // What is named is what is read, whatever the image says.
    let base = file();
    let backing = BackingImage { file: base.try_clone().unwrap(), format: ImageFormat::Raw };
    let mut running = Guest::new(Box::new(open(with_backing(), Some(backing)).unwrap())).start(ALL);
    assert_eq!(request(&mut running, READ, 7, &[Buffer::writable(DATA, 512)]).0, OK);
    assert_eq!(running.guest.peek(DATA, 512), [7; 512]);
    running.guest.poke(DATA, &[0xff; 512]);
    assert_eq!(request(&mut running, WRITE, 7, &[Buffer::readable(DATA, 512)]).0, OK);
    assert_eq!(request(&mut running, FLUSH, 0, &[]).0, OK);
    assert_eq!(sector(&base, 7), [7; 512], "It is only read");

    let backing = BackingImage { file: base, format: ImageFormat::Raw };
    assert!(matches!(refusal(image(1 << 20), Some(backing)), Qcow2Error::BackingNotWanted));
}

#[test]
fn images_behind_images_at_the_limit_and_one_past() {
    let chain = |depth: usize| {
        let mut behind = BackingImage { file: file(), format: ImageFormat::Raw };
        for _ in 1..depth {
            let file = Header { backing: b"base", ..Header::new(1 << 20) }.write();
            behind = BackingImage { file, format: ImageFormat::Qcow2 { backing: Some(Box::new(behind)) } };
        }
        (Header { backing: b"base", ..Header::new(1 << 20) }.write(), behind)
    };
    let (file, behind) = chain(4);
    assert!(open(file, Some(behind)).is_ok());
    let (file, behind) = chain(5);
    assert!(matches!(refusal(file, Some(behind)), Qcow2Error::BackingDepth));
}

#[test]
fn clusters_at_the_limit_and_one_past() {
    assert!(open(image(1 << 20), None).is_ok());
    for bits in [17, 21, 63, u32::MAX] {
        let file = Header { cluster_bits: bits, ..Header::new(1 << 20) }.write();
        assert!(matches!(refusal(file, None), Qcow2Error::ClusterSize(refused) if refused == bits));
    }
    for bits in [0, 8] {
        let file = Header { cluster_bits: bits, ..Header::new(1 << 20) }.write();
        assert!(matches!(refusal(file, None), Qcow2Error::Open(_)));
    }
}

#[test]
fn tables_that_cannot_be_are_refused() {
    for header in [
        Header { l1_entries: u32::MAX, ..Header::new(1 << 20) },
        Header { l1_offset: 1, ..Header::new(1 << 20) },
        Header { l1_offset: !(CLUSTER - 1), ..Header::new(1 << 20) },
        Header { refcounts: 7, ..Header::new(1 << 20) },
    ] {
        assert!(matches!(refusal(header.write(), None), Qcow2Error::Open(_) | Qcow2Error::Refcounts));
    }
    let raw = file();
    assert!(matches!(refusal(raw, None), Qcow2Error::Open(_)));
    assert!(matches!(refusal(tempfile::tempfile().unwrap(), None), Qcow2Error::Open(_)));
}

#[test]
fn a_refcount_table_with_a_hole_is_not_written_to() {
    let hole = || {
        let file = image(1 << 20);
        file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER + 16).unwrap();
        file
    };
    assert!(matches!(refusal(hole(), None), Qcow2Error::Refcounts));
    let format = ImageFormat::Qcow2 { backing: None };
    assert!(Blk::new(BlkConfig { format, read_only: true, ..BlkConfig::new("q", hole()) }, Confinement::On).is_ok());
    let empty = image(1 << 20);
    empty.write_all_at(&[0; 8], CLUSTER).unwrap();
    assert!(matches!(refusal(empty, None), Qcow2Error::Refcounts));
    for (clusters, refused) in [(0_u32, true), (1, false), (128, false), (129, true)] {
        let file = Header { refcounts: 10 * CLUSTER, ..Header::new(1 << 20) }.write();
        file.write_all_at(&(2 * CLUSTER).to_be_bytes(), 10 * CLUSTER).unwrap();
        file.write_all_at(&clusters.to_be_bytes(), 56).unwrap();
        file.set_len(200 * CLUSTER).unwrap();
        assert_eq!(open(file, None).is_err(), refused, "{clusters}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever an image's metadata says, opening and using it ends in an error or in data, never
    /// in a panic, and never in another file.
    #[test]
    fn any_metadata_gives_errors_not_faults(
        header in prop::collection::vec((8..112_u64, any::<u8>()), 0..3),
        tables in prop::collection::vec((prop::sample::select(vec![CLUSTER, 2 * CLUSTER, 3 * CLUSTER]), 0..16_u64, any::<u8>()), 0..8),
    ) {
        let mut file = image(1 << 22);
        file.seek(SeekFrom::Start(0)).unwrap();
        for (at, value) in header {
            file.write_all_at(&[value], at).unwrap();
        }
        for (base, at, value) in tables {
            file.write_all_at(&[value], base + at).unwrap();
        }
        if let Ok(device) = open(file, None) {
            let mut running = Guest::new(Box::new(device)).start(ALL);
            for (kind, sector) in [(READ, 0), (WRITE, 8), (READ, 8), (WRITE, 5000), (FLUSH, 0)] {
                let data = Buffer { addr: DATA, len: if kind == FLUSH { 0 } else { 1024 }, writable: kind == READ };
                let status = request(&mut running, kind, sector, &[data]).0;
                prop_assert!([OK, IOERR].contains(&status));
            }
            erase(&mut running, WRITE_ZEROES, &[(0, 64, 1)]);
            erase(&mut running, DISCARD, &[(0, 256, 0)]);
        }
    }
}
