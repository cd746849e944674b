//! Backends that want to harm their frontend, or make it wait for ever.

use proptest::prelude::*;

use super::scripted::{answer, header};
use super::*;
use crate::testkit::eventually;

/// What is asked before the driver comes.
const QUESTIONS: [u32; 4] = [GET_FEATURES, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_CONFIG];

/// What is told when it has come; each is acknowledged.
const ORDERS: [u32; 8] = [
    SET_FEATURES,
    SET_MEM_TABLE,
    SET_VRING_NUM,
    SET_VRING_BASE,
    SET_VRING_ADDR,
    SET_VRING_CALL,
    SET_VRING_KICK,
    SET_VRING_ENABLE,
];

type React = fn(&Message) -> Reaction;

/// Ways to do wrong that fit every message.
const WRONGS: [(&str, React); 9] = [
    ("silence", |_| Reaction::Silence),
    ("hang up", |_| Reaction::RawAndHangUp(Vec::new())),
    ("half a header and silence", |_| Reaction::Raw(vec![1; 5])),
    ("half an answer and hang up", |message| Reaction::RawAndHangUp(answer(message, &[0; 8])[..15].to_vec())),
    ("another request's answer", |_| Reaction::Raw([header(4, 5, 8), vec![0; 8]].concat())),
    ("no request's answer", |_| Reaction::Raw([header(u32::MAX, 5, 8), vec![0; 8]].concat())),
    ("an answer that is a request", |message| Reaction::Raw([header(message.request, 1, 8), vec![0; 8]].concat())),
    ("an answer as long as memory", |message| {
        Reaction::Raw([header(message.request, 5, u32::MAX), vec![0; 8]].concat())
    }),
    ("another version", |message| Reaction::Raw([header(message.request, 6, 8), vec![0; 8]].concat())),
];

fn wrong_at(request: u32, wrong: React) -> Script {
    Script::reacting(move |message| if message.request == request { wrong(message) } else { Reaction::Friendly })
}

#[test]
fn questions_that_are_answered_wrong_make_no_device_and_no_wait() {
    for request in QUESTIONS {
        for (what, wrong) in WRONGS {
            let backend = Backend::new(wrong_at(request, wrong));
            let mut config = blk(&backend.socket());
            config.patience.answers = Duration::from_millis(30);
            let made = make(config).map(drop);
            assert!(matches!(made, Err(VhostUserError::Backend { .. })), "{what} at {request}: {made:?}");
        }
    }
}

#[test]
fn orders_that_are_answered_wrong_cost_the_device_alone() {
    for request in ORDERS {
        for (what, wrong) in WRONGS {
            let backend = Backend::new(wrong_at(request, wrong));
            let running = start_impatient(blk(&backend.socket()));
            eventually("The device gives up", || running.guest.status() & NEEDS_RESET != 0);
            assert_eq!(running.guest.set_status(0), 0, "{what} at {request}");
        }
    }
}

#[test]
fn a_silent_backend_holds_up_nobody_else_on_the_loop() {
    let backend = Backend::new(wrong_at(SET_MEM_TABLE, |_| Reaction::Silence));
    let running = start(&backend);
    eventually("The frontend waits", || backend.count(0, SET_MEM_TABLE) == 1);
    // What would end the wait is an event of the same loop.
    running.guest.event_loop.settle();
    assert_eq!(running.guest.status() & NEEDS_RESET, 0);
    backend.hang_up();
}

#[test]
fn descriptors_that_nobody_asked_for_are_not_taken() {
    for request in QUESTIONS {
        let backend = Backend::new(wrong_at(request, |message| match message.request {
            GET_CONFIG => Reaction::AnswerWithFile([&message.body[..12], &[0; 60]].concat()),
            _ => Reaction::AnswerWithFile(u64::MAX.to_le_bytes().to_vec()),
        }));
        let made = make(blk(&backend.socket())).map(drop);
        let Err(VhostUserError::Backend { source: SessionError::Call { .. }, .. }) = made else {
            panic!("{request}: {made:?}");
        };
    }
}

#[test]
fn a_refused_order_is_not_taken_for_done() {
    let script = wrong_at(SET_MEM_TABLE, |_| Reaction::Answer(1_u64.to_le_bytes().to_vec()));
    let backend = Backend::new(script);
    let running = start_impatient(blk(&backend.socket()));
    eventually("The device gives up", || running.guest.status() & NEEDS_RESET != 0);
}

#[test]
fn a_reset_does_not_wait_for_a_backend_that_does_not_stop() {
    for (what, wrong) in WRONGS {
        let backend = Backend::new(wrong_at(GET_VRING_BASE, wrong));
        let mut config = blk(&backend.socket());
        config.patience.answers = Duration::from_millis(500);
        let running = start_with(config);
        backend.wait_enabled(0);
        assert_eq!(running.guest.set_status(0), 0, "{what}");
        // The connection is not trusted any more.
        let _running = running.guest.start(FLUSH);
        backend.wait_enabled(1);
    }
}

#[test]
fn what_a_backend_says_it_is_must_be_enough() {
    let make = |script: Script| {
        let backend = Backend::new(script);
        make(VhostUserConfig { num_queues: 2, ..blk(&backend.socket()) }).map(drop)
    };
    let lacking =
        |script| matches!(make(script), Err(VhostUserError::Backend { source: SessionError::Lacking { .. }, .. }));
    assert!(lacking(Script { features: PROTOCOL | FLUSH, ..Script::default() }));
    assert!(lacking(Script { features: 1 << VIRTIO_F_VERSION_1, ..Script::default() }));
    assert!(lacking(Script { protocol: REPLY_ACK, ..Script::default() }));
    for queues in [0, 1] {
        let made = make(Script { queues, ..Script::default() });
        assert!(matches!(made, Err(VhostUserError::Backend { source: SessionError::Queues { .. }, .. })), "{queues}");
    }
    assert!(make(Script { queues: 2, ..Script::default() }).is_ok());
    assert!(make(Script { queues: u64::MAX, ..Script::default() }).is_err());
    // All features of the protocol that there may ever be: those that are not known are not used.
    assert!(make(Script { protocol: u64::MAX, ..Script::default() }).is_ok());
}

#[test]
fn configuration_spaces_of_other_sizes() {
    for size in [0, 1, 59, 61, 256, 4096] {
        let react = move |message: &Message| {
            if message.request != GET_CONFIG {
                return Reaction::Friendly;
            }
            let mut body = message.body[..12].to_vec();
            body[4..8].copy_from_slice(&(size as u32).to_le_bytes());
            body.resize(12 + size, 7);
            Reaction::Answer(body)
        };
        let backend = Backend::new(Script::reacting(react));
        let mut config = blk(&backend.socket());
        config.patience.answers = Duration::from_millis(30);
        assert!(make(config).is_err(), "{size}");
    }
}

#[test]
fn features_that_are_withdrawn_by_the_next_backend() {
    let script = Script::reacting(|message| {
        if message.connection == 0 || message.request != GET_FEATURES {
            return Reaction::Friendly;
        }
        Reaction::Answer((1 << VIRTIO_F_VERSION_1 | PROTOCOL).to_le_bytes().to_vec())
    });
    let backend = Backend::new(script);
    let patience = Patience { absence: Duration::from_millis(50), ..PATIENCE };
    let running = start_with(VhostUserConfig { patience, ..blk(&backend.socket()) });
    backend.wait_enabled(0);
    backend.hang_up();
    running.guest.wait_needs_reset();
    assert_eq!(backend.count(1, SET_MEM_TABLE), 0, "Memory is not given to a backend that is of no use");
}

#[test]
fn a_backend_that_speaks_unasked_is_left() {
    let backend = Backend::new(Script::default());
    let running = start(&backend);
    backend.wait_enabled(0);
    eventually("The connection is up", || running.guest.take_interrupt() != 0);
    backend.blurt(&header(GET_FEATURES, 5, 8));
    backend.wait_enabled(1);
    assert_eq!(running.guest.status() & NEEDS_RESET, 0);
}

#[test]
fn a_backend_that_hangs_up_again_and_again_is_given_up() {
    let backend = Backend::new(wrong_at(SET_VRING_ENABLE, |message| {
        Reaction::RawAndHangUp(answer(message, &0_u64.to_le_bytes()))
    }));
    let mut config = blk(&backend.socket());
    config.patience.longest_retry = Duration::from_secs(10);
    config.patience.absence = Duration::from_millis(200);
    let running = Guest::new(Box::new(make(config).unwrap())).bring_up(FLUSH, |_, _| ());
    eventually("The device gives up", || running.guest.status() & NEEDS_RESET != 0);
    // Its pauses doubled from one attempt to the next: 1 ms to 256 ms, and the 200 ms are over.
    let connections = backend.log.lock().unwrap().iter().map(|message| message.connection).max().unwrap();
    assert!(connections <= 9, "{connections}");
}

#[test]
fn a_base_that_cannot_be_is_not_believed() {
    use virtio_queue::QueueT;
    let guest = Guest::new(Box::new(make(blk(&Backend::new(Script::default()).socket())).unwrap()));
    let ring = guest.ring(0, 16);
    let (mut active, _) = ring.activate();
    for (told, expected) in [(None, 0), (Some(0), 0), (Some(16), 16), (Some(17), 0), (Some(u16::MAX), 0)] {
        super::super::rings::settle(&guest.memory, &mut active.queue, told).unwrap();
        assert_eq!((active.queue.next_used(), active.queue.next_avail()), (0, expected), "{told:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_as_answers(
        request in prop::sample::select([QUESTIONS.as_slice(), ORDERS.as_slice()].concat()),
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        plausible in any::<bool>(),
    ) {
        let react = move |message: &Message| {
            if message.request != request {
                return Reaction::Friendly;
            }
            Reaction::RawAndHangUp(if plausible { answer(message, &bytes) } else { bytes.clone() })
        };
        let backend = Backend::new(Script::reacting(react));
        let mut config = blk(&backend.socket());
        config.patience.answers = Duration::from_millis(50);
        config.patience.absence = Duration::from_millis(5);
        if let Ok(device) = make(config) {
            let features = device.features() & FLUSH;
            let running = Guest::new(Box::new(device)).bring_up(features, |_, _| ());
            running.guest.set_status(0);
        }
    }
}
