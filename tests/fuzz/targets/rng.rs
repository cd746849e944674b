//! What is asked of the entropy device (virtio 1.2 section 5.4.6).

#![no_main]

use devices::virtio::rate_limiter::RateLimits;
use devices::virtio::rng::Rng;
use inlay_fuzz::{Bytes, Case, play};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|case: Case<Bytes>| play(Box::new(Rng::new(RateLimits::default()).expect("A source")), &case));
