//! A driver that is mostly right: it brings the device up and offers requests that the device understands, and now and
//! then it bends a descriptor, an index or a register.

use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::testkit::{Buffer, HIGH_REGION, Ring, memory};
use devices::virtio::{Interrupt, MmioTransport, TransportState, VirtioDevice};
use devices::{BusDevice, GuestMemory};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::SteppedLoop;

/// Steps of one input: what more would find, another input finds sooner.
const MAX_STEPS: usize = 48;

/// Rings that get memory of their own, and are ever notified.
const MAX_RINGS: u32 = 34;

/// Where what the driver says is put, and where the answers go. A slot is larger than what is usually said.
const SAID: u64 = 0x10_0000;
const ANSWERS: u64 = 0x20_0000;
const SLOT: u64 = 0x4000;

/// Status values on the way up (virtio 1.2 section 3.1.1).
const WAY_UP: [u32; 4] = [1, 3, 0xb, 0xf];

/// What a driver says in the part of a chain that the device reads.
pub trait Request: for<'a> Arbitrary<'a> {
    /// The queue that it belongs to, if only one makes sense.
    fn queue(&self) -> Option<u8> {
        None
    }

    /// What is said.
    fn bytes(&self) -> Vec<u8>;
}

/// Anything.
#[derive(Arbitrary, Debug)]
pub struct Bytes(Vec<u8>);

impl Request for Bytes {
    fn bytes(&self) -> Vec<u8> {
        self.0.clone()
    }
}

/// What happens to a device.
#[derive(Arbitrary, Debug)]
pub struct Case<R> {
    features: u64,
    steps: Vec<Step<R>>,
}

#[derive(Arbitrary, Debug)]
enum Step<R> {
    /// A chain, as a driver builds it.
    Offer {
        queue: u8,
        request: R,
        cuts: [u8; 2],
        answers: Vec<Answer>,
        bend: Option<Bend>,
    },
    /// The driver notifies, and the device works until it rests.
    Kick {
        queue: u8,
    },
    /// Any descriptor.
    Descriptor {
        queue: u8,
        index: u8,
        addr: Place,
        len: Len,
        flags: u8,
        next: u16,
    },
    /// Any chain.
    Publish {
        queue: u8,
        head: u16,
    },
    /// Fields of the driver's area.
    AvailIdx {
        queue: u8,
        idx: u16,
    },
    AvailFlags {
        queue: u8,
        flags: u16,
    },
    UsedEvent {
        queue: u8,
        idx: u16,
    },
    /// Memory, wherever.
    Poke {
        addr: Place,
        bytes: Vec<u8>,
    },
    /// A register, with sense or without.
    Register {
        index: u8,
        value: u32,
    },
    /// Any access to the window.
    Write {
        offset: u16,
        bytes: [u8; 8],
        len: u8,
    },
    Read {
        offset: u16,
        len: u8,
    },
    /// The machine pauses and goes on.
    Park,
    /// The state is taken and given to the device, as it is or bent.
    Restore {
        bend: Option<StateBend>,
    },
    /// The driver begins anew.
    Restart {
        features: u64,
    },
    /// The host does something.
    Host {
        bytes: Vec<u8>,
    },
}

#[derive(Arbitrary, Debug)]
struct Answer {
    place: Option<Place>,
    len: Len,
}

/// A length that means something more often than not.
#[derive(Arbitrary, Debug)]
enum Len {
    Byte(u8),
    Half(u16),
    Page,
    Sector,
    Any(u32),
}

impl Len {
    fn get(&self) -> u32 {
        match *self {
            Self::Byte(len) => len.into(),
            Self::Half(len) => len.into(),
            Self::Page => 4096,
            Self::Sector => 512,
            Self::Any(len) => len,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Place {
    Said(u8),
    Answers(u8),
    /// Across the edge of the first region.
    Edge(u8),
    /// In the rings themselves.
    Rings(u16),
    Any(u64),
}

impl Place {
    fn get(&self) -> u64 {
        match *self {
            Self::Said(slot) => SAID + u64::from(slot) * 16,
            Self::Answers(slot) => ANSWERS + u64::from(slot) * SLOT,
            Self::Edge(before) => devices::testkit::REGION_SIZE - u64::from(before),
            Self::Rings(offset) => HIGH_REGION + u64::from(offset),
            Self::Any(addr) => addr,
        }
    }
}

#[derive(Arbitrary, Debug)]
struct Bend {
    descriptor: u8,
    addr: Option<Place>,
    len: Option<Len>,
    writable: bool,
}

#[derive(Arbitrary, Debug)]
enum StateBend {
    Status(u32),
    Features(u64),
    Sizes(u8, u32),
    Addresses(u8, u64, u64, u64),
    Places(u8, u16, u16),
    Fewer,
    NotReady(u8),
}

impl StateBend {
    fn bend(&self, state: &mut TransportState) {
        let count = state.queues.len().max(1);
        let queues = &mut state.queues;
        match *self {
            Self::Status(status) => state.status = status,
            Self::Features(features) => state.driver_features = features,
            Self::Fewer => drop(queues.pop()),
            Self::Sizes(index, size) => {
                queues.get_mut(usize::from(index) % count).into_iter().for_each(|queue| queue.size = size);
            }
            Self::NotReady(index) => {
                queues.get_mut(usize::from(index) % count).into_iter().for_each(|queue| queue.ready ^= true);
            }
            Self::Addresses(index, descriptors, avail, used) => {
                if let Some(queue) = queues.get_mut(usize::from(index) % count) {
                    (queue.descriptors, queue.avail, queue.used) = (descriptors, avail, used);
                }
            }
            Self::Places(index, next_avail, next_used) => {
                if let Some(queue) = queues.get_mut(usize::from(index) % count) {
                    (queue.next_avail, queue.next_used) = (next_avail, next_used);
                }
            }
        }
    }
}

/// What the host does to the device when the input says so.
pub type Host = Box<dyn FnMut(&[u8])>;

/// Plays `case` against `device`.
pub fn play<R: Request>(device: Box<dyn VirtioDevice>, case: &Case<R>) {
    play_with(device, memory(), case, Box::new(|_| {}));
}

/// Plays `case` against `device`, in a memory that is there already, beside a host that does something.
pub fn play_with<R: Request>(device: Box<dyn VirtioDevice>, memory: GuestMemory, case: &Case<R>, mut host: Host) {
    let mut driver = Driver::new(device, memory);
    driver.bring_up(case.features);
    for step in case.steps.iter().take(MAX_STEPS) {
        match step {
            Step::Host { bytes } => host(bytes),
            step => driver.step(step),
        }
        driver.event_loop.settle();
    }
    driver.transport.reset();
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0, "A reset always works");
}

struct Driver {
    /// Dropped before the loop that its active half is on.
    transport: MmioTransport,
    event_loop: Arc<SteppedLoop>,
    memory: GuestMemory,
    rings: Vec<Ring>,
    slot: u64,
}

impl Driver {
    fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        let event_loop = Arc::new(SteppedLoop::new());
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).expect("An event"));
        let transport = MmioTransport::new(device, memory.clone(), event_loop.clone(), interrupt).expect("A transport");
        Self { transport, event_loop, memory, rings: Vec::new(), slot: 0 }
    }

    fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    /// The way up, with those of the features that the device has.
    fn bring_up(&mut self, features: u64) {
        self.write(VIRTIO_MMIO_STATUS, WAY_UP[0]);
        self.write(VIRTIO_MMIO_STATUS, WAY_UP[1]);
        for select in 0..2 {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            let wanted = ((features | 1 << VIRTIO_F_VERSION_1) >> (32 * select)) as u32;
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, wanted & self.read(VIRTIO_MMIO_DEVICE_FEATURES));
        }
        self.write(VIRTIO_MMIO_STATUS, WAY_UP[2]);
        self.rings.clear();
        for index in 0..MAX_RINGS {
            self.write(VIRTIO_MMIO_QUEUE_SEL, index);
            let Ok(size @ 1..) = u16::try_from(self.read(VIRTIO_MMIO_QUEUE_NUM_MAX)) else { break };
            let ring = Ring::new(&self.memory, HIGH_REGION + u64::from(index) * Ring::FOOTPRINT, size);
            self.write(VIRTIO_MMIO_QUEUE_NUM, size.into());
            for (low, addr) in [
                (VIRTIO_MMIO_QUEUE_DESC_LOW, ring.descriptors),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring.avail),
                (VIRTIO_MMIO_QUEUE_USED_LOW, ring.used),
            ] {
                self.write(low, addr as u32);
                self.write(low + 4, (addr >> 32) as u32);
            }
            self.write(VIRTIO_MMIO_QUEUE_READY, 1);
            self.rings.push(ring);
        }
        self.write(VIRTIO_MMIO_STATUS, WAY_UP[3]);
    }

    fn ring(&mut self, queue: u8) -> Option<&mut Ring> {
        let count = self.rings.len().max(1);
        self.rings.get_mut(usize::from(queue) % count)
    }

    fn poke(&self, addr: u64, bytes: &[u8]) {
        // Not everywhere is memory.
        let _ = self.memory.write_slice(bytes, GuestAddress(addr));
    }

    fn offer(&mut self, queue: u8, said: &[u8], cuts: &[u8; 2], answers: &[Answer], bend: Option<&Bend>) {
        let mut buffers = Vec::new();
        let mut rest = said;
        for cut in cuts {
            let (piece, tail) = rest.split_at(rest.len().min(usize::from(*cut)));
            rest = tail;
            buffers.extend(self.say(piece));
        }
        buffers.extend(self.say(rest));
        for answer in answers.iter().take(8) {
            self.slot = (self.slot + 1) % 64;
            let addr = answer.place.as_ref().map_or(ANSWERS + self.slot * SLOT, Place::get);
            buffers.push(Buffer::writable(addr, answer.len.get()));
        }
        let count = buffers.len().max(1);
        if let Some(bend) = bend
            && let Some(buffer) = buffers.get_mut(usize::from(bend.descriptor) % count)
        {
            buffer.addr = bend.addr.as_ref().map_or(buffer.addr, Place::get);
            buffer.len = bend.len.as_ref().map_or(buffer.len, Len::get);
            buffer.writable ^= bend.writable;
        }
        if let (Some(ring), false) = (self.ring(queue), buffers.is_empty()) {
            ring.offer(&buffers);
        }
    }

    fn say(&mut self, piece: &[u8]) -> Option<Buffer> {
        let len = u32::try_from(piece.len()).ok().filter(|len| *len > 0)?;
        self.slot = (self.slot + 1) % 64;
        let addr = SAID + self.slot * SLOT;
        self.poke(addr, piece);
        Some(Buffer::readable(addr, len))
    }

    fn step<R: Request>(&mut self, step: &Step<R>) {
        match step {
            Step::Offer { queue, request, cuts, answers, bend } => {
                let queue = request.queue().unwrap_or(*queue);
                self.offer(queue, &request.bytes(), cuts, answers, bend.as_ref());
                self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue.into());
            }
            Step::Kick { queue } => self.write(VIRTIO_MMIO_QUEUE_NOTIFY, (*queue).into()),
            Step::Descriptor { queue, index, addr, len, flags, next } => {
                if let Some(ring) = self.ring(*queue) {
                    let index = u16::from(*index) % ring.size;
                    ring.write_descriptor(index, addr.get(), len.get(), (*flags).into(), *next);
                }
            }
            Step::Publish { queue, head } => drop(self.ring(*queue).map(|ring| ring.publish(*head))),
            Step::AvailIdx { queue, idx } => drop(self.ring(*queue).map(|ring| ring.set_avail_idx(*idx))),
            Step::AvailFlags { queue, flags } => drop(self.ring(*queue).map(|ring| ring.set_avail_flags(*flags))),
            Step::UsedEvent { queue, idx } => drop(self.ring(*queue).map(|ring| ring.set_used_event(*idx))),
            Step::Poke { addr, bytes } => self.poke(addr.get(), bytes),
            Step::Register { index, value } => self.write(u32::from(*index % 0x40) * 4, *value),
            Step::Write { offset, bytes, len } => {
                self.transport.write((*offset).into(), &bytes[..usize::from(*len % 9)]);
            }
            Step::Read { offset, len } => self.transport.read((*offset).into(), &mut [0; 16][..usize::from(*len % 17)]),
            Step::Park => {
                self.transport.park();
                self.transport.unpark();
            }
            Step::Restore { bend } => self.save_and_restore(bend.as_ref()),
            Step::Restart { features } => {
                self.write(VIRTIO_MMIO_STATUS, 0);
                self.bring_up(*features);
            }
            Step::Host { .. } => {}
        }
    }

    /// In place: the device goes back to its beginning and takes over what it was.
    fn save_and_restore(&mut self, bend: Option<&StateBend>) {
        self.transport.park();
        if let Ok(mut state) = self.transport.save() {
            bend.inspect(|bend| bend.bend(&mut state));
            self.transport.reset();
            let _ = self.transport.restore(&state);
        }
        self.transport.unpark();
    }
}
