//! Against the kernel of this machine, and against a model of it.

mod model;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::config::{MemoryBacking, MemoryConfig};
use crate::memory::reserve;
use crate::memory::source::{FileSource, Run, SourceError};

const SIZE: u64 = 32 << 20;
const PAGE: u64 = PAGE_SIZE;
/// Long enough for anything here that is to happen.
const SOON: Duration = Duration::from_secs(20);

/// A memory file whose every fourth MiB is numbered pages, and whose rest is holes.
fn template() -> File {
    let file = tempfile::tempfile().expect("file");
    file.set_len(SIZE).expect("length");
    for offset in (0..SIZE).step_by(4 << 20) {
        let bytes: Vec<u8> = (offset..offset + (1 << 20)).step_by(4096).flat_map(|at| [tag(at); 4096]).collect();
        file.write_all_at(&bytes, offset).expect("write");
    }
    file
}

/// What each byte of a page of the template is.
fn tag(offset: u64) -> u8 {
    if offset % (4 << 20) < (1 << 20) { u8::try_from(offset / PAGE % 251 + 1).expect("small") } else { 0 }
}

fn memory(backing: MemoryBacking) -> GuestMemory {
    reserve(&MemoryConfig { backing, ..MemoryConfig::from_size(SIZE) }).expect("memory")
}

fn private() -> GuestMemory {
    memory(MemoryBacking::Private)
}

/// Whether faults can be served here; says so where they cannot.
fn possible(test: &str) -> bool {
    match Uffd::open() {
        Ok(_) => true,
        Err(error) => {
            println!("skipped: {test}: {error}");
            false
        }
    }
}

fn start(memory: &GuestMemory, source: impl Source + 'static, config: LazyConfig) -> LazyMemory {
    LazyMemory::start(memory, Box::new(source), config, Confinement::On).expect("start")
}

/// With a thread that may do what a panic does to tell of itself.
fn start_unconfined(memory: &GuestMemory, source: impl Source + 'static) -> LazyMemory {
    LazyMemory::start(memory, Box::new(source), LazyConfig::default(), Confinement::Off).expect("start")
}

fn start_from_file(memory: &GuestMemory, config: LazyConfig) -> LazyMemory {
    start(memory, FileSource::new(template()).expect("source"), config)
}

fn read(memory: &GuestMemory, offset: u64) -> u8 {
    memory.read_obj(GuestAddress(offset)).expect("read")
}

/// Reads in a thread, as a device would.
fn read_elsewhere(memory: &GuestMemory, offset: u64) -> Receiver<u8> {
    let (sender, receiver) = channel();
    let memory = memory.clone();
    std::thread::spawn(move || {
        let _ = sender.send(read(&memory, offset));
    });
    receiver
}

/// Counting comes after waking: waits until figures are what they are to be.
fn comes_to<T: PartialEq + std::fmt::Debug>(figures: impl Fn() -> T, expected: T) {
    let deadline = std::time::Instant::now() + SOON;
    while figures() != expected && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(figures(), expected);
}

/// A source that says what is read of it, in order, and does as it is told.
struct Told {
    reads: std::sync::mpsc::Sender<(u64, usize)>,
    fails_at: Option<u64>,
    panics_at: Option<u64>,
    inner: FileSource,
}

impl std::fmt::Debug for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Told")
    }
}

impl Told {
    fn new() -> (Self, Receiver<(u64, usize)>) {
        let (reads, receiver) = channel();
        let inner = FileSource::new(template()).expect("source");
        (Self { reads, fails_at: None, panics_at: None, inner }, receiver)
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
        let _ = self.reads.send((offset, buffer.len()));
        assert!(self.panics_at.is_none_or(|at| at != offset), "as it was told");
        if self.fails_at == Some(offset) {
            return Err(SourceError::Read { offset, source: io::Error::from_raw_os_error(libc::EIO) });
        }
        self.inner.read(offset, buffer)
    }
}

/// Bytes of anonymous memory that a mapping of `memory` takes.
fn resident(memory: &GuestMemory) -> u64 {
    let host = memory.get_host_address(GuestAddress(0)).expect("address") as usize;
    let maps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let mut mine = false;
    for line in maps.lines() {
        if let Some((start, _)) = line.split_once('-')
            && let Ok(start) = usize::from_str_radix(start, 16)
        {
            mine = start == host;
        }
        if mine && let Some(rest) = line.strip_prefix("Anonymous:") {
            return rest.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10;
        }
    }
    panic!("the mapping is not there");
}

#[test]
fn pages_come_when_they_are_asked_for_and_no_others() {
    if !possible("pages come when they are asked for") {
        return;
    }
    let memory = private();
    let lazy = start_from_file(&memory, LazyConfig::default());
    for offset in [0, 3 * PAGE, 4 << 20, (4 << 20) + 17 * PAGE + 5, 2 << 20, SIZE - 1] {
        assert_eq!(read(&memory, offset), tag(offset), "{offset:#x}");
    }
    let handle = lazy.handle();
    let metrics = handle.metrics();
    // With the zeros behind them, which take nothing: a step of them, and the last page.
    let zeros = super::fill::STEP / PAGE + 1;
    comes_to(|| (metrics.faults.get(), metrics.zero_pages.get(), metrics.bytes_copied.get()), (6, zeros, 4 * PAGE));
    assert_eq!(resident(&memory), 4 * PAGE);
    lazy.stop();
}

#[test]
fn pages_of_zeros_cost_nothing_and_can_be_written() {
    if !possible("pages of zeros cost nothing") {
        return;
    }
    let memory = private();
    let lazy = start_from_file(&memory, LazyConfig::default());
    for offset in (1 << 20..4 << 20).step_by(4096) {
        assert_eq!(read(&memory, offset), 0);
    }
    assert_eq!(resident(&memory), 0);
    comes_to(|| lazy.handle().metrics().faults.get(), (3 << 20) / super::fill::STEP);
    memory.write_obj(9_u8, GuestAddress(2 << 20)).expect("write");
    assert_eq!(read(&memory, 2 << 20), 9);
    assert_eq!(resident(&memory), PAGE);
}

/// There each page of zeros is one of the file's.
#[test]
fn zeros_of_shared_memory_come_one_by_one() {
    if !possible("zeros of shared memory come one by one") {
        return;
    }
    let memory = memory(MemoryBacking::Shared);
    let lazy = start_from_file(&memory, LazyConfig::default());
    assert_eq!((read(&memory, 2 << 20), read(&memory, (2 << 20) + PAGE)), (0, 0));
    let handle = lazy.handle();
    comes_to(|| (handle.metrics().faults.get(), handle.metrics().zero_pages.get()), (2, 2));
}

#[test]
fn who_asks_before_there_is_a_thread_is_served_by_it() {
    if !possible("who asks before there is a thread") {
        return;
    }
    let memory = private();
    let layout = layout(&memory).expect("layout");
    let (uffd, guard) = (Uffd::open().expect("uffd"), Guard::new(&layout).expect("guard"));
    let span = layout.spans()[0];
    let zero_pages = uffd.register(usize::try_from(span.host).expect("address"), 32 << 20).expect("register");
    let shared = Arc::new(Shared::new(uffd, layout, guard, None).expect("shared"));
    let waiting = read_elsewhere(&memory, 5 * PAGE);
    // Until the kernel has something to tell.
    let mut poll = libc::pollfd { fd: std::os::fd::AsRawFd::as_raw_fd(&shared.uffd), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, which lives through the call.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 20_000) }, 1);
    assert!(waiting.try_recv().is_err());
    let source = Box::new(FileSource::new(template()).expect("source"));
    let body = super::thread::Body::new(Arc::clone(&shared), source, LazyConfig::default(), zero_pages);
    let thread = std::thread::spawn(move || body.run());
    assert_eq!(waiting.recv_timeout(SOON), Ok(tag(5 * PAGE)));
    shared.stop();
    thread.join().expect("join");
}

#[test]
fn what_was_given_back_never_comes_from_the_template_again() {
    if !possible("what was given back never comes again") {
        return;
    }
    for (backing, advice) in [(MemoryBacking::Private, libc::MADV_DONTNEED), (MemoryBacking::Shared, libc::MADV_REMOVE)]
    {
        let memory = memory(backing);
        let lazy = start_from_file(&memory, LazyConfig::default());
        // One page that was there, and one that never was.
        assert_eq!(read(&memory, 0), tag(0));
        give_back(&memory, 0, 2 * PAGE, advice);
        assert_eq!((read(&memory, 0), read(&memory, PAGE)), (0, 0));
        assert_eq!(read(&memory, 2 * PAGE), tag(2 * PAGE));
        assert_eq!(lazy.handle().metrics().removed_bytes.get(), 2 * PAGE);
        // Completing the memory does not bring it back either.
        give_back(&memory, 8 << 20, 16 * PAGE, advice);
        lazy.complete().expect("complete");
        for offset in (0..SIZE).step_by(4096) {
            let gone = offset < 2 * PAGE || (8 << 20..(8 << 20) + 16 * PAGE).contains(&offset);
            assert_eq!(read(&memory, offset), if gone { 0 } else { tag(offset) }, "{offset:#x}");
        }
    }
}

fn give_back(memory: &GuestMemory, offset: u64, length: u64, advice: libc::c_int) {
    let host = memory.get_host_address(GuestAddress(offset)).expect("address");
    // SAFETY: a range of guest memory, of which nobody holds a reference.
    let result = unsafe { libc::madvise(host.cast(), usize::try_from(length).expect("small"), advice) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

#[test]
fn asking_giving_back_and_bringing_ahead_at_a_time_end_well() {
    if !possible("asking, giving back and bringing ahead at a time") {
        return;
    }
    let mut set = WorkingSet::new(SIZE);
    assert!(set.push(0..SIZE));
    let memory = private();
    let lazy = start_from_file(&memory, LazyConfig { working_set: Some(set), record: true, ..LazyConfig::default() });
    std::thread::scope(|scope| {
        for first in 0..2_u64 {
            // Both ask for the same pages.
            let memory = &memory;
            scope.spawn(move || {
                for offset in (0..SIZE).step_by(4096).skip(usize::try_from(first).expect("small")) {
                    let found = read(memory, offset);
                    assert!(found == tag(offset) || found == 0, "{offset:#x}");
                }
            });
        }
        let memory = &memory;
        scope.spawn(move || {
            for offset in (0..SIZE).step_by(64 << 10) {
                give_back(memory, offset, 2 * PAGE, libc::MADV_DONTNEED);
                assert_eq!(read(memory, offset), 0);
            }
        });
    });
    lazy.complete().expect("complete");
    for offset in (0..SIZE).step_by(4096) {
        let gone = offset % (64 << 10) < 2 * PAGE;
        assert_eq!(read(&memory, offset), if gone { 0 } else { tag(offset) }, "{offset:#x}");
    }
}

#[test]
fn the_working_set_is_brought_in_its_order_and_recorded_again() {
    if !possible("the working set is brought in its order") {
        return;
    }
    let offsets = [9 * PAGE, 10 * PAGE, 3 * PAGE, (4 << 20) + PAGE, PAGE];
    let memory = private();
    let lazy = start_from_file(&memory, LazyConfig { record: true, ..LazyConfig::default() });
    for offset in offsets {
        read(&memory, offset);
    }
    let set = lazy.handle().working_set();
    let ranges: Vec<_> = set.ranges().map(|range| (range.start, range.end - range.start)).collect();
    assert_eq!(ranges, [(9 * PAGE, 2 * PAGE), (3 * PAGE, PAGE), ((4 << 20) + PAGE, PAGE), (PAGE, PAGE)]);
    drop(lazy);

    let memory = private();
    let (source, reads) = Told::new();
    let config = LazyConfig { working_set: Some(set.clone()), record: true, ..LazyConfig::default() };
    let lazy = start(&memory, source, config);
    for (offset, length) in ranges {
        assert_eq!(reads.recv_timeout(SOON), Ok((offset, usize::try_from(length).expect("small"))));
    }
    for offset in offsets {
        assert_eq!(read(&memory, offset), tag(offset));
    }
    let handle = lazy.handle();
    comes_to(|| handle.metrics().prefetched_bytes.get(), 5 * PAGE);
    assert_eq!(handle.metrics().working_set_misses.get(), 0);
    assert_eq!(handle.working_set(), set);
    // One more page is asked for: it comes after the others.
    read(&memory, 20 * PAGE);
    assert_eq!(handle.metrics().working_set_misses.get(), 1);
    assert!((handle.metrics().hit_ratio(PAGE) - 5.0 / 6.0).abs() < 1e-9);
    assert_eq!(handle.working_set().ranges().last(), Some(20 * PAGE..21 * PAGE));
}

#[test]
fn complete_memory_needs_nobody() {
    if !possible("complete memory needs nobody") {
        return;
    }
    for backing in [MemoryBacking::Private, MemoryBacking::Shared] {
        let memory = memory(backing);
        let lazy = start_from_file(&memory, LazyConfig::default());
        memory.write_obj(200_u8, GuestAddress(7 * PAGE)).expect("write");
        lazy.complete().expect("complete");
        lazy.complete().expect("again");
        lazy.stop();
        drop(lazy);
        for offset in (0..SIZE).step_by(4096) {
            assert_eq!(read(&memory, offset), if offset == 7 * PAGE { 200 } else { tag(offset) });
        }
    }
}

#[test]
fn the_rest_comes_in_the_background_where_that_is_wanted() {
    if !possible("the rest comes in the background") {
        return;
    }
    let memory = private();
    let fill = Fill::Background { bytes_per_second: u64::MAX };
    let lazy = start_from_file(&memory, LazyConfig { fill, ..LazyConfig::default() });
    read(&memory, 0);
    comes_to(|| lazy.handle().metrics().bytes_copied.get(), SIZE / 4);
}

#[test]
fn all_of_it_comes_though_nobody_asks_where_that_is_wanted() {
    if !possible("all of it comes") {
        return;
    }
    let memory = private();
    let fill = Fill::All { bytes_per_second: u64::MAX };
    let lazy = start_from_file(&memory, LazyConfig { fill, ..LazyConfig::default() });
    comes_to(|| u64::from(!lazy.shared.is_serving()), 1);
    assert_eq!(lazy.handle().metrics().faults.get(), 0);
    lazy.complete().expect("all is there");
}

#[test]
fn who_waits_for_lost_memory_goes_on_without_it() {
    if !possible("who waits for lost memory goes on") {
        return;
    }
    for panics in [false, true] {
        let memory = private();
        let (mut source, reads) = Told::new();
        let at = Some(8 * PAGE);
        (source.fails_at, source.panics_at) = if panics { (None, at) } else { (at, None) };
        let lazy = start_unconfined(&memory, source);
        let (sender, lost) = channel();
        lazy.on_loss(move |reason| sender.send(reason.to_owned()).expect("send")).expect("on loss");
        assert_eq!(read(&memory, 0), tag(0));
        let device = read_elsewhere(&memory, 8 * PAGE + 3);
        let reason = lost.recv_timeout(SOON).expect("lost");
        let expected = if panics {
            "The thread that serves page faults has ended"
        } else {
            "The template's memory cannot be read at 0x8000: Input/output error (os error 5)"
        };
        assert_eq!(reason, expected);
        assert_eq!(lazy.lost(), Some(reason.clone()));
        // What a device reads itself makes no sense; what it lets the kernel read is an error.
        assert_eq!(device.recv_timeout(SOON), Ok(POISON));
        assert_eq!(read(&memory, 0), POISON, "also where there was something");
        let file = tempfile::tempfile().expect("file");
        for offset in [PAGE, 9 * PAGE] {
            let host = memory.get_host_address(GuestAddress(offset)).expect("address");
            // SAFETY: a range of guest memory, which the kernel checks.
            let written = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&file), host.cast(), 512) };
            let error = io::Error::last_os_error();
            assert_eq!((written, error.raw_os_error()), (-1, Some(libc::EFAULT)));
        }
        assert!(matches!(lazy.complete(), Err(LazyError::Lost(it)) if it == reason));
        assert!(lazy.on_loss(|_| ()).is_err());
        assert!(reads.iter().count() >= 2);
        drop(lazy);
    }
}

#[test]
fn a_system_call_that_waits_for_lost_memory_fails() {
    if !possible("a system call that waits for lost memory fails") {
        return;
    }
    let memory = private();
    let (mut source, _reads) = Told::new();
    source.fails_at = Some(8 * PAGE);
    let lazy = start(&memory, source, LazyConfig::default());
    let file = tempfile::tempfile().expect("file");
    let host = memory.get_host_address(GuestAddress(8 * PAGE)).expect("address");
    // SAFETY: a range of guest memory, which the kernel checks.
    let written = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&file), host.cast(), 4096) };
    assert_eq!((written, io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EFAULT)));
    assert_eq!(file.metadata().expect("metadata").len(), 0, "no zeros were written");
    assert!(lazy.lost().is_some());
}

#[test]
fn who_gives_back_lost_memory_does_not_wait_for_ever() {
    if !possible("who gives back lost memory") {
        return;
    }
    let memory = private();
    let (mut source, _reads) = Told::new();
    source.panics_at = Some(8 * PAGE);
    let lazy = start_unconfined(&memory, source);
    let waiting = read_elsewhere(&memory, 8 * PAGE);
    for offset in (0..SIZE).step_by(64 << 10) {
        give_back(&memory, offset, PAGE, libc::MADV_DONTNEED);
    }
    assert_eq!(waiting.recv_timeout(SOON), Ok(POISON));
    drop(lazy);
}

#[test]
fn stopping_lets_everybody_go() {
    if !possible("stopping lets everybody go") {
        return;
    }
    let memory = private();
    let lazy = start_from_file(&memory, LazyConfig::default());
    assert_eq!(read(&memory, 0), tag(0));
    lazy.stop();
    lazy.stop();
    // Nobody does that to a machine that has ended; nobody waits for it either.
    assert_eq!(read(&memory, PAGE), 0);
    assert!(matches!(lazy.complete(), Err(LazyError::Stopped)));
}

#[test]
fn what_cannot_work_is_refused() {
    if !possible("what cannot work is refused") {
        return;
    }
    let refused = |memory: &GuestMemory, file: File| {
        let source = Box::new(FileSource::new(file).expect("source"));
        LazyMemory::start(memory, source, LazyConfig::default(), Confinement::On).err().expect("refused").to_string()
    };
    let short = tempfile::tempfile().expect("file");
    short.set_len(SIZE - PAGE).expect("length");
    let said = refused(&private(), short);
    assert_eq!(said, "The template has a memory of 33550336 bytes, the machine one of 33554432");
    // On a disk, and a file that is in use: its pages would hide those of the template.
    let file = tempfile::tempfile_in("/var/tmp").expect("file");
    let on_disk = memory(MemoryBacking::File { file: file.try_clone().expect("clone"), shared: true });
    let said = refused(&on_disk, template());
    assert!(said.contains("a file on a disk") || said.contains("not empty"), "{said}");
    let shared = memory(MemoryBacking::Shared);
    shared.write_obj(1_u8, GuestAddress(0)).expect("write");
    assert!(refused(&shared, template()).contains("not empty"));
}

#[test]
fn huge_pages_come_whole() {
    const HUGE: u64 = 2 << 20;
    if !possible("huge pages come whole") {
        return;
    }
    // SAFETY: the name is a C string; the call returns a new descriptor or an error.
    let fd =
        unsafe { libc::memfd_create(c"huge".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) };
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap_or_default();
    if fd < 0 || free.trim().parse::<u64>().unwrap_or_default() < SIZE / HUGE {
        println!(
            "skipped: huge pages come whole: the host has {} free huge pages, {} are needed",
            free.trim(),
            SIZE / HUGE
        );
        return;
    }
    // SAFETY: the kernel just made this descriptor and nobody else owns it.
    let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    let memory = memory(MemoryBacking::File { file, shared: true });
    let lazy = start_from_file(&memory, LazyConfig::default());
    assert_eq!(read(&memory, PAGE), tag(PAGE));
    assert_eq!(read(&memory, 300 * PAGE), tag(300 * PAGE));
    comes_to(|| lazy.handle().metrics().bytes_copied.get(), HUGE);
    give_back(&memory, 0, HUGE, libc::MADV_REMOVE);
    assert_eq!(read(&memory, PAGE), 0);
    lazy.complete().expect("complete");
    for offset in (HUGE..SIZE).step_by(4096) {
        assert_eq!(read(&memory, offset), tag(offset));
    }
}
