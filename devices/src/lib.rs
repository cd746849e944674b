//! What a guest sees besides its processors and memory: virtio devices over MMIO and the few
//! legacy devices that a Linux kernel without ACPI and PCI still wants.
//!
//! This crate knows guest memory, the virtio 1.2 specification and file descriptors. It does not
//! know KVM, threads' privileges or containers: whoever builds a machine hands it a guest memory,
//! an [`EventLoop`] and an event descriptor to interrupt with.

// A guest chooses nearly every number that this crate computes with.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_wrap,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]
// Tests choose their own numbers.
#![cfg_attr(test, allow(clippy::cast_possible_truncation, clippy::cast_sign_loss))]

pub mod bus;
pub mod event;
pub mod legacy;
#[cfg(any(test, feature = "testkit"))]
pub mod testkit;
pub mod virtio;

pub use bus::BusDevice;
pub use event::{ActiveHalf, EventLoop, Subscriber};

/// The guest's physical memory, as every device sees it.
///
/// One concrete type in the whole workspace: devices are not generic over it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
