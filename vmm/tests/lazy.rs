//! Machines whose memory comes from their snapshot page by page.

mod support;

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use support::{Code, EXIT_PORT, chain, config, console, ended_within, wait};
use vmm::memory::source::chunked::ChunkStore;
use vmm::memory::source::index::DEFAULT_CHUNK;
use vmm::memory::source::pack::pack;
use vmm::memory::source::{
    Address, ChunkCache, ChunkFile, ChunkIndex, ChunkServer, ChunkedSource, FileSource, Listener, RemoteChunks, Run,
    Source, SourceError,
};
use vmm::memory::uffd::Uffd;
use vmm::memory::working_set::WORKING_SET;
use vmm::{
    BalloonConfig, Confinement, ExitReason, LazyConfig, Machine, MachineConfig, MemoryBacking, RestoreMemory,
    WorkingSet,
};
use vmm_sys_util::eventfd::EventFd;

const SHUTDOWN: u8 = 4;
const SIZE: u64 = 128 << 20;
/// Where the guest puts its data, and the word that it waits for.
const DATA: u32 = 0x40_0000;
const DATA_LENGTH: u32 = 8 << 20;
const LEAVE: u32 = 0x20_1000;

/// Ends the test unless it can run guests whose faults it serves.
macro_rules! need_uffd {
    () => {
        need_kvm!();
        if let Err(error) = Uffd::open() {
            println!("skipped: {error}");
            return;
        }
    };
}

/// Writes its own address into the first word of each page of its data, waits for the word at [`LEAVE`], then adds up what it finds in each
/// page and prints `same` if that is the sum of what it wrote, else `lost`; in 32-bit mode.
fn keeper() -> Code {
    let end = DATA + DATA_LENGTH;
    let sum = (DATA..end).step_by(4096).fold(0, u32::wrapping_add);
    // mov edi, DATA; mov [edi], edi; add edi, 4096; cmp edi, end; jb -16
    let code = Code::new().bytes(&[0xbf]).bytes(&DATA.to_le_bytes());
    let code = code.bytes(&[0x89, 0x3f, 0x81, 0xc7, 0, 0x10, 0, 0, 0x81, 0xff]).bytes(&end.to_le_bytes());
    let code = code.bytes(&[0x72, 0xf0]).print("up ").wait_for(LEAVE, 1);
    // xor eax, eax; mov edi, DATA; add eax, [edi]; add edi, 4096; cmp edi, end; jb -16
    let code = code.bytes(&[0x31, 0xc0, 0xbf]).bytes(&DATA.to_le_bytes());
    let code = code.bytes(&[0x03, 0x07, 0x81, 0xc7, 0, 0x10, 0, 0, 0x81, 0xff]).bytes(&end.to_le_bytes());
    let code = code.bytes(&[0x72, 0xf0]);
    let (same, lost) = (leaving("same"), leaving("lost"));
    // cmp eax, sum; jne over `same`
    let jump = i32::try_from(same.as_bytes().len()).expect("short");
    let code = code.bytes(&[0x3d]).bytes(&sum.to_le_bytes()).bytes(&[0x0f, 0x85]).bytes(&jump.to_le_bytes());
    code.bytes(same.as_bytes()).bytes(lost.as_bytes())
}

fn leaving(text: &str) -> Code {
    Code::new().print(text).out(EXIT_PORT, SHUTDOWN).halt()
}

fn printed(machine: &Machine, text: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !console(machine).contains(text) {
        assert!(Instant::now() < deadline, "{:?}", console(machine));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A keeper with its data, saved.
fn saved(adapt: impl FnOnce(&mut MachineConfig)) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("directory");
    let kernel = keeper().pvh();
    let mut config = config(kernel.path());
    adapt(&mut config);
    let machine = Machine::build(config).expect("build");
    machine.start().expect("start");
    printed(&machine, "up ");
    machine.snapshot(directory.path()).expect("snapshot");
    directory
}

/// Lets the guests that are restored from now on leave.
fn let_go(directory: &Path) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().write(true).open(directory.join("memory")).expect("memory");
    file.write_all_at(&1_u32.to_le_bytes(), LEAVE.into()).expect("write");
}

fn restore_config() -> MachineConfig {
    config(Path::new("/no kernel is needed"))
}

fn restore(directory: &Path, lazy: LazyConfig) -> Machine {
    restore_as(restore_config(), directory, lazy)
}

fn restore_as(config: MachineConfig, directory: &Path, lazy: LazyConfig) -> Machine {
    Machine::restore_with(config, directory, RestoreMemory::Lazy(lazy))
        .unwrap_or_else(|error| panic!("{}", chain(&error)))
}

fn keeps_its_data(machine: &Machine) {
    machine.start().expect("start");
    assert_eq!(wait(machine), ExitReason::Shutdown);
    assert_eq!(console(machine), "same");
}

/// A source that does as it is told when a page is read.
struct Told {
    inner: FileSource,
    at: u64,
    does: Box<dyn FnMut(u64) -> Result<(), SourceError> + Send>,
}

impl std::fmt::Debug for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Told")
    }
}

impl Source for Told {
    fn length(&self) -> u64 {
        self.inner.length()
    }

    fn run(&self, offset: u64) -> Run {
        self.inner.run(offset)
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        if (offset..offset + buffer.len() as u64).contains(&self.at) {
            (self.does)(offset)?;
        }
        self.inner.read(offset, buffer)
    }
}

/// The memory file of `directory`, whose data is what `does` says.
fn told(directory: &Path, does: impl FnMut(u64) -> Result<(), SourceError> + Send + 'static) -> LazyConfig {
    let inner = FileSource::new(fs::File::open(directory.join("memory")).expect("memory")).expect("source");
    let source = Told { inner, at: u64::from(DATA) + (1 << 20), does: Box::new(does) };
    LazyConfig { source: Some(Box::new(source)), ..LazyConfig::default() }
}

#[test]
fn a_guest_finds_its_memory_whichever_way_it_comes() {
    need_uffd!();
    let directory = saved(|_| {});
    let_go(directory.path());
    keeps_its_data(&Machine::restore(restore_config(), directory.path()).expect("restore"));
    for backing in [MemoryBacking::Private, MemoryBacking::Shared] {
        let mut config = restore_config();
        config.memory.backing = backing;
        let machine = restore_as(config, directory.path(), LazyConfig::default());
        keeps_its_data(&machine);
        let metrics = machine.lazy_memory().expect("lazy");
        let touched = u64::from(DATA_LENGTH) + (1 << 20);
        let copied = metrics.metrics().bytes_copied.get();
        assert!(copied >= u64::from(DATA_LENGTH) && copied < touched, "{copied} bytes");
        assert_eq!(metrics.metrics().source_errors.get(), 0);
    }
}

#[test]
fn all_memory_is_made_before_where_that_is_asked_for() {
    need_uffd!();
    let directory = saved(|_| {});
    let_go(directory.path());
    let mut config = restore_config();
    config.memory.prealloc = true;
    let machine = restore_as(config, directory.path(), LazyConfig::default());
    let metrics = machine.lazy_memory().expect("lazy");
    assert_eq!(metrics.metrics().bytes_copied.get() + metrics.metrics().zero_pages.get() * 4096, SIZE);
    keeps_its_data(&machine);
}

#[test]
fn the_working_set_of_a_start_serves_the_next() {
    need_uffd!();
    let directory = saved(|_| {});
    let_go(directory.path());
    assert_eq!(WorkingSet::read(directory.path(), WORKING_SET, SIZE).expect("none"), None);
    let first = restore(directory.path(), LazyConfig { record: true, ..LazyConfig::default() });
    keeps_its_data(&first);
    let set = first.lazy_memory().expect("lazy").working_set();
    assert!(set.bytes() >= u64::from(DATA_LENGTH));
    set.write(directory.path(), WORKING_SET).expect("write");

    let working_set = WorkingSet::read(directory.path(), WORKING_SET, SIZE).expect("read");
    assert_eq!(working_set.as_ref(), Some(&set));
    let second = restore(directory.path(), LazyConfig { working_set, record: true, ..LazyConfig::default() });
    let handle = second.lazy_memory().expect("lazy");
    // Even before it is started.
    let deadline = Instant::now() + Duration::from_secs(20);
    while handle.metrics().prefetched_bytes.get() + handle.metrics().working_set_late.get() * 4096 < set.bytes() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    keeps_its_data(&second);
    assert!(handle.metrics().hit_ratio(handle.page_size()) > 0.98, "{}", handle.metrics().hit_ratio(4096));
    assert_eq!(handle.working_set().ranges().next(), set.ranges().next());
}

#[test]
fn a_machine_that_is_half_restored_is_saved_wholly() {
    need_uffd!();
    let directory = saved(|_| {});
    let machine = restore(directory.path(), LazyConfig::default());
    machine.start().expect("start");
    let again = tempfile::tempdir().expect("directory");
    machine.snapshot(again.path()).expect("snapshot");
    vmm::snapshot::verify(again.path()).expect("sound");
    // The one goes on where it was, without its template now; the other has all that the first had.
    fs::remove_file(directory.path().join("memory")).expect("remove");
    machine.resume().expect("resume");
    drop(machine);
    let_go(again.path());
    keeps_its_data(&restore(again.path(), LazyConfig::default()));
    keeps_its_data(&Machine::restore(restore_config(), again.path()).expect("restore"));
}

#[test]
fn a_template_that_is_removed_stays_for_those_who_have_it() {
    need_uffd!();
    let directory = saved(|_| {});
    let_go(directory.path());
    let machine = restore(directory.path(), LazyConfig::default());
    drop(directory);
    keeps_its_data(&machine);
}

#[test]
fn a_source_that_fails_ends_the_machine_with_its_reason() {
    need_uffd!();
    let directory = saved(|_| {});
    let_go(directory.path());
    let broken = |offset| Err(SourceError::Read { offset, source: io::Error::from_raw_os_error(libc::EIO) });
    let machine = restore(directory.path(), told(directory.path(), broken));
    machine.start().expect("start");
    let ExitReason::MemoryLost(reason) = wait(&machine) else { panic!("{:?}", machine.exit_reason()) };
    assert_eq!(reason, "The template's memory cannot be read at 0x500000: Input/output error (os error 5)");
    assert_eq!(console(&machine), "", "the guest went no further");
    assert_eq!(machine.lazy_memory().expect("lazy").metrics().source_errors.get(), 1);
    let directory = tempfile::tempdir().expect("directory");
    let said = chain(&machine.snapshot(directory.path()).expect_err("it has ended"));
    assert!(said.contains("memory is lost"), "{said}");
}

#[test]
fn a_thread_that_dies_ends_the_machine() {
    need_uffd!();
    let directory = saved(|_| {});
    let_go(directory.path());
    // A panic tells of itself in ways that the thread's filter does not know.
    let mut config = restore_config();
    config.confinement = Confinement::Off;
    let machine = restore_as(config, directory.path(), told(directory.path(), |_| panic!("as it was told")));
    machine.start().expect("start");
    let reason = wait(&machine);
    assert_eq!(reason.to_string(), "The guest's memory is lost: The thread that serves page faults has ended");
    assert_eq!(console(&machine), "");
}

#[test]
fn a_memory_file_that_is_cut_while_it_is_used_ends_the_machine() {
    need_uffd!();
    let directory = saved(|_| {});
    let_go(directory.path());
    let machine = restore(directory.path(), LazyConfig::default());
    let memory = fs::OpenOptions::new().write(true).open(directory.path().join("memory")).expect("memory");
    memory.set_len(u64::from(DATA)).expect("cut");
    machine.start().expect("start");
    let ExitReason::MemoryLost(reason) = wait(&machine) else { panic!("{:?}", machine.exit_reason()) };
    assert!(reason.contains("4194304 bytes where there were 134217728"), "{reason}");
}

/// A source that waits until it is let go: the machine can be paused, stopped and dropped when it has been, and meanwhile its guest stands.
#[test]
fn a_source_that_is_slow_holds_the_guest_and_loses_nothing() {
    need_uffd!();
    let directory = saved(|_| {});
    let_go(directory.path());
    let (asked, was_asked): (Sender<()>, Receiver<()>) = channel();
    let (go_on, may_go_on): (Sender<()>, Receiver<()>) = channel();
    let slow = move |_| {
        let _ = asked.send(());
        let _ = may_go_on.recv();
        Ok(())
    };
    let machine = restore(directory.path(), told(directory.path(), slow));
    machine.start().expect("start");
    was_asked.recv_timeout(Duration::from_secs(20)).expect("asked");
    assert!(!ended_within(&machine, 50));
    assert_eq!(console(&machine), "");
    drop(go_on);
    assert_eq!(wait(&machine), ExitReason::Shutdown);
    assert_eq!(console(&machine), "same");
}

#[test]
fn a_machine_is_stopped_while_its_memory_comes() {
    need_uffd!();
    let directory = saved(|_| {});
    let_go(directory.path());
    for _ in 0..10 {
        let mut set = WorkingSet::new(SIZE);
        assert!(set.push(0..SIZE));
        let machine = restore(directory.path(), LazyConfig { working_set: Some(set), ..LazyConfig::default() });
        machine.start().expect("start");
        machine.stop();
        assert!(matches!(machine.exit_reason(), Some(ExitReason::Stopped | ExitReason::Shutdown)));
    }
}

#[test]
fn a_hundred_machines_come_from_one_template_at_a_time() {
    need_uffd!();
    let directory = saved(|_| {});
    let_go(directory.path());
    std::thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                let machine = restore(directory.path(), LazyConfig::default());
                machine.start().expect("start");
                assert!(ended_within(&machine, 120_000));
                assert_eq!(machine.wait(), ExitReason::Shutdown);
                assert_eq!(console(&machine), "same");
            });
        }
    });
}

#[test]
fn a_difference_comes_page_by_page_as_well() {
    need_uffd!();
    let whole = saved(|_| {});
    let machine = Machine::restore(restore_config(), whole.path()).expect("restore");
    machine.track_writes().expect("track");
    machine.start().expect("start");
    let difference = tempfile::tempdir().expect("directory");
    let place = difference.path().join("difference");
    machine.snapshot_diff(&place, whole.path()).expect("difference");
    drop(machine);
    // Where the guest waits there is a hole in the difference: it goes on as the whole one says.
    let_go(whole.path());
    keeps_its_data(&restore(&place, LazyConfig::default()));
}

/// What `directory` has in chunks.
fn packed(directory: &Path) -> (Arc<ChunkIndex>, fs::File) {
    let mut file = tempfile::tempfile().expect("file");
    let memory = fs::File::open(directory.join("memory")).expect("memory");
    let index = pack(memory, &mut file, DEFAULT_CHUNK).expect("pack");
    (Arc::new(index), file)
}

fn of_chunks(index: &Arc<ChunkIndex>, store: impl ChunkStore + 'static, cache: Option<ChunkCache>) -> LazyConfig {
    let source = ChunkedSource::new(Arc::clone(index), store, cache).expect("source");
    LazyConfig { source: Some(Box::new(source)), ..LazyConfig::default() }
}

#[test]
fn a_guest_comes_from_chunks_of_a_file_and_of_a_server() {
    need_uffd!();
    let directory = saved(|_| {});
    let_go(directory.path());
    let (index, file) = packed(directory.path());
    fs::remove_file(directory.path().join("memory")).expect("the template has only chunks");
    let store = ChunkFile::new(file.try_clone().expect("clone"), &index).expect("store");
    keeps_its_data(&restore(directory.path(), of_chunks(&index, store, None)));

    let address = Address::Unix(directory.path().join("socket"));
    let listener = Listener::Unix(UnixListener::bind(directory.path().join("socket")).expect("bind"));
    let stop = Arc::new(EventFd::new(libc::EFD_NONBLOCK).expect("event"));
    let server = ChunkServer::new(&index, file, Arc::clone(&stop), Confinement::On).expect("server");
    let serving = std::thread::spawn(move || server.run(&listener).expect("run"));
    for _ in 0..2 {
        let store = RemoteChunks::connect(&address, Duration::from_secs(10)).expect("connect");
        let cache = ChunkCache::open(&directory.path().join("cache"), index.chunk_size(), 64 << 20).expect("cache");
        keeps_its_data(&restore(directory.path(), of_chunks(&index, store, Some(cache))));
    }
    // The server goes while a machine runs. It has what it has, and ends when it needs more.
    let store = RemoteChunks::connect(&address, Duration::from_secs(10)).expect("connect");
    let machine = restore(directory.path(), of_chunks(&index, store, None));
    stop.write(1).expect("stop");
    serving.join().expect("join");
    machine.start().expect("start");
    let ExitReason::MemoryLost(reason) = wait(&machine) else { panic!("{:?}", machine.exit_reason()) };
    assert!(reason.starts_with("The server of chunks is gone"), "{reason}");
}

#[test]
fn a_machine_that_waits_for_a_server_can_be_stopped() {
    need_uffd!();
    let directory = saved(|_| {});
    let_go(directory.path());
    let (index, _) = packed(directory.path());
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).expect("bind");
    let store = RemoteChunks::connect(&Address::Unix(path), Duration::from_secs(600)).expect("connect");
    let (mut client, _) = listener.accept().expect("accept");
    let waiting = std::thread::spawn(move || {
        // It has asked, and gets nothing.
        io::Read::read_exact(&mut client, &mut [0]).expect("a request");
        client
    });
    let lazy = of_chunks(&index, store, None);
    // Restoring this guest touches none of its memory.
    let machine = restore(directory.path(), lazy);
    machine.start().expect("start");
    let client = waiting.join().expect("join");
    let begin = Instant::now();
    machine.stop();
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    assert_eq!(machine.exit_reason(), Some(ExitReason::Stopped));
    drop(client);
}

#[test]
fn what_does_not_fit_is_refused_with_its_name() {
    need_uffd!();
    let directory = saved(|config| config.balloon = Some(BalloonConfig::default()));
    let lazy = |config: MachineConfig, lazy| {
        let refused = Machine::restore_with(config, directory.path(), RestoreMemory::Lazy(lazy));
        chain(&refused.expect_err("refused"))
    };
    let said = lazy(restore_config(), LazyConfig::default());
    assert!(said.contains("1 virtio devices"), "{said}");
    let short = tempfile::tempfile().expect("file");
    short.set_len(4096).expect("length");
    let source = FileSource::new(short).expect("source");
    let mut config = restore_config();
    config.balloon = Some(BalloonConfig::default());
    let said = lazy(config, LazyConfig { source: Some(Box::new(source)), ..LazyConfig::default() });
    assert!(said.contains("a memory of 4096 bytes"), "{said}");
}
