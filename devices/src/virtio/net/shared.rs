//! What the two halves of a network device and its owner share.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libc::EFD_CLOEXEC;
use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::Interrupt;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// What happened to frames since the device was made. With a back-end in the kernel everything
/// stays 0: nobody here sees a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetCounters {
    /// Frames given to the guest.
    pub received: u64,
    /// Frames for the guest that did not fit its buffers.
    pub receive_dropped: u64,
    /// Frames that the host took from the guest.
    pub sent: u64,
    /// Frames of the guest with a source address that is not its own.
    pub spoofed: u64,
    /// Other frames of the guest that were lost: of an impossible length, with a header that the
    /// host does not believe, or sent while the link was down.
    pub send_dropped: u64,
}

/// One of [`NetCounters`], while it counts.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add_one(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Default)]
pub struct Counters {
    pub received: Counter,
    pub receive_dropped: Counter,
    pub sent: Counter,
    pub spoofed: Counter,
    pub send_dropped: Counter,
}

pub struct Shared {
    /// The address in the configuration space, which a driver may change.
    mac: Mutex<Mac>,
    link_up: AtomicBool,
    announce: AtomicBool,
    /// Queue pairs that the driver uses (section 5.1.6.5.5).
    pairs: AtomicU16,
    pub counters: Counters,
    /// Readable when the link went up or down.
    wake: EventFd,
    /// Of the active device.
    interrupt: Mutex<Option<Interrupt>>,
}

impl Shared {
    pub fn new(mac: Mac) -> io::Result<Self> {
        Ok(Self {
            mac: Mutex::new(mac),
            link_up: AtomicBool::new(true),
            announce: AtomicBool::new(false),
            pairs: AtomicU16::new(1),
            counters: Counters::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            interrupt: Mutex::new(None),
        })
    }

    pub fn mac(&self) -> Mac {
        *lock(&self.mac)
    }

    pub fn set_mac(&self, mac: Mac) {
        *lock(&self.mac) = mac;
    }

    pub fn link_up(&self) -> bool {
        self.link_up.load(Ordering::Acquire)
    }

    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    pub fn pairs(&self) -> u16 {
        self.pairs.load(Ordering::Relaxed)
    }

    pub fn set_pairs(&self, pairs: u16) {
        self.pairs.store(pairs, Ordering::Relaxed);
    }

    /// The driver has announced itself.
    pub fn announced(&self) {
        self.announce.store(false, Ordering::Release);
    }

    /// `status` of the configuration space (section 5.1.4).
    pub fn status(&self) -> u16 {
        let bit = |on: &AtomicBool, bit: u32| if on.load(Ordering::Acquire) { bit } else { 0 };
        let status = bit(&self.link_up, VIRTIO_NET_S_LINK_UP) | bit(&self.announce, VIRTIO_NET_S_ANNOUNCE);
        u16::try_from(status).unwrap_or_default()
    }

    /// Changes of the configuration space are told through `interrupt` from now on.
    pub fn set_interrupt(&self, interrupt: Option<Interrupt>) {
        *lock(&self.interrupt) = interrupt;
        // What was asked for while nobody could be told.
        if self.announce.load(Ordering::Acquire) {
            self.config_changed();
        }
    }

    fn config_changed(&self) {
        if let Some(interrupt) = &*lock(&self.interrupt) {
            interrupt.config_changed();
        }
    }
}

/// Whoever owns a network device reaches it through this, from any thread.
#[derive(Clone)]
pub struct NetControl {
    shared: Arc<Shared>,
}

impl NetControl {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Plugs the cable in or pulls it out. While it is out nothing is received, what the host
    /// sends waits in the interface as far as its queue goes, and what the guest sends is lost.
    pub fn set_link(&self, up: bool) {
        if self.shared.link_up.swap(up, Ordering::AcqRel) != up {
            // A full counter is readable already.
            let _ = self.shared.wake.write(1);
            self.shared.config_changed();
        }
    }

    /// Asks the driver to tell its neighbours where it is now (section 5.1.6.5.4), as after a
    /// move to another host.
    pub fn announce(&self) {
        self.shared.announce.store(true, Ordering::Release);
        self.shared.config_changed();
    }

    /// The guest's address: the configured one, or what its driver made of it.
    pub fn mac(&self) -> [u8; 6] {
        self.shared.mac()
    }

    /// Queue pairs that the driver uses.
    pub fn queue_pairs(&self) -> u16 {
        self.shared.pairs()
    }

    /// What the driver reads as `status`.
    #[cfg(test)]
    pub(super) fn status(&self) -> u16 {
        self.shared.status()
    }

    /// What happened to frames so far.
    pub fn counters(&self) -> NetCounters {
        let counters = &self.shared.counters;
        NetCounters {
            received: counters.received.get(),
            receive_dropped: counters.receive_dropped.get(),
            sent: counters.sent.get(),
            spoofed: counters.spoofed.get(),
            send_dropped: counters.send_dropped.get(),
        }
    }
}

/// An address that one station can have: not a group's, and not nobody's.
pub fn is_station(mac: &Mac) -> bool {
    let [first, ..] = mac;
    first & 1 == 0 && *mac != [0; 6]
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values: no panic can leave them half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
