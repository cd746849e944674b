//! What a machine tells about itself.

mod trace;

pub use trace::TracePoints;
