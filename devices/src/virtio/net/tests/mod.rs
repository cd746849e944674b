//! Frames in both directions, and drivers that would rather not play along.
//!
//! [`wire`] plays the host with a socket pair and needs no privilege; [`interface`] uses a real
//! tap interface in a network namespace of its own.

mod control;
mod interface;
mod limits;
mod moving;
mod wire;
