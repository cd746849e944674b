//! What differs from one processor architecture to another. One so far.

pub mod x86_64;
