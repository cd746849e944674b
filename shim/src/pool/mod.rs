//! Sandboxes that are restored before anybody asks for them.
//!
//! ```text
//! inlay pool keep ─▶ slot ─▶ helper, confinement, machine restored and asleep ─▶ waits
//!                                                                                  │ claim: socket, bundle, names
//! containerd ── start ──▶ claims a spare, or starts a shim; has the slot filled ───┘
//!                                                     spare: serves as the shim of that sandbox
//! ```
//!
//! | file | what |
//! | --- | --- |
//! | `slot` | a place in the pool: who fills it, where it listens |
//! | `claim` | what `start` says to a spare, and the answer |
//! | `spare` | what a spare has that a sandbox needs |
//! | `keep` | the process that fills a slot and waits |
//! | `refill` | having free slots filled, once the start under way is over |

mod claim;
mod keep;
mod refill;
mod slot;
mod spare;

pub use claim::{Claim, claim};
pub use keep::keep;
pub use refill::{Refill, fill, has_a_pool, take_sign};
pub use slot::{drain, occupants};
pub use spare::Spare;
