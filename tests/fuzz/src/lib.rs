//! Drivers that say what a fuzzer makes up, in real guest memory. `targets/` has one program for each thing that is
//! listened to; each says what a [`Request`] of its own looks like, or takes bytes as they come.

mod driver;
mod event_loop;
mod nobody;
mod writing;

pub use driver::{Bytes, Case, Host, Request, play, play_with};
pub use event_loop::SteppedLoop;
pub use nobody::{become_nobody, leave_network};
pub use writing::write_only_below;
