//! A small template on its way from one node to another.

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;

use seccomp::Confinement;
use tempfile::TempDir;
use vmm::WorkingSet;
use vmm::memory::source::{Address, ChunkServer, Listener, Source};
use vmm::memory::working_set::{WORKING_SET, WRITTEN_SET};
use vmm::snapshot::manifest::{FORMAT, Manifest, MemoryFile, StateFile};
use vmm::snapshot::{MANIFEST, MEMORY, STATE};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::bootstrap::with_causes;
use crate::config::{Config, GuestRoot};
use crate::run_dir::RunDir;
use crate::template::record::{Files, Record};
use crate::template::{Chunks, Store, Template};

const MIB: u64 = 1 << 20;
const LENGTH: u64 = 4 * MIB;

/// Holes, a page in the middle, and pages that all differ.
fn memory() -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(LENGTH).unwrap()];
    bytes[0x12_3000..0x12_4000].fill(7);
    let mut state = 1_u32;
    for byte in &mut bytes[0x20_0000..0x34_5000] {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = state.to_le_bytes()[3];
    }
    bytes
}

struct Node {
    dir: TempDir,
    config: Config,
    store: Store,
}

impl Node {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.hypervisor.memory_mib = LENGTH / MIB;
        let [kernel, initrd] = ["kernel", "initrd"].map(|name| {
            let path = dir.path().join(name);
            fs::write(&path, name).unwrap();
            path
        });
        (config.hypervisor.kernel, config.hypervisor.root) = (kernel, GuestRoot::Initrd(initrd));
        let store = Store::new(&config, &RunDir::at(dir.path().join("run")));
        Self { dir, config, store }
    }

    /// A template as if a machine had been saved.
    fn make(&self, name: &Id) -> Template {
        let lock = self.store.lock(name, true).unwrap().unwrap();
        let draft = self.store.draft(name, &lock).unwrap();
        let (memory, state) = (memory(), b"state");
        fs::write(draft.path().join(MEMORY), &memory).unwrap();
        fs::write(draft.path().join(STATE), state).unwrap();
        let sum = |chunk: &[u8]| chunk.iter().any(|byte| *byte != 0).then(|| hex(&Sha256::digest(chunk)));
        let manifest = Manifest {
            format: FORMAT,
            writer: String::new(),
            machine: String::new(),
            vcpus: 1,
            devices: Vec::new(),
            state: StateFile { length: 5, sha256: hex(&Sha256::digest(state)) },
            memory: MemoryFile { length: LENGTH, chunk: MIB, sha256: memory.chunks(1 << 20).map(sum).collect() },
            base: None,
        };
        fs::write(draft.path().join(MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
        let mut set = WorkingSet::new(LENGTH);
        assert!(set.push(0x20_0000..0x20_4000));
        set.write(draft.path(), WORKING_SET).unwrap();
        assert!(set.push(0x30_0000..0x30_2000));
        set.write(draft.path(), WRITTEN_SET).unwrap();
        let (key, images) = (Key::of(&self.config, name), Images::read(&self.config).unwrap());
        let files = Files::look(draft.path()).unwrap();
        let record = Record { name: name.clone(), made: 7, mark: "mark".into(), key, images, files, elsewhere: None };
        record.write(draft.path()).unwrap();
        self.store.publish(name, draft, &lock).unwrap();
        Template::open(&self.store, name).unwrap()
    }

    fn import(&self, name: &str, directory: &Path, server: Option<Server>) -> Result<Template, TransferError> {
        import(&self.store, &Id::try_from(name).unwrap(), &self.config, directory, server)
    }

    /// Why nothing is imported, of which nothing is left.
    #[track_caller]
    fn refusal(&self, directory: &Path) -> String {
        let error = self.import("t", directory, None).unwrap_err();
        assert_eq!(fs::read_dir(self.store.chunks().parent().unwrap()).map_or(0, Iterator::count), 0);
        with_causes(&error)
    }
}

/// A template of another node, exported.
fn exported() -> (Node, TempDir, PathBuf) {
    let node = Node::new();
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("exported");
    let template = node.make(&Id::try_from("made").unwrap());
    export(&template, &directory).unwrap();
    (node, place, directory)
}

struct Serving {
    stop: Arc<EventFd>,
    address: Address,
    thread: Option<JoinHandle<()>>,
}

impl Serving {
    fn of(directory: &Path) -> Self {
        Self::as_if(directory, &Exported::read(directory).unwrap().index(directory).unwrap())
    }

    /// Serves the file of chunks by another index.
    fn as_if(directory: &Path, index: &ChunkIndex) -> Self {
        let path = directory.with_file_name("socket");
        let _ = fs::remove_file(&path);
        let listener = Listener::Unix(UnixListener::bind(&path).unwrap());
        let stop = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let chunks = open_chunks(directory).unwrap();
        let server = ChunkServer::new(index, chunks, Arc::clone(&stop), Confinement::Off).unwrap();
        let thread = std::thread::spawn(move || server.run(&listener).unwrap());
        Self { stop, address: Address::Unix(path), thread: Some(thread) }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.write(1).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn all_of(chunks: &mut Chunks) -> Result<Vec<u8>, SourceError> {
    let mut bytes = vec![0; usize::try_from(LENGTH).unwrap()];
    chunks.source.read(0, &mut bytes).map(|()| bytes)
}

#[test]
fn a_template_is_the_same_on_another_node() {
    let (maker, _place, directory) = exported();
    let node = Node::new();
    let template = node.import("other", &directory, None).unwrap();
    let record = template.record();
    assert_eq!((record.name.as_str(), record.made, record.mark.as_str()), ("other", 7, "mark"));
    assert_eq!(record.elsewhere, None);
    template.check(&node.config).unwrap();
    template.verify().unwrap();
    assert!(fs::read(template.directory().join(MEMORY)).unwrap() == memory());
    let bytes = |set| template.working_set(set).unwrap().map(|set| set.bytes());
    assert_eq!((bytes(WORKING_SET), bytes(WRITTEN_SET)), (Some(0x4000), Some(0x6000)));
    let mut names: Vec<_> =
        fs::read_dir(template.directory()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, [MANIFEST, MEMORY, STATE, FILE, WORKING_SET, WRITTEN_SET]);
    // It takes the place of one of that name, and what was exported stays.
    assert_eq!(maker.import("made", &directory, None).unwrap().record().mark, "mark");
    // Without a working set as well.
    let template = Template::open(&maker.store, &Id::try_from("made").unwrap()).unwrap();
    fs::remove_file(template.directory().join(WORKING_SET)).unwrap();
    fs::remove_file(template.directory().join(WRITTEN_SET)).unwrap();
    let bare = directory.with_file_name("bare");
    export(&Template::open(&maker.store, &Id::try_from("made").unwrap()).unwrap(), &bare).unwrap();
    assert_eq!(node.import("bare", &bare, None).unwrap().working_set(WORKING_SET).unwrap(), None);
}

#[test]
fn what_is_damaged_or_of_another_machine_is_refused_by_name() {
    let (_maker, _place, directory) = exported();
    let mut node = Node::new();
    let refused = |node: &Node, name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let path = directory.join(name);
        let bytes = fs::read(&path).unwrap();
        let mut changed = bytes.clone();
        change(&mut changed);
        fs::write(&path, changed).unwrap();
        let why = node.refusal(&directory);
        fs::write(&path, bytes).unwrap();
        why
    };
    let flip = |at: usize| move |bytes: &mut Vec<u8>| bytes[at] ^= 1;
    let why = refused(&node, STATE, &flip(2));
    assert!(why.contains("is damaged") && why.contains("state is damaged in the 5 bytes"), "{why}");
    for (name, at) in [(MANIFEST, 20), (WORKING_SET, 50), (INDEX, 80)] {
        let why = refused(&node, name, &flip(at));
        assert!(why.contains(&format!("/{name} is not the one that was exported")), "{why}");
    }
    let why = refused(&node, CHUNKS, &flip(200));
    assert!(why.contains("is not what the index says"), "{why}");
    let why = refused(&node, CHUNKS, &|bytes| bytes.truncate(bytes.len() - 1));
    assert!(why.contains("it was cut"), "{why}");
    let why = refused(&node, FILE, &flip(24));
    assert!(why.contains("holds no exported template: its first line is that of another version"), "{why}");
    let why = refused(&node, FILE, &flip(200));
    assert!(why.contains("its checksum does not fit"), "{why}");
    let why = node.refusal(directory.parent().unwrap());
    assert!(why.contains("its record is missing"), "{why}");

    fs::write(node.dir.path().join("initrd"), "another").unwrap();
    let why = node.refusal(&directory);
    assert!(why.contains("was made for another machine: its initrd is"), "{why}");
    node.config.hypervisor.memory_mib += 1;
    let why = node.refusal(&directory);
    assert!(why.contains("its memory is 4 MiB, and 5 MiB is wanted"), "{why}");
}

#[test]
fn a_failed_export_leaves_nothing_and_takes_no_place_of_anything() {
    let (node, place, directory) = exported();
    let name = Id::try_from("made").unwrap();
    let template = Template::open(&node.store, &name).unwrap();
    let error = export(&template, &directory).unwrap_err();
    assert!(matches!(error, TransferError::NotEmpty(_)) && directory.join(FILE).exists());

    let memory = fs::OpenOptions::new().write(true).open(template.directory().join(MEMORY)).unwrap();
    memory.write_all_at(&[1], 0x30_0000).unwrap();
    let (fresh, empty) = (place.path().join("fresh"), place.path().join("empty"));
    fs::create_dir(&empty).unwrap();
    for directory in [&fresh, &empty] {
        let why = with_causes(&export(&template, directory).unwrap_err());
        assert!(why.contains("is damaged in the 1048576 bytes from 0x300000 on"), "{why}");
    }
    assert!(!fresh.exists() && fs::read_dir(&empty).unwrap().count() == 0);
}

#[test]
fn a_memory_stays_elsewhere_and_is_needed_once() {
    let (_maker, _place, directory) = exported();
    let serving = Serving::of(&directory);
    // What is copied to the node has no chunks.
    let copied = directory.with_file_name("copied");
    fs::create_dir(&copied).unwrap();
    for name in [FILE, MANIFEST, STATE, WORKING_SET, WRITTEN_SET, INDEX] {
        fs::copy(directory.join(name), copied.join(name)).unwrap();
    }
    let mut node = Node::new();
    let server = Server::find(serving.address.clone(), &copied).unwrap();
    let template = node.import("t", &copied, Some(server)).unwrap();
    assert!(!template.directory().join(MEMORY).exists());
    template.check(&node.config).unwrap();
    template.verify().unwrap();
    assert_eq!(template.size().unwrap(), (64 * 1024 + 21 * 64 * 1024, LENGTH));
    assert!(matches!(export(&template, &node.dir.path().join("again")), Err(TransferError::Elsewhere(_))));

    let find = |node: &Node| Chunks::find(&template, &node.store, &node.config).map(Option::unwrap);
    let mut chunks = find(&node).unwrap();
    assert!(!chunks.at_once && all_of(&mut chunks).unwrap() == memory());
    drop(serving);
    // The cache has all of it.
    let mut chunks = find(&node).unwrap();
    assert!(chunks.at_once && all_of(&mut chunks).unwrap() == memory());
    node.config.factory.chunk_cache_mib = 0;
    let error = find(&node).unwrap_err();
    assert!(matches!(&error, TemplateError::Unreachable { .. }) && !error.is_curable(), "{error}");
    let why = with_causes(&template.verify().unwrap_err());
    assert!(why.contains("does not come from unix:/") && why.contains("The server of chunks is gone"), "{why}");

    fs::write(template.directory().join(INDEX), "another").unwrap();
    assert!(matches!(Template::open(&node.store, &template.record().name), Err(TemplateError::Index(_))));
    node.store.remove(&template.record().name).unwrap();
    assert!(!node.store.chunks().exists());
}

#[test]
fn a_server_that_is_gone_or_has_another_template_is_no_place_for_a_memory() {
    let (_maker, place, directory) = exported();
    let address = Address::Unix(place.path().join("nobody"));
    let why = with_causes(&Server::find(address, &directory).unwrap_err());
    assert!(why.contains("Nothing is imported from the server of chunks: The server of chunks is gone"), "{why}");

    // Its first chunk is the same.
    let index = Exported::read(&directory).unwrap().index(&directory).unwrap();
    let serving = Serving::as_if(&directory, &with_chunks(&index, &index.chunks()[..1]));
    let why = with_causes(&Server::find(serving.address.clone(), &directory).unwrap_err());
    assert!(why.contains("has another template than the one that is wanted"), "{why}");
}

#[test]
fn a_server_that_lies_later_is_found_out() {
    let (_maker, _place, directory) = exported();
    let node = Node::new();
    let index = Exported::read(&directory).unwrap().index(&directory).unwrap();
    let serving = Serving::of(&directory);
    let server = Server::find(serving.address.clone(), &directory).unwrap();
    let template = node.import("t", &directory, Some(server)).unwrap();
    drop(serving);
    let mut lies = index.chunks().to_vec();
    // Both do not pack, so they have one length.
    (lies[2].offset, lies[3].offset) = (lies[3].offset, lies[2].offset);
    assert_eq!(lies[2].stored, lies[3].stored);
    let _serving = Serving::as_if(&directory, &with_chunks(&index, &lies));
    let mut chunks = Chunks::find(&template, &node.store, &node.config).unwrap().unwrap();
    assert!(matches!(all_of(&mut chunks), Err(SourceError::Damaged { .. })));
    let why = with_causes(&template.verify().unwrap_err());
    assert!(why.contains("does not come from unix:/") && why.contains("is not what the index says"), "{why}");
}

/// An index of the same memory whose places all are of one of these.
fn with_chunks(index: &ChunkIndex, chunks: &[vmm::memory::source::index::Chunk]) -> ChunkIndex {
    let places = vec![1; usize::try_from(LENGTH / index.chunk_size()).unwrap()];
    ChunkIndex::new(LENGTH, u32::try_from(index.chunk_size()).unwrap(), places, chunks.to_vec()).unwrap()
}
