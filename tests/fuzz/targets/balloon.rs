//! Pages, statistics and reports for the balloon (virtio 1.2 section 5.5.6).

#![no_main]

use arbitrary::Arbitrary;
use devices::testkit::REGION_SIZE;
use devices::testkit::memory;
use devices::virtio::balloon::{Balloon, BalloonConfig};
use inlay_fuzz::{Case, Request, play_with};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum BalloonRequest {
    Pages { deflate: bool, first: u32, count: u16, step: u8 },
    Stats(Vec<(u8, u64)>),
    Bytes(Vec<u8>),
}

impl Request for BalloonRequest {
    fn queue(&self) -> Option<u8> {
        match self {
            Self::Pages { deflate, .. } => Some((*deflate).into()),
            Self::Stats(_) => Some(2),
            Self::Bytes(_) => None,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Pages { first, count, step, .. } => (0..u32::from(*count % 1200))
                .flat_map(|index| first.wrapping_add(index * u32::from(*step)).to_le_bytes())
                .collect(),
            Self::Stats(stats) => stats
                .iter()
                .flat_map(|(tag, value)| [&u16::from(*tag).to_le_bytes()[..], &value.to_le_bytes()].concat())
                .collect(),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

fuzz_target!(|case: Case<BalloonRequest>| {
    let config = BalloonConfig {
        target: 1 << 20,
        deflate_on_oom: true,
        free_page_reporting: true,
        stats_interval: None,
    };
    let (balloon, handle) = Balloon::new(&config, 2 * REGION_SIZE).expect("A balloon");
    let host = move |said: &[u8]| {
        if let [pages, ..] = said {
            drop(handle.set_target(u64::from(*pages) << 14));
        }
    };
    play_with(Box::new(balloon), memory(), &case, Box::new(host));
});
