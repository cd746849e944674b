//! A device under test, and a request that it answers.

use crate::testkit::{Buffer, Guest, Ring, Running, eventually};
use crate::virtio::VirtioDevice;

/// Where a request is put, and its answer.
pub const SAID: u64 = 0x10_0000;
pub const ANSWER: u64 = 0x20_0000;

/// `DEVICE_NEEDS_RESET` (virtio 1.2 section 2.1).
const NEEDS_RESET: u32 = 0x40;

/// What is asked of a device.
pub struct Request {
    /// The queue that it goes to.
    pub queue: usize,
    /// What the device reads.
    pub said: Vec<u8>,
    /// What there is to write to, in bytes.
    pub room: u32,
    /// How much of it the device writes.
    pub written: u32,
}

/// A device, how to make another one like it, and a request that it answers. It has no request where another process
/// serves its queues.
pub struct Subject {
    /// The full name of the test that it is for.
    name: &'static str,
    make: Box<dyn FnMut() -> Box<dyn VirtioDevice>>,
    /// Of the device, without those of the ring.
    features: u64,
    request: Option<Request>,
}

impl Subject {
    pub fn new(features: u64, request: Request, make: impl FnMut() -> Box<dyn VirtioDevice> + 'static) -> Self {
        Self { name: "", make: Box::new(make), features, request: Some(request) }
    }

    pub fn without_queues(features: u64, make: impl FnMut() -> Box<dyn VirtioDevice> + 'static) -> Self {
        Self { name: "", make: Box::new(make), features, request: None }
    }

    /// For a test.
    pub fn named(self, name: &'static str) -> Self {
        Self { name, ..self }
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Another device like the others.
    pub fn make(&mut self) -> Box<dyn VirtioDevice> {
        (self.make)()
    }

    /// A machine whose driver has not done anything.
    pub fn guest(&mut self) -> Guest {
        Guest::new(self.make())
    }

    pub fn start(&mut self) -> Running {
        self.start_with(0)
    }

    /// With features of the ring.
    pub fn start_with(&mut self, ring_features: u64) -> Running {
        let features = self.features | ring_features;
        self.guest().start(features)
    }

    pub fn features(&self) -> u64 {
        self.features
    }

    pub fn request(&self) -> &Request {
        self.request.as_ref().expect("A device with a request")
    }

    /// The queue that something happens to: that of the request, or the first.
    pub fn queue(&self) -> usize {
        self.request.as_ref().map_or(0, |request| request.queue)
    }

    /// Puts the request into memory and returns its buffers: one for each direction that it has.
    pub fn buffers(&self, guest: &Guest) -> Vec<Buffer> {
        let Request { said, room, .. } = self.request();
        guest.poke(SAID, said);
        let readable = (!said.is_empty()).then(|| Buffer::readable(SAID, said.len() as u32));
        readable.into_iter().chain((*room > 0).then(|| Buffer::writable(ANSWER, *room))).collect()
    }

    /// Makes the request available, without a kick, where there is one, and returns the chain's head.
    pub fn offer(&self, running: &mut Running) -> Option<u16> {
        let request = self.request.as_ref()?;
        let buffers = self.buffers(&running.guest);
        Some(running.rings[request.queue].offer(&buffers))
    }

    /// How many times the request fits into its ring.
    pub fn fill_count(&self, running: &Running) -> usize {
        let Some(request) = &self.request else { return 0 };
        usize::from(running.rings[request.queue].size) / self.buffers(&running.guest).len()
    }

    pub fn kick(&self, running: &Running) {
        running.guest.kick(self.queue() as u32);
    }

    /// Makes the request, which is answered.
    #[track_caller]
    pub fn ask(&self, running: &mut Running) {
        if self.request.is_some() {
            let buffers = self.buffers(&running.guest);
            self.ask_with(running, &buffers);
        }
        assert_eq!(running.guest.status(), 0xf, "The device works");
    }

    /// Makes the request with these buffers, which is answered as if they were its own.
    #[track_caller]
    pub fn ask_with(&self, running: &mut Running, buffers: &[Buffer]) {
        running.rings[self.queue()].offer(buffers);
        self.kick(running);
        let used = running.wait_used(self.queue(), 1);
        assert_eq!((used.len(), used[0].1), (1, self.request().written));
    }

    /// Whether the request fits into a queue of `size`.
    pub fn fits(&self, guest: &Guest, size: u16) -> bool {
        self.request.is_some() && self.buffers(guest).len() <= size.into()
    }

    /// Makes the request over rings that the machine does not know.
    #[track_caller]
    pub fn ask_over(&self, guest: &Guest, mut rings: Vec<Ring>) {
        let buffers = self.buffers(guest);
        let ring = &mut rings[self.queue()];
        ring.offer(&buffers);
        guest.kick(self.queue() as u32);
        let mut used = Vec::new();
        eventually("An answer", || {
            used.extend(ring.take_used());
            !used.is_empty()
        });
        assert_eq!(used[0].1, self.request().written);
    }

    /// Resets the device, which works again.
    #[track_caller]
    pub fn revive(&self, running: Running) -> Running {
        running.guest.set_status(0);
        let mut running = running.guest.start(self.features);
        self.ask(&mut running);
        running
    }

    /// The device gives up, and works after a reset.
    #[track_caller]
    pub fn expect_broken(&self, running: Running) -> Running {
        self.kick(&running);
        running.guest.wait_needs_reset();
        self.revive(running)
    }

    /// The device answers something or gives up, and works after a reset.
    #[track_caller]
    pub fn expect_either(&self, mut running: Running) -> Running {
        self.kick(&running);
        let queue = self.queue();
        eventually("An answer or DEVICE_NEEDS_RESET", || {
            !running.rings[queue].take_used().is_empty() || running.guest.status() & NEEDS_RESET != 0
        });
        self.revive(running)
    }
}
