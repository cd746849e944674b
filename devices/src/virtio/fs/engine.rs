//! The active half: requests from the queues to the server, answers back.

use std::io::{Read, Write};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::server::{MAX_BUFFER_SIZE, Server};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use tracing::{debug, error};
use virtio_queue::{DescriptorChain, Queue};
use vm_memory::ByteValued;

use super::pool::{Answered, Class, Job, Pool};
use super::share::Share;
use crate::virtio::complaints::STOPS;
use crate::virtio::queue::{CHAINS_PER_WAKE_UP, QueueError, VirtQueue};
use crate::virtio::{Activation, Interrupt};
use crate::{ActiveHalf, GuestMemory};

/// Largest request and answer: the data of one READ or WRITE, and headers. What the server
/// allocates for a request is bounded by this, and what all of them do by the number of threads.
const MAX_MESSAGE: usize = MAX_BUFFER_SIZE as usize + 0x1000;

/// The server of requests, in any thread.
pub type FsServer = Server<Arc<Share>>;

/// Serves the request in a chain, in any thread, and returns the length of its answer.
pub type Serve = Arc<dyn Fn(&SharedChain) -> u32 + Send + Sync>;

/// A chain that may go to another thread.
pub type SharedChain = DescriptorChain<Arc<GuestMemory>>;

/// From how many bytes on READ and WRITE are worth another thread: copying them takes longer than waking it.
const LONG_TRANSFER: usize = 64 << 10;

/// Which event of the loop is the pool's; queues have lower numbers.
const ANSWERS: u32 = u32::MAX;

/// The active half of a file system device.
pub struct Engine {
    /// Those that the driver did not enable, or has broken, are `None`.
    queues: Vec<Option<VirtQueue>>,
    memory: Arc<GuestMemory>,
    interrupt: Interrupt,
    serve: Serve,
    pool: Arc<Pool>,
}

impl Engine {
    /// Takes over the queues. The first is for requests that must not wait behind others
    /// (virtio 1.2 section 5.11.6.1), which here they hardly ever do.
    pub fn new(activation: Activation, serve: Serve, pool: Arc<Pool>) -> Self {
        let Activation { memory, queues, acked_features, interrupt } = activation;
        let take = |active| VirtQueue::new(active, &memory, acked_features);
        let queues = queues.into_iter().map(|active| active.map(take)).collect();
        Self { queues, memory: Arc::new(memory), interrupt, serve, pool }
    }

    fn watch(&self, ops: &mut EventOps) -> event_manager::Result<()> {
        ops.add(Events::with_data(self.pool.event(), ANSWERS, EventSet::IN))?;
        for (index, queue) in (0..).zip(&self.queues) {
            if let Some(queue) = queue {
                ops.add(Events::with_data(queue.kick(), index, EventSet::IN))?;
            }
        }
        Ok(())
    }

    fn serve_queue(&mut self, index: usize, ops: &mut EventOps) {
        let Some(Some(queue)) = self.queues.get_mut(index) else { return };
        let dispatch = Dispatch { index, memory: &self.memory, serve: &self.serve, pool: &self.pool };
        match dispatch.serve(queue) {
            Ok(true) => self.interrupt.used_buffers(),
            Ok(false) => {}
            Err(reason) => self.give_up(index, &reason, ops),
        }
    }

    /// Gives what the pool has answered back to the driver.
    fn complete(&mut self, ops: &mut EventOps) {
        for (index, reason) in self.add_answered() {
            self.give_up(index, &reason, ops);
        }
        let mut notify = false;
        for index in 0..self.queues.len() {
            let Some(Some(queue)) = self.queues.get_mut(index) else { continue };
            match queue.needs_notification() {
                Ok(wanted) => notify |= wanted,
                Err(reason) => self.give_up(index, &reason, ops),
            }
        }
        if notify {
            self.interrupt.used_buffers();
        }
    }

    fn add_answered(&mut self) -> Vec<(usize, QueueError)> {
        let mut failed = Vec::new();
        for Answered { queue: index, head, len } in self.pool.take_answered() {
            let Some(Some(queue)) = self.queues.get_mut(index) else { continue };
            if let Err(reason) = queue.add_used_head(head, len) {
                failed.push((index, reason));
            }
        }
        failed
    }

    /// The queue is in a state that nobody can explain: it is not looked at again.
    fn give_up(&mut self, index: usize, reason: &QueueError, ops: &mut EventOps) {
        let Some(queue) = self.queues.get_mut(index).and_then(Option::take) else { return };
        self.interrupt.complaints().tell("fs", reason, STOPS);
        let _ = ops.remove(Events::empty(queue.kick()));
        self.interrupt.needs_reset();
    }
}

impl Drop for Engine {
    /// A thread of the pool may be writing to guest memory.
    fn drop(&mut self) {
        self.pool.drain();
        drop(self.pool.take_answered());
    }
}

/// Serves one queue.
struct Dispatch<'a> {
    index: usize,
    memory: &'a Arc<GuestMemory>,
    serve: &'a Serve,
    pool: &'a Pool,
}

impl Dispatch<'_> {
    /// Serves what a queue has, within a budget. Returns whether the driver wants an interrupt.
    fn serve(&self, queue: &mut VirtQueue) -> Result<bool, QueueError> {
        queue.acknowledge_kick();
        queue.disable_notification()?;
        for _ in 0..CHAINS_PER_WAKE_UP {
            let Some(chain) = queue.pop_descriptor_chain(self.memory)? else {
                if queue.enable_notification()? {
                    queue.disable_notification()?;
                    continue;
                }
                return queue.needs_notification();
            };
            let class = classify(&chain);
            if self.pool.takes(class) {
                self.pool.submit(class, Job { queue: self.index, chain });
            } else {
                queue.add_used_head(chain.head_index(), (self.serve)(&chain))?;
            }
        }
        queue.kick_again();
        queue.needs_notification()
    }
}

/// What a request waits for. What it is may have changed when it is served; then it is served all the same.
fn classify(chain: &SharedChain) -> Class {
    let Ok(mut request) = Reader::from_descriptor_chain(chain.memory(), chain.clone()) else { return Class::Prompt };
    let Ok(header) = request.read_obj::<InHeader>() else { return Class::Prompt };
    let is = |opcode: Opcode| header.opcode == opcode as u32;
    if is(Opcode::Fsync) || is(Opcode::Fsyncdir) || is(Opcode::Fallocate) {
        Class::Sync
    } else if is(Opcode::Write) && request.available_bytes() >= LONG_TRANSFER {
        Class::Transfer
    } else if is(Opcode::Read) {
        let answer = VirtioFsWriter::new(chain.memory(), chain.clone());
        let long = answer.is_ok_and(|answer| answer.available_bytes() >= LONG_TRANSFER);
        if long { Class::Transfer } else { Class::Prompt }
    } else {
        Class::Prompt
    }
}

/// Serves requests with `server`.
///
/// Not those that wait for a lock: a thread would wait for as long as a guest likes, and could not be taken back at a
/// reset. `fuse-backend-rs` does not tell a share which requests these are.
pub fn serve_with(server: FsServer, posix_locks: bool) -> Serve {
    Arc::new(move |chain| {
        if posix_locks && opcode(chain) == Some(Opcode::Setlkw as u32) {
            return refuse_chain(chain, libc::EOPNOTSUPP);
        }
        serve_chain(&server, chain)
    })
}

fn opcode(chain: &SharedChain) -> Option<u32> {
    let mut request = Reader::from_descriptor_chain(chain.memory(), chain.clone()).ok()?;
    request.read_obj::<InHeader>().ok().map(|header| header.opcode)
}

fn refuse_chain(chain: &SharedChain, errno: i32) -> u32 {
    let request = Reader::from_descriptor_chain(chain.memory(), chain.clone());
    let answer = VirtioFsWriter::new(chain.memory(), chain.clone());
    let (Ok(request), Ok(answer)) = (request, answer) else { return 0 };
    u32::try_from(refuse(request, answer, errno)).unwrap_or(u32::MAX)
}

fn serve_chain(server: &FsServer, chain: &SharedChain) -> u32 {
    // Both read the descriptors once more, which may have changed since the queue checked
    // them; from then on they are fixed, and their sum is what is checked below.
    let request = Reader::from_descriptor_chain(chain.memory(), chain.clone());
    let answer = VirtioFsWriter::new(chain.memory(), chain.clone());
    match (request, answer) {
        (Ok(request), Ok(answer)) => serve_request(server, request, answer),
        _ => 0,
    }
}

/// Serves one request and returns the length of its answer.
fn serve_request(server: &FsServer, request: Reader<'_>, answer: VirtioFsWriter<'_>) -> u32 {
    let fits = request.available_bytes() <= MAX_MESSAGE && answer.available_bytes() <= MAX_MESSAGE;
    let spare = (request.clone(), answer.clone());
    let served = if fits { server.handle_message(request, Writer::VirtioFs(answer), None, None).ok() } else { None };
    let len = served.unwrap_or_else(|| refuse(spare.0, spare.1, libc::EINVAL));
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Answers a request that makes no sense or is not served, if it can be answered at all.
fn refuse(mut request: Reader<'_>, mut answer: VirtioFsWriter<'_>, errno: i32) -> usize {
    let mut header = InHeader::default();
    if request.read_exact(header.as_mut_slice()).is_err() {
        return 0;
    }
    debug!(device = "fs", opcode = header.opcode, "A request is refused");
    // These have no answer.
    if [Opcode::Forget as u32, Opcode::BatchForget as u32].contains(&header.opcode) {
        return 0;
    }
    let out = OutHeader { len: OUT_HEADER_LEN, error: errno.saturating_neg(), unique: header.unique };
    answer.write_all(out.as_slice()).map_or(0, |()| out.as_slice().len())
}

impl ActiveHalf for Engine {
    /// Requests that went to the pool are answered first.
    fn park(mut self: Box<Self>) -> Vec<Option<Queue>> {
        self.pool.drain();
        let mut broken: Vec<_> = self.add_answered().into_iter().map(|(index, _)| index).collect();
        let mut notify = false;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            match queue.as_mut().map(VirtQueue::needs_notification) {
                Some(Ok(wanted)) => notify |= wanted,
                Some(Err(_)) => broken.push(index),
                None => {}
            }
        }
        if notify {
            self.interrupt.used_buffers();
        }
        if !broken.is_empty() {
            self.interrupt.needs_reset();
        }
        let queues = std::mem::take(&mut self.queues);
        queues.into_iter().map(|queue| queue.map(|queue| queue.park(0))).collect()
    }
}

impl MutEventSubscriber for Engine {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(reason) = self.watch(ops) {
            error!(device = "fs", %reason, "The event loop cannot watch the device");
            self.interrupt.needs_reset();
            return;
        }
        for index in 0..self.queues.len() {
            self.serve_queue(index, ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            ANSWERS => self.complete(ops),
            queue => self.serve_queue(usize::try_from(queue).unwrap_or(usize::MAX), ops),
        }
    }
}

/// Length of an answer without data.
const OUT_HEADER_LEN: u32 = 16;
