//! A tree as a compressed newc cpio archive, the form that the kernel unpacks into its root
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::io::{Cursor, Write};
use std::os::unix::ffi::OsStrExt;

use anyhow::{Context, Result};
use cpio::newc::Builder;
use cpio::newc::trailer;

use crate::manifest::Compression;
use crate::tree::{Node, Tree};

const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// zstd's level: the slowest one that needs no large window when unpacking.
const ZSTD_LEVEL: i32 = 19;

/// Writes the archive and compresses it. Owners are root and times are zero, so that equal trees
/// give equal bytes.
pub fn build(tree: &Tree, compression: Compression) -> Result<Vec<u8>> {
    compress(&newc(tree)?, compression)
}

fn newc(tree: &Tree) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for (inode, (path, node, _)) in (1u32..).zip(tree.iter()) {
        let name = path
            .strip_prefix("/")?
            .to_str()
            .with_context(|| format!("{} is not UTF-8, which the archive's names are", path.display()))?;
        let entry = Builder::new(name).ino(inode).nlink(1).uid(0).gid(0).mtime(0);
        let (entry, data): (Builder, &[u8]) = match node {
            Node::Directory => (entry.mode(S_IFDIR | 0o755), &[]),
            Node::Device(major, minor) => (entry.mode(S_IFCHR | 0o600).rdev_major(*major).rdev_minor(*minor), &[]),
            Node::File { mode, contents } => (entry.mode(S_IFREG | mode), contents),
            Node::Link(target) => (entry.mode(S_IFLNK | 0o777), target.as_os_str().as_bytes()),
        };
        let size =
            u32::try_from(data.len()).with_context(|| format!("{name} is larger than the 4 GiB that newc can hold"))?;
        let mut writer = entry.write(&mut out, size);
        writer.write_all(data)?;
        writer.finish()?;
    }
    trailer(&mut out)?;
    Ok(out)
}

fn compress(archive: &[u8], compression: Compression) -> Result<Vec<u8>> {
    Ok(match compression {
        Compression::None => archive.to_vec(),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            encoder.write_all(archive)?;
            encoder.finish()?
        }
        Compression::Zstd => zstd::encode_all(Cursor::new(archive), ZSTD_LEVEL)?,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn sample() -> Tree {
        let mut tree = Tree::skeleton().unwrap();
        let init = Node::File { mode: 0o755, contents: b"\x7fELF".to_vec() };
        tree.insert(Path::new("/init"), init, "agent").unwrap();
        tree.insert(Path::new("/bin/sh"), Node::Link("/bin/busybox".into()), "busybox").unwrap();
        tree
    }

    #[test]
    fn equal_trees_give_equal_bytes() {
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            assert_eq!(build(&sample(), compression).unwrap(), build(&sample(), compression).unwrap());
        }
    }

    #[test]
    fn the_archive_reads_back() {
        let bytes = build(&sample(), Compression::None).unwrap();
        let mut rest = Cursor::new(&bytes);
        let mut names = Vec::new();
        loop {
            let reader = cpio::newc::Reader::new(&mut rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            names.push((reader.entry().name().to_owned(), reader.entry().mode()));
            reader.finish().unwrap();
        }
        assert!(names.contains(&("init".to_owned(), 0o100_755)));
        assert!(names.contains(&("bin/sh".to_owned(), 0o120_777)));
        assert!(names.contains(&("dev/console".to_owned(), 0o020_600)));
    }
}
