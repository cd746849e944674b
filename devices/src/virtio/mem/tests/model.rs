//! Any requests, against a set of block numbers.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn request() -> impl Strategy<Value = (u16, u64, u16)> {
    let kind = prop_oneof![4 => Just(PLUG), 4 => Just(UNPLUG), 1 => Just(UNPLUG_ALL), 2 => Just(STATE), 1 => 0..6_u16];
    (kind, 0..BLOCKS + 2, 0..10_u16)
}

fn runs(set: &BTreeSet<u64>) -> usize {
    set.iter().filter(|block| !set.contains(&(*block + 1))).count()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_books_are_those_of_a_set_of_blocks(
        requested in 0..=BLOCKS,
        requests in prop::collection::vec(request(), 1..60),
    ) {
        let (mut running, handle, memory) = start(requested);
        let mut model = BTreeSet::new();
        for (kind, at, count) in requests {
            let (answer, state) = ask_at(&mut running, kind, ADDR + at * BLOCK, count);
            let blocks: BTreeSet<u64> = (at..at + u64::from(count)).collect();
            let valid = count > 0 && at + u64::from(count) <= BLOCKS;
            let plugged = blocks.intersection(&model).count();
            let expected = match kind {
                UNPLUG_ALL => (ACK, 0),
                PLUG if valid && plugged == 0 => {
                    (if model.len() + blocks.len() > requested as usize { NACK } else { ACK }, 0)
                }
                UNPLUG if valid && plugged == blocks.len() => (ACK, 0),
                STATE if valid && plugged == blocks.len() => (ACK, PLUGGED),
                STATE if valid && plugged == 0 => (ACK, UNPLUGGED),
                STATE if valid => (ACK, MIXED),
                _ => (ERROR, 0),
            };
            prop_assert_eq!((answer, state), expected, "{} {} {}", kind, at, count);
            let calls = memory.take();
            match (kind, answer) {
                (PLUG, ACK) => model.extend(blocks),
                (UNPLUG, ACK) => model.retain(|block| !blocks.contains(block)),
                (UNPLUG_ALL, ACK) => model.clear(),
                _ => prop_assert!(calls.is_empty()),
            }
            prop_assert_eq!(handle.plugged(), model.len() as u64 * BLOCK);
        }
    }

    #[test]
    fn runs_are_counted_as_they_are(changes in prop::collection::vec((0..70_u64, 1..9_u64), 1..60)) {
        use super::super::blocks::{BlockState, Blocks};
        let mut blocks = Blocks::new(78);
        let mut model = BTreeSet::new();
        for (at, count) in changes {
            let range = at..at + count;
            let plug = match blocks.state(range.clone()) {
                BlockState::Mixed => continue,
                common => common == BlockState::Unplugged,
            };
            let after = blocks.runs_after(&range, plug);
            blocks.set(range.clone(), plug);
            if plug { model.extend(range) } else { model.retain(|block| !range.contains(block)) }
            prop_assert_eq!(after as usize, runs(&model));
            prop_assert_eq!(blocks.plugged(), model.len() as u64);
        }
    }
}
