//! What the host may ask of the guest as a whole.

mod clock;
mod cpu;
mod details;
mod memory;
mod random;

pub use clock::set_time;
pub use cpu::online;
pub use details::details;
pub use memory::clear_free_memory;
pub use random::reseed;
