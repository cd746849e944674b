//! A snapshot and those that it is the difference to, opened.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::manifest::{Manifest, ManifestError};
use super::memory::{VerifyError, open, read_state};
use super::pieces::{Piece, beneath};
use super::{BASE, hex};

/// Snapshots that one restore puts together. Each is a file that stays open, and may cut all pieces of those below it
/// in two; whoever takes more differences than this takes a whole snapshot once in a while.
pub const MAX_LAYERS: usize = 32;

/// Why a snapshot's files cannot be opened together.
#[derive(Debug, thiserror::Error)]
pub enum LayersError {
    /// There is no snapshot, or one of another format.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Its files are not what its manifest says.
    #[error(transparent)]
    Files(#[from] VerifyError),
    /// The link leads to another snapshot, or that one was replaced.
    #[error("The snapshot in {} is not the one that the snapshot in {} is the difference to", base.display(), directory.display())]
    Base {
        /// The snapshot that is a difference.
        directory: PathBuf,
        /// What was found for its base.
        base: PathBuf,
    },
    /// Differences of differences without end.
    #[error("The snapshot is made of more than {MAX_LAYERS} others")]
    TooMany,
    /// A difference to a memory of another size.
    #[error("The snapshot has {length} bytes of memory, its base {base}")]
    Size {
        /// Bytes of this memory.
        length: u64,
        /// Bytes of the base's.
        base: u64,
    },
    /// The manifest has pages that memory does not have, or not in order.
    #[error("The manifest's list of pages is not in order or leaves the memory at page {0}")]
    Pages(u64),
}

/// What a snapshot says of itself: all of it, where its memory is elsewhere.
pub struct Head {
    directory: PathBuf,
    identity: String,
    manifest: Manifest,
    state: Vec<u8>,
}

impl Head {
    /// Reads the manifest and the state in `directory`, which must fit each other.
    pub fn open(directory: &Path) -> Result<Self, LayersError> {
        let (directory, _held) = found(directory)?;
        Self::read(directory)
    }

    /// Of a directory that is held.
    fn read(directory: PathBuf) -> Result<Self, LayersError> {
        let bytes = Manifest::read_bytes(&directory)?;
        let identity = hex(&Sha256::digest(&bytes));
        let manifest = Manifest::decode(&bytes)?;
        let state = read_state(&directory, &manifest.state)?;
        Ok(Self { directory, identity, manifest, state })
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// SHA-256 of that manifest.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The bytes of its state file.
    pub fn state(&self) -> &[u8] {
        &self.state
    }
}

/// One snapshot.
struct Layer {
    directory: PathBuf,
    /// SHA-256 of its manifest.
    identity: String,
    manifest: Manifest,
    file: File,
}

/// A snapshot that is open, with all that it is made of.
pub struct Layers {
    /// Differences, the topmost first.
    differences: Vec<Layer>,
    /// The one below them all.
    whole: Layer,
    state: Vec<u8>,
}

impl Layers {
    /// Opens the snapshot in `directory` and those below it.
    pub fn open(directory: &Path) -> Result<Self, LayersError> {
        let (mut lowest, state) = Layer::open(directory)?;
        let mut differences = Vec::new();
        while let Some(base) = lowest.manifest.base.clone() {
            if differences.len() + 1 == MAX_LAYERS {
                return Err(LayersError::TooMany);
            }
            let (lower, _) = Layer::open(&lowest.directory.join(BASE))?;
            if lower.identity != base.manifest {
                return Err(LayersError::Base { directory: lowest.directory, base: lower.directory });
            }
            let (length, base) = (lowest.manifest.memory.length, lower.manifest.memory.length);
            if length != base {
                return Err(LayersError::Size { length, base });
            }
            differences.push(std::mem::replace(&mut lowest, lower));
        }
        Ok(Self { differences, whole: lowest, state })
    }

    /// The topmost first, the whole one last.
    fn all(&self) -> impl Iterator<Item = &Layer> {
        self.differences.iter().chain([&self.whole])
    }

    fn top(&self) -> &Layer {
        self.differences.first().unwrap_or(&self.whole)
    }

    /// The manifest of the snapshot itself.
    pub fn manifest(&self) -> &Manifest {
        &self.top().manifest
    }

    /// SHA-256 of that manifest: what another snapshot can be the difference to.
    pub fn identity(&self) -> &str {
        &self.top().identity
    }

    /// Bytes of memory.
    pub fn memory_size(&self) -> u64 {
        self.whole.manifest.memory.length
    }

    /// The bytes of its state file.
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// Where the snapshot is, as an absolute path.
    pub fn directory(&self) -> &Path {
        &self.top().directory
    }

    /// The directories that must stay as they are for this snapshot to be one.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        self.all().map(|layer| &*layer.directory)
    }

    /// Each memory file with its manifest and where it is.
    pub(super) fn memories(&self) -> impl Iterator<Item = (&Path, &Manifest, &File)> {
        self.all().map(|layer| (&*layer.directory, &layer.manifest, &layer.file))
    }

    /// The memory file below all others, which has every page.
    pub fn whole(&self) -> &File {
        &self.whole.file
    }

    /// What is to be put over the [whole](Self::whole) file: pieces of memory in order, and the file in which each is, at
    /// the same place as in memory.
    pub fn pieces(&self) -> Result<Vec<(Piece, &File)>, LayersError> {
        let mut pieces = Vec::new();
        for (index, layer) in self.differences.iter().enumerate() {
            let runs = layer.manifest.base.as_ref().map_or(&[][..], |base| &base.pages);
            pieces = beneath(pieces, &Piece::list(runs, layer.manifest.memory.length, index)?);
        }
        let file = |piece: Piece| Some((piece, &self.differences.get(piece.layer)?.file));
        Ok(pieces.into_iter().filter_map(file).collect())
    }
}

impl Layer {
    /// Opens a snapshot and reads its state. All is of one snapshot, also where somebody replaces it at that time.
    fn open(directory: &Path) -> Result<(Self, Vec<u8>), LayersError> {
        let (directory, _held) = found(directory)?;
        let Head { directory, identity, manifest, state } = Head::read(directory)?;
        let file = open(&directory, &manifest.memory)?;
        Ok((Self { directory, identity, manifest, file }, state))
    }
}

/// Where links lead to now, whatever becomes of them; held, so that all of it is of one snapshot.
fn found(directory: &Path) -> Result<(PathBuf, File), ManifestError> {
    let failed = |source| ManifestError::Read { path: directory.to_owned(), source };
    let directory = directory.canonicalize().map_err(failed)?;
    let held = hold(&directory, libc::LOCK_SH).map_err(failed)?;
    Ok((directory, held))
}

/// Holds a directory until the descriptor is closed: against [readers](libc::LOCK_SH) while its snapshot is replaced,
/// against that while it is opened. Neither takes longer than some calls that open and rename files.
pub(super) fn hold(directory: &Path, how: libc::c_int) -> io::Result<File> {
    let directory = File::open(directory)?;
    // SAFETY: no pointers.
    while unsafe { libc::flock(directory.as_raw_fd(), how) } != 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use super::super::manifest::{Base, FORMAT, MemoryFile, StateFile};
    use super::super::{MANIFEST, MEMORY, STATE};
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// Writes a snapshot of four pages, of which a difference has the second, and returns its identity.
    fn write(directory: &Path, base: Option<(&Path, &str)>, length: u64) -> String {
        fs::create_dir(directory).expect("directory");
        fs::write(directory.join(MEMORY), vec![0; usize::try_from(length).expect("short")]).expect("memory");
        fs::write(directory.join(STATE), "state").expect("state");
        let manifest = Manifest {
            format: FORMAT,
            writer: String::new(),
            machine: String::new(),
            vcpus: 1,
            devices: Vec::new(),
            state: StateFile { length: 5, sha256: hex(&Sha256::digest("state")) },
            memory: MemoryFile { length, chunk: 1 << 20, sha256: vec![None] },
            base: base.map(|(_, identity)| Base { manifest: identity.to_owned(), pages: vec![(1, 1)] }),
        };
        if let Some((base, _)) = base {
            symlink(base, directory.join(BASE)).expect("link");
        }
        let text = serde_json::to_vec(&manifest).expect("json");
        fs::write(directory.join(MANIFEST), &text).expect("manifest");
        hex(&Sha256::digest(&text))
    }

    #[test]
    fn so_many_layers_are_opened_and_one_more_is_not() {
        let place = tempfile::tempdir().expect("directory");
        let at = |number: usize| place.path().join(number.to_string());
        let mut identity = write(&at(0), None, 4 << 12);
        for number in 1..=MAX_LAYERS {
            identity = write(&at(number), Some((&at(number - 1), &identity)), 4 << 12);
        }
        let layers = Layers::open(&at(MAX_LAYERS - 1)).expect("as many as there may be");
        assert_eq!(layers.directories().count(), MAX_LAYERS);
        assert_eq!(layers.state(), b"state");
        let pieces: Vec<_> = layers.pieces().expect("pieces").into_iter().map(|(piece, _)| piece).collect();
        assert_eq!(pieces, [Piece { page: 1, count: 1, layer: 0 }]);
        assert!(matches!(Layers::open(&at(MAX_LAYERS)).err(), Some(LayersError::TooMany)));
    }

    #[test]
    fn a_snapshot_that_leads_to_itself_is_not_its_base() {
        let place = tempfile::tempdir().expect("directory");
        let directory = place.path().join("loop");
        write(&directory, Some((&directory, &"0".repeat(64))), 4 << 12);
        let Some(LayersError::Base { base, .. }) = Layers::open(&directory).err() else { panic!("refused") };
        assert_eq!(base, directory.canonicalize().expect("path"));
    }

    #[test]
    fn a_base_with_another_size_is_refused() {
        let place = tempfile::tempdir().expect("directory");
        let (whole, other) = (place.path().join("whole"), place.path().join("other"));
        let identity = write(&whole, None, 4 << 12);
        write(&other, Some((&whole, &identity)), 5 << 12);
        let refused = Layers::open(&other).err();
        assert!(matches!(refused, Some(LayersError::Size { length: 0x5000, base: 0x4000 })), "{refused:?}");
    }

    #[test]
    fn a_snapshot_whose_memory_is_elsewhere_has_a_head_alone() {
        let place = tempfile::tempdir().expect("directory");
        let directory = place.path().join("head");
        let identity = write(&directory, None, 4 << 12);
        fs::remove_file(directory.join(MEMORY)).expect("remove");
        assert!(matches!(Layers::open(&directory).err(), Some(LayersError::Files(VerifyError::Read { .. }))));
        let head = Head::open(&directory).expect("head");
        assert_eq!(
            (head.identity(), head.state(), head.manifest().memory.length),
            (&*identity, &b"state"[..], 4 << 12)
        );
        fs::write(directory.join(STATE), "stale").expect("write");
        assert!(matches!(Head::open(&directory).err(), Some(LayersError::Files(VerifyError::Damaged { .. }))));
    }

    #[test]
    fn a_format_without_differences_is_read() {
        let place = tempfile::tempdir().expect("directory");
        let directory = place.path().join("old");
        write(&directory, None, 4 << 12);
        let path = directory.join(MANIFEST);
        let text = fs::read_to_string(&path).expect("manifest");
        fs::write(&path, text.replace("\"format\":2", "\"format\":1")).expect("write");
        assert_eq!(Layers::open(&directory).expect("layers").manifest().format, 1);
    }
}
