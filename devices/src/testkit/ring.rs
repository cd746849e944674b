//! The driver's side of a split virtqueue (virtio 1.2 section 2.7), without any manners.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::GuestMemory;
use crate::virtio::{ActiveQueue, WriteLog};

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device may write it (else it may read it).
    pub writable: bool,
}

impl Buffer {
    /// A buffer for the device to read.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, writable: false }
    }

    /// A buffer for the device to write.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, writable: true }
    }
}

/// A virtqueue as its driver sees it.
pub struct Ring {
    memory: GuestMemory,
    /// Entries.
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub avail: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    next_descriptor: u16,
    next_avail: u16,
    last_used: u16,
}

impl Ring {
    /// Bytes that a ring of the largest size of a test (1024 entries) takes at its address.
    pub const FOOTPRINT: u64 = 0x8000;

    /// An empty ring of `size` entries at `base`, which must be a multiple of 16 and have
    /// [`FOOTPRINT`](Self::FOOTPRINT) bytes of memory behind it.
    pub fn new(memory: &GuestMemory, base: u64, size: u16) -> Self {
        memory.write_slice(&[0; Self::FOOTPRINT as usize], GuestAddress(base)).unwrap();
        Self::with_parts(memory, size, base, base + 0x4000, base + 0x5000)
    }

    /// A ring whose three parts are anywhere, in memory or not.
    pub fn with_parts(memory: &GuestMemory, size: u16, descriptors: u64, avail: u64, used: u64) -> Self {
        Self { memory: memory.clone(), size, descriptors, avail, used, next_descriptor: 0, next_avail: 0, last_used: 0 }
    }

    /// The device's side of the ring, as a transport hands it over, and its kick.
    pub fn activate(&self) -> (ActiveQueue, EventFd) {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used)).unwrap();
        queue.set_ready(true);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        (ActiveQueue { queue, kick: kick.try_clone().unwrap(), writes: WriteLog::default() }, kick)
    }

    /// Writes one entry of the descriptor table.
    pub fn write_descriptor(&self, index: u16, addr: u64, len: u32, flags: u32, next: u16) {
        let descriptor = Descriptor::new(addr, len, flags as u16, next);
        let at = GuestAddress(self.descriptors + 16 * u64::from(index));
        self.memory.write_obj(descriptor, at).unwrap();
    }

    /// Writes the descriptors of a chain and returns its head, without making it available.
    pub fn write_chain(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor % self.size;
        for (position, buffer) in buffers.iter().enumerate() {
            let index = self.next_descriptor % self.size;
            self.next_descriptor = (index + 1) % self.size;
            let mut flags = if buffer.writable { VRING_DESC_F_WRITE } else { 0 };
            if position + 1 < buffers.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            self.write_descriptor(index, buffer.addr, buffer.len, flags, self.next_descriptor);
        }
        head
    }

    /// Makes the chain at `head` available; the device is not notified.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        self.memory.write_obj(head, GuestAddress(self.avail + 4 + 2 * slot)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_avail_idx(self.next_avail);
    }

    /// Makes a chain of `buffers` available and returns its head.
    pub fn offer(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.write_chain(buffers);
        self.publish(head);
        head
    }

    /// Sets `avail.idx` to any value.
    pub fn set_avail_idx(&self, idx: u16) {
        self.memory.store(idx, GuestAddress(self.avail + 2), Ordering::Release).unwrap();
    }

    /// Sets `avail.flags`.
    pub fn set_avail_flags(&self, flags: u16) {
        self.memory.store(flags, GuestAddress(self.avail), Ordering::Release).unwrap();
    }

    /// Sets `used_event`: after which used entry the driver wants an interrupt.
    pub fn set_used_event(&self, idx: u16) {
        let at = self.avail + 4 + 2 * u64::from(self.size);
        self.memory.store(idx, GuestAddress(at), Ordering::Release).unwrap();
    }

    /// Starts both indices of driver and device at `idx`, as after that many chains.
    pub fn start_at(&mut self, active: &mut ActiveQueue, idx: u16) {
        active.queue.set_next_avail(idx);
        active.queue.set_next_used(idx);
        self.go_to(idx);
    }

    /// Takes the driver's side to `idx`, as after that many chains.
    pub fn go_to(&mut self, idx: u16) {
        (self.next_avail, self.last_used) = (idx, idx);
        self.set_avail_idx(idx);
        self.memory.store(idx, GuestAddress(self.used + 2), Ordering::Release).unwrap();
    }

    /// `used.idx`.
    pub fn used_idx(&self) -> u16 {
        self.memory.load(GuestAddress(self.used + 2), Ordering::Acquire).unwrap()
    }

    /// `used.flags`.
    pub fn used_flags(&self) -> u16 {
        self.memory.load(GuestAddress(self.used), Ordering::Acquire).unwrap()
    }

    /// Whether the device wants to be notified of the chain that was just made available
    /// (section 2.7.7.1 and 2.7.10.1).
    pub fn wants_kick(&self, event_idx: bool) -> bool {
        fence(Ordering::SeqCst);
        if event_idx {
            let at = self.used + 4 + 8 * u64::from(self.size);
            let avail_event: u16 = self.memory.load(GuestAddress(at), Ordering::Acquire).unwrap();
            avail_event == self.next_avail.wrapping_sub(1)
        } else {
            self.used_flags() & 1 == 0
        }
    }

    /// The entries that the device used since the last call: head and length.
    pub fn take_used(&mut self) -> Vec<(u16, u32)> {
        let until = self.used_idx();
        let mut entries = Vec::new();
        while self.last_used != until {
            let slot = u64::from(self.last_used % self.size);
            let at = self.used + 4 + 8 * slot;
            let id: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
            entries.push((u16::try_from(id).unwrap(), len));
            self.last_used = self.last_used.wrapping_add(1);
        }
        entries
    }
}
