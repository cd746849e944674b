//! Drivers that play the guest in real guest memory, friendly and hostile.
//!
//! [`Guest`] is a machine with one device: memory with a hole in it, an event loop in a thread, a
//! transport, and the register dance that brings a device up. A [`Ring`] is the driver's side of a
//! virtqueue; it writes what a test asks for, valid or not.
//!
//! This is test code: it panics when the world is not as the test says.

#![allow(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

mod event_loop;
mod guest;
mod meanwhile;
mod ring;

use std::fs::File;
use std::os::fd::FromRawFd;
use std::time::{Duration, Instant};

use vm_memory::{FileOffset, GuestAddress};

use crate::GuestMemory;

pub use event_loop::ThreadLoop;
pub use guest::{Guest, Running};
pub use meanwhile::Meanwhile;
pub use ring::{Buffer, Ring};

/// Size of each of the two regions of a test guest's memory, in bytes.
pub const REGION_SIZE: u64 = 4 << 20;

/// Where the second region starts: there is a hole of [`REGION_SIZE`] bytes between the two.
pub const HIGH_REGION: u64 = 2 * REGION_SIZE;

/// How long a test waits for what must happen.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Guest memory in two regions with a hole between them, as a machine with an MMIO gap has it. Each is a file, which
/// another process can map.
pub fn memory() -> GuestMemory {
    let size = REGION_SIZE as usize;
    let region = |start| (GuestAddress(start), size, Some(FileOffset::new(memfd(), 0)));
    GuestMemory::from_ranges_with_files([region(0), region(HIGH_REGION)]).expect("Guest memory for a test")
}

fn memfd() -> File {
    // SAFETY: the name ends with a zero; the result is checked.
    let fd = unsafe { libc::memfd_create(c"test-memory".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "A memfd");
    // SAFETY: a system call just returned it as a new descriptor.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(REGION_SIZE).expect("Room for a region");
    file
}

/// Waits until `condition` holds.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen within {PATIENCE:?}");
        std::thread::sleep(Duration::from_micros(200));
    }
}
