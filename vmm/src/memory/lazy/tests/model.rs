//! A model of the kernel's side, for the orders in which things happen that the kernel of this machine does not show at will:
//! a page is asked for while a removal is announced, announced while pages are given, and not over when it was told.

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;

use proptest::prelude::*;

use super::super::fill::Filler;
use super::super::handler::{Handler, Next};
use super::super::pages::{Layout, Span};
use super::*;
use crate::memory::uffd::{Faults, Message, Placed};

const HOST: u64 = 0x7000_0000;
const PAGES: u64 = 24;

/// What is in a page of the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    Missing,
    Zeros,
    Of(u8),
}

/// How far a removal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The message has not been read: its thread waits.
    Announced,
    /// Read, but its thread has not run since: nothing is taken yet.
    Told,
    /// The thread runs again, and pages are taken; those of the range go in a moment.
    Going,
}

#[derive(Debug, Default)]
struct Kernel {
    pages: Vec<Page>,
    /// Who waits, and has not been told of.
    asked: VecDeque<u64>,
    waiting: BTreeSet<u64>,
    removals: VecDeque<(std::ops::Range<u64>, Step)>,
    /// Pages that a removal has emptied at some time.
    emptied: BTreeSet<u64>,
}

#[derive(Clone)]
struct Model(Rc<RefCell<Kernel>>);

impl Kernel {
    fn busy(&self) -> bool {
        self.removals.iter().any(|(_, step)| *step != Step::Going)
    }

    fn ask(&mut self, page: u64) {
        if self.page(page) == Page::Missing && self.waiting.insert(page) {
            self.asked.push_back(page);
        }
    }

    fn page(&self, page: u64) -> Page {
        self.pages[usize::try_from(page).expect("small")]
    }

    /// Lets the thread of the oldest removal that was told go one step on.
    fn go_on(&mut self) {
        let Some(index) = self.removals.iter().position(|(_, step)| *step != Step::Announced) else { return };
        let (range, step) = &mut self.removals[index];
        if *step == Step::Told {
            *step = Step::Going;
            return;
        }
        for page in range.clone() {
            self.pages[usize::try_from(page).expect("small")] = Page::Missing;
            self.emptied.insert(page);
        }
        self.removals.remove(index);
    }

    fn give(&mut self, to: u64, contents: Vec<Page>) -> Placed {
        if self.busy() {
            return Placed::Busy;
        }
        let first = (to - HOST) / PAGE;
        let length = contents.len();
        for (index, contents) in contents.into_iter().enumerate() {
            let page = first + index as u64;
            if self.page(page) != Page::Missing {
                return if index == 0 { Placed::Exists } else { Placed::Part(index as u64 * PAGE) };
            }
            self.pages[usize::try_from(page).expect("small")] = contents;
            self.waiting.remove(&page);
            // As the kernel does: who waited and was not told of yet is not told of any more.
            self.asked.retain(|asked| *asked != page);
        }
        assert!(length > 0, "nothing was given");
        Placed::All
    }
}

impl Faults for Model {
    fn read(&self, messages: &mut Vec<Message>) -> io::Result<()> {
        let mut kernel = self.0.borrow_mut();
        let kernel = &mut *kernel;
        // Faults first, whatever came first.
        messages.extend(kernel.asked.drain(..).map(|page| Message::Fault(HOST + page * PAGE)));
        for (range, step) in &mut kernel.removals {
            if *step == Step::Announced {
                *step = Step::Told;
                messages.push(Message::Removed(HOST + range.start * PAGE, HOST + range.end * PAGE));
            }
        }
        Ok(())
    }

    fn copy(&self, to: u64, contents: &[u8]) -> Placed {
        let pages = contents.chunks(4096).map(|page| if page[0] == 0 { Page::Zeros } else { Page::Of(page[0]) });
        self.0.borrow_mut().give(to, pages.collect())
    }

    fn zero(&self, to: u64, length: u64) -> Placed {
        self.0.borrow_mut().give(to, vec![Page::Zeros; usize::try_from(length / PAGE).expect("small")])
    }

    fn wake(&self, start: u64, _: u64) {
        let mut kernel = self.0.borrow_mut();
        let page = (start - HOST) / PAGE;
        if kernel.page(page) != Page::Missing {
            kernel.waiting.remove(&page);
        }
    }
}

/// Every third page is zeros, some of which are holes.
#[derive(Debug)]
struct Pattern;

impl Pattern {
    fn of(page: u64) -> u8 {
        if page.is_multiple_of(3) { 0 } else { u8::try_from(page + 1).expect("small") }
    }
}

impl Source for Pattern {
    fn length(&self) -> u64 {
        PAGES * PAGE
    }

    fn run(&self, offset: u64) -> Run {
        let hole = offset >= 20 * PAGE;
        Run { zeros: hole, end: if hole { PAGES * PAGE } else { 20 * PAGE } }
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        for (index, page) in buffer.chunks_mut(4096).enumerate() {
            page.fill(Self::of(offset / PAGE + index as u64));
        }
        Ok(())
    }
}

fn expected(page: u64) -> Page {
    match Pattern::of(page) {
        _ if page >= 20 => Page::Zeros,
        0 => Page::Zeros,
        byte => Page::Of(byte),
    }
}

#[derive(Debug, Clone)]
enum Event {
    Ask(u64),
    Remove(u64, u64),
    GoOn,
    Turn,
    Complete,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0..PAGES).prop_map(Event::Ask),
        2 => (0..PAGES, 1..6_u64).prop_map(|(first, count)| Event::Remove(first, (first + count).min(PAGES))),
        4 => Just(Event::GoOn),
        6 => Just(Event::Turn),
        1 => Just(Event::Complete),
    ]
}

fn start(set: bool) -> (Rc<RefCell<Kernel>>, Arc<Record>, Handler<Model>) {
    let kernel = Kernel { pages: vec![Page::Missing; usize::try_from(PAGES).expect("small")], ..Kernel::default() };
    let kernel = Rc::new(RefCell::new(kernel));
    let spans = vec![
        Span { host: HOST, start: 0, length: 10 * PAGE },
        Span { host: HOST + 10 * PAGE, start: 10 * PAGE, length: (PAGES - 10) * PAGE },
    ];
    let layout = Layout::from_spans(spans, PAGE);
    let set = set.then(|| {
        let mut set = WorkingSet::new(PAGES * PAGE);
        assert!(set.push(12 * PAGE..PAGES * PAGE) && set.push(2 * PAGE..9 * PAGE));
        set
    });
    let record = Arc::new(Record::new(&layout, set.clone()));
    let model = Model(Rc::clone(&kernel));
    let filler = Filler::new(model, Arc::new(layout), Box::new(Pattern), true, Arc::clone(&record));
    let handler = Handler::new(filler, Arc::clone(&record), set.as_ref(), true, Fill::Off);
    (kernel, record, handler)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_order_everybody_is_served_and_nothing_comes_back(
        set in any::<bool>(),
        events in proptest::collection::vec(event(), 0..80),
    ) {
        let (kernel, record, mut handler) = start(set);
        let mut done = false;
        let mut turn = || {
            // Its thread has ended, and the memory is not registered any more.
            if !done {
                done = handler.turn().expect("a good source") == Next::Done;
            }
            done
        };
        for event in events {
            match event {
                Event::Ask(page) => kernel.borrow_mut().ask(page),
                Event::Remove(first, end) => {
                    kernel.borrow_mut().removals.push_back((first..end, Step::Announced));
                }
                Event::GoOn => kernel.borrow_mut().go_on(),
                Event::Turn => {
                    if turn() {
                        break;
                    }
                }
                Event::Complete => record.completion_wanted.store(true, Ordering::Release),
            }
        }
        // Everything comes to its end: nobody may be left waiting.
        for _ in 0..500 {
            if turn() {
                break;
            }
            kernel.borrow_mut().go_on();
        }
        let was_completed = record.completion_wanted.load(Ordering::Acquire);
        let recorded = record.recorded.lock().expect("no panic").encode().expect("encode");
        prop_assert!(WorkingSet::decode(&recorded).is_ok(), "a page was recorded twice");
        let kernel = kernel.borrow();
        prop_assert!(done || kernel.removals.is_empty());
        if !done {
            prop_assert!(kernel.waiting.is_empty(), "{:?}", kernel.waiting);
            prop_assert!(!was_completed);
        }
        for page in 0..PAGES {
            let (found, emptied) = (kernel.page(page), kernel.emptied.contains(&page));
            // Given back, asked for again: zeros, whatever the template has. Never given back: what the template has.
            let right = found == Page::Missing || if emptied { found == Page::Zeros } else { found == expected(page) || found == Page::Zeros };
            prop_assert!(right, "page {page}: {found:?}");
            let announced = kernel.removals.iter().any(|(range, _)| range.contains(&page));
            if !emptied && !announced && found == Page::Zeros {
                prop_assert_eq!(expected(page), Page::Zeros);
            }
            if done && !emptied && !announced {
                prop_assert_eq!(found, expected(page));
            }
        }
    }
}

#[test]
fn a_page_that_is_given_back_while_it_is_asked_for_is_zeros() {
    let (kernel, _record, mut handler) = start(false);
    kernel.borrow_mut().ask(1);
    kernel.borrow_mut().removals.push_back((1..2, Step::Announced));
    // Told of both, and the kernel takes nothing: the thread of the removal has not run yet.
    assert!(matches!(handler.turn().expect("turn"), Next::Wait(Some(_))));
    assert_eq!(kernel.borrow().page(1), Page::Missing);
    kernel.borrow_mut().go_on();
    // It runs, but has not emptied the range: what is given now goes with it.
    assert!(matches!(handler.turn().expect("turn"), Next::Wait(None)));
    assert_eq!(kernel.borrow().page(1), Page::Zeros);
    kernel.borrow_mut().go_on();
    kernel.borrow_mut().ask(1);
    assert!(matches!(handler.turn().expect("turn"), Next::Wait(None)));
    assert_eq!(kernel.borrow().page(1), Page::Zeros);
}

#[test]
fn two_who_ask_for_one_page_are_both_served() {
    let (kernel, record, mut handler) = start(false);
    kernel.borrow_mut().ask(4);
    kernel.borrow_mut().asked.push_back(4);
    handler.turn().expect("turn");
    assert_eq!((kernel.borrow().page(4), record.metrics.faults.get()), (Page::Of(5), 2));
}
