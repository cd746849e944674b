//! What is copied, and in which order, against a model of the kernel: writers that wait, and write as soon as they may.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use super::copier::{RUN, STEP};
use super::{AtRest, Contents, Copier, CopyError, Progress, Protection, layout};
use crate::config::MemoryConfig;
use crate::memory::lazy::pages::{Layout, Span};
use crate::memory::reserve;
use crate::memory::uffd::{Message, Uffd, Writes};

const PAGE: u64 = 4096;
const HOST: u64 = 0x10_0000_0000;
const OTHER: u64 = 0x20_0000_0000;
const FIRST: u64 = 1 << 20;
const SECOND: u64 = STEP + 3 * PAGE;
const LENGTH: u64 = FIRST + SECOND;
/// What a writer leaves in a page.
const WRITTEN: u8 = 0xff;

/// Memory of two mappings, each page with a byte of its own, and its writers.
struct Model {
    pages: RefCell<Vec<u8>>,
    /// Pages that do not exist: what is read there is no part of the snapshot.
    absent: Vec<u64>,
    protected: RefCell<Vec<bool>>,
    /// Writers that come one by one, each time somebody asks; and those that wait.
    coming: RefCell<VecDeque<u64>>,
    waiting: RefCell<Vec<u64>>,
    /// In which order pages were let go.
    lifted: RefCell<Vec<u64>>,
    fails: Cell<Option<usize>>,
}

fn index(page: u64) -> usize {
    usize::try_from(page).expect("small")
}

fn pages() -> u64 {
    LENGTH / PAGE
}

fn host(page: u64) -> u64 {
    let offset = page * PAGE;
    if offset < FIRST { HOST + offset } else { OTHER + offset - FIRST }
}

fn page_at(host: u64) -> u64 {
    (if host < OTHER { host - HOST } else { host - OTHER + FIRST }) / PAGE
}

fn byte(page: u64) -> u8 {
    u8::try_from(page % 200 + 1).expect("a byte")
}

impl Model {
    fn new(coming: Vec<u64>, absent: Vec<u64>) -> Rc<Self> {
        let count = index(pages());
        Rc::new(Self {
            pages: RefCell::new((0..pages()).map(byte).collect()),
            absent,
            protected: RefCell::new(vec![true; count]),
            coming: RefCell::new(coming.into()),
            waiting: RefCell::default(),
            lifted: RefCell::default(),
            fails: Cell::new(None),
        })
    }

    fn write(&self, page: u64) {
        self.pages.borrow_mut()[index(page)] = WRITTEN;
    }
}

#[derive(Clone)]
struct Kernel(Rc<Model>);

impl Writes for Kernel {
    fn read(&self, messages: &mut Vec<Message>) -> io::Result<()> {
        let Some(page) = self.0.coming.borrow_mut().pop_front() else { return Ok(()) };
        // Of a page that does not exist nobody is told.
        if self.0.protected.borrow()[index(page)] && !self.0.absent.contains(&page) {
            self.0.waiting.borrow_mut().push(page);
            messages.push(Message::Fault(host(page) + 5));
        } else {
            self.0.write(page);
        }
        Ok(())
    }

    fn lift(&self, start: u64, length: u64) -> io::Result<()> {
        for page in page_at(start)..page_at(start) + length / PAGE {
            self.0.protected.borrow_mut()[index(page)] = false;
            self.0.lifted.borrow_mut().push(page);
            let mut waiting = self.0.waiting.borrow_mut();
            if waiting.contains(&page) {
                waiting.retain(|other| *other != page);
                self.0.write(page);
            }
        }
        Ok(())
    }
}

impl Contents for Kernel {
    fn exists(&self, offset: u64) -> bool {
        !self.0.absent.contains(&(offset / PAGE))
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self.0.fails.get() {
            Some(0) => return Err(io::ErrorKind::Other.into()),
            left => self.0.fails.set(left.map(|left| left - 1)),
        }
        for (page, chunk) in (offset / PAGE..).zip(buffer.chunks_mut(4096)) {
            assert!(self.exists(page * PAGE), "page {page} has nothing to be read");
            chunk.fill(self.0.pages.borrow()[index(page)]);
        }
        Ok(())
    }
}

fn copier(model: &Rc<Model>) -> (Copier<Kernel, Kernel>, File, Arc<Progress>) {
    let spans = vec![Span { host: HOST, start: 0, length: FIRST }, Span { host: OTHER, start: FIRST, length: SECOND }];
    let layout = Arc::new(Layout::from_spans(spans, PAGE));
    let file = tempfile::tempfile().expect("file");
    file.set_len(LENGTH).expect("length");
    let progress = Arc::new(Progress::default());
    let kernel = || Kernel(Rc::clone(model));
    let copy = file.try_clone().expect("clone");
    (Copier::new(kernel(), kernel(), layout, copy, Arc::clone(&progress)), file, progress)
}

/// The file has what was there at first, whatever was written since; nobody waits, and nothing is protected.
fn is_the_moment(model: &Model, file: &File) {
    let mut bytes = vec![0; 4096];
    for page in 0..pages() {
        file.read_exact_at(&mut bytes, page * PAGE).expect("read");
        let expected = if model.absent.contains(&page) { 0 } else { byte(page) };
        assert!(bytes.iter().all(|byte| *byte == expected), "page {page}: {} for {expected}", bytes[0]);
    }
    assert!(model.waiting.borrow().is_empty());
    assert!(!model.protected.borrow().contains(&true));
}

#[test]
fn who_waits_comes_before_the_rest() {
    let last = pages() - 1;
    let model = Model::new(vec![last, 100], Vec::new());
    let (mut copier, file, progress) = copier(&model);
    assert!(copier.turn().expect("turn"));
    // The page with its neighbours, which end with the memory.
    let run = RUN / PAGE;
    let expected: Vec<_> = (last / run * run..pages()).collect();
    assert_eq!(*model.lifted.borrow(), expected);
    assert_eq!(model.pages.borrow()[index(last)], WRITTEN);
    assert!(copier.turn().expect("turn"));
    assert_eq!(model.lifted.borrow()[expected.len()..], (96..112).collect::<Vec<_>>());
    // Nobody waits: the rest in order.
    assert!(copier.turn().expect("turn"));
    assert_eq!(model.lifted.borrow()[expected.len() + 16..], (0..STEP / PAGE).collect::<Vec<_>>());
    copier.run().expect("run");
    is_the_moment(&model, &file);
    assert_eq!(progress.done.load(std::sync::atomic::Ordering::Relaxed), LENGTH);
    assert_eq!(progress.waits.load(std::sync::atomic::Ordering::Relaxed), 2);
}

#[test]
fn neighbours_are_not_looked_for_in_another_mapping() {
    // The last page of the first, and the first of the second.
    let border = FIRST / PAGE;
    let model = Model::new(vec![border - 1, border], Vec::new());
    let (mut copier, file, _) = copier(&model);
    copier.run().expect("run");
    is_the_moment(&model, &file);
}

#[test]
fn what_is_stopped_or_fails_ends_with_the_reason() {
    let model = Model::new(Vec::new(), Vec::new());
    let (mut first, _, progress) = copier(&model);
    assert!(first.turn().expect("turn"));
    progress.stop();
    assert!(matches!(first.run(), Err(CopyError::Stopped)));
    let model = Model::new(Vec::new(), Vec::new());
    model.fails.set(Some(1));
    let (mut second, _, _) = copier(&model);
    assert!(matches!(second.run(), Err(CopyError::Read(_))));
    // What could not be read stays protected: whoever waits must not go on before the descriptor is closed.
    assert!(model.protected.borrow().contains(&true));
}

proptest! {
    #[test]
    fn whatever_is_written_meanwhile_the_file_has_one_moment(
        coming in prop::collection::vec(0..pages(), 0..200),
        absent in prop::collection::vec(0..pages(), 0..100),
    ) {
        let model = Model::new(coming, absent);
        let (mut copier, file, _) = copier(&model);
        copier.run().expect("run");
        is_the_moment(&model, &file);
    }
}

/// Memory in pages of 2 MiB, which the kernel splits, and a part that nobody has touched, by the kernel of this machine.
#[test]
fn memory_in_large_pages_is_copied_as_it_was() {
    const SIZE: u64 = 64 << 20;
    const USED: u64 = 48 << 20;
    if let Err(error) = Uffd::open_for_writes() {
        println!("skipped: {error}");
        return;
    }
    let memory = reserve(&MemoryConfig::from_size(SIZE)).expect("reserve");
    let host = memory.get_host_address(GuestAddress(0)).expect("address");
    // SAFETY: the region is a mapping of that length, and the advice changes nothing that is in it.
    let advised = unsafe { libc::madvise(host.cast(), 64 << 20, libc::MADV_HUGEPAGE) };
    if advised != 0 {
        println!("this host has no large pages: small ones");
    }
    let write = |offset: u64, value: u64| memory.write_obj(value, GuestAddress(offset)).expect("write");
    (0..USED).step_by(4096).for_each(|offset| write(offset, offset + 1));
    let layout = layout(&memory).expect("layout");
    let protection = Protection::prepare(Arc::clone(&layout)).expect("prepare");
    let at_rest = AtRest::of(&memory).expect("at rest");
    protection.protect().expect("protect");
    let file = tempfile::tempfile().expect("file");
    file.set_len(SIZE).expect("length");
    let progress = Arc::new(Progress::default());
    let copy = file.try_clone().expect("clone");
    let mut copier = Copier::new(protection, at_rest, layout, copy, Arc::clone(&progress));
    std::thread::scope(|scope| {
        // From the end, where copying has not come to.
        let writer = scope.spawn(|| (0..SIZE / PAGE).rev().for_each(|page| write(page * PAGE, 7)));
        // It waits for a page, so that there is somebody to be served.
        while memory.read_obj::<u64>(GuestAddress(USED)).expect("read") == 0 {
            std::thread::yield_now();
        }
        copier.run().expect("run");
        drop(copier);
        writer.join().expect("join");
    });
    assert!(progress.waits.load(std::sync::atomic::Ordering::Relaxed) > 0);
    let mut bytes = [0; 8];
    for offset in (0..SIZE).step_by(4096) {
        file.read_exact_at(&mut bytes, offset).expect("read");
        assert_eq!(u64::from_le_bytes(bytes), if offset < USED { offset + 1 } else { 0 }, "{offset:#x}");
        assert_eq!(memory.read_obj::<u64>(GuestAddress(offset)).expect("read"), 7);
    }
}

/// Whoever waits goes on when the descriptor is dropped, as it is when a thread panics, and finds what was there.
#[test]
fn nobody_waits_for_a_copier_that_is_gone() {
    if let Err(error) = Uffd::open_for_writes() {
        println!("skipped: {error}");
        return;
    }
    let memory = reserve(&MemoryConfig::from_size(32 << 20)).expect("reserve");
    memory.write_obj(1_u32, GuestAddress(0x1000)).expect("write");
    let protection = Protection::prepare(layout(&memory).expect("layout")).expect("prepare");
    protection.protect().expect("protect");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| memory.write_obj(2_u32, GuestAddress(0x1004)).expect("write"));
        let mut messages = Vec::new();
        while messages.is_empty() {
            protection.read(&mut messages).expect("read");
        }
        assert!(!writer.is_finished());
        drop(protection);
        writer.join().expect("join");
    });
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1000)).expect("read"), 0x2_0000_0001);
}
