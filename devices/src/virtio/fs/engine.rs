//! The active half: requests from the queues to the server, answers back.

use std::io::{Read, Write};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::server::{MAX_BUFFER_SIZE, Server};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use tracing::{debug, error, warn};
use vm_memory::ByteValued;

use super::share::Share;
use crate::GuestMemory;
use crate::virtio::queue::{CHAINS_PER_WAKE_UP, QueueError, VirtQueue};
use crate::virtio::{Activation, Interrupt};

/// Largest request and answer: the data of one READ or WRITE, and headers. What the server
/// allocates for a request is bounded by this.
const MAX_MESSAGE: usize = MAX_BUFFER_SIZE as usize + 0x1000;

/// The server of requests, in any thread.
pub type FsServer = Server<Arc<Share>>;

/// The active half of a file system device.
pub struct Engine {
    queues: Vec<VirtQueue>,
    memory: GuestMemory,
    interrupt: Interrupt,
    server: Arc<FsServer>,
}

impl Engine {
    /// Takes over the queues. The first is for requests that must not wait behind others
    /// (virtio 1.2 section 5.11.6.1), which here they hardly ever do.
    pub fn new(activation: Activation, server: Arc<FsServer>) -> Self {
        let Activation { memory, queues, acked_features, interrupt } = activation;
        let queues =
            queues.into_iter().flatten().map(|active| VirtQueue::new(active, &memory, acked_features)).collect();
        Self { queues, memory, interrupt, server }
    }

    fn serve(&mut self, index: usize, ops: &mut EventOps) {
        let Some(queue) = self.queues.get_mut(index) else { return };
        match serve_queue(queue, &self.memory, &self.server) {
            Ok(true) => self.interrupt.used_buffers(),
            Ok(false) => {}
            Err(reason) => {
                let reason = &reason as &dyn std::error::Error;
                warn!(device = "fs", reason, "The device stops until the driver resets it");
                // Not looked at again: the queue is in a state that nobody can explain.
                let _ = ops.remove(Events::empty(queue.kick()));
                self.interrupt.needs_reset();
            }
        }
    }
}

/// Serves what a queue has, within a budget. Returns whether the driver wants an interrupt.
fn serve_queue(queue: &mut VirtQueue, memory: &GuestMemory, server: &FsServer) -> Result<bool, QueueError> {
    queue.acknowledge_kick();
    queue.disable_notification()?;
    for _ in 0..CHAINS_PER_WAKE_UP {
        let Some(chain) = queue.pop_descriptor_chain()? else {
            if queue.enable_notification()? {
                queue.disable_notification()?;
                continue;
            }
            return queue.needs_notification();
        };
        let head = chain.head_index();
        // Both read the descriptors once more, which may have changed since the queue checked
        // them; from then on they are fixed, and their sum is what is checked below.
        let request = Reader::from_descriptor_chain(memory, chain.clone());
        let answer = VirtioFsWriter::new(memory, chain);
        let len = match (request, answer) {
            (Ok(request), Ok(answer)) => serve_request(server, request, answer),
            _ => 0,
        };
        queue.add_used_head(head, len)?;
    }
    queue.kick_again();
    queue.needs_notification()
}

/// Serves one request and returns the length of its answer.
fn serve_request(server: &FsServer, request: Reader<'_>, answer: VirtioFsWriter<'_>) -> u32 {
    let fits = request.available_bytes() <= MAX_MESSAGE && answer.available_bytes() <= MAX_MESSAGE;
    let spare = (request.clone(), answer.clone());
    let served = if fits { server.handle_message(request, Writer::VirtioFs(answer), None, None).ok() } else { None };
    let len = served.unwrap_or_else(|| refuse(spare.0, spare.1));
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Answers a request that makes no sense, if it can be answered at all.
fn refuse(mut request: Reader<'_>, mut answer: VirtioFsWriter<'_>) -> usize {
    let mut header = InHeader::default();
    if request.read_exact(header.as_mut_slice()).is_err() {
        return 0;
    }
    debug!(device = "fs", opcode = header.opcode, "A request makes no sense");
    // These have no answer.
    if [Opcode::Forget as u32, Opcode::BatchForget as u32].contains(&header.opcode) {
        return 0;
    }
    let out = OutHeader { len: OUT_HEADER_LEN, error: -libc::EINVAL, unique: header.unique };
    answer.write_all(out.as_slice()).map_or(0, |()| out.as_slice().len())
}

impl MutEventSubscriber for Engine {
    fn init(&mut self, ops: &mut EventOps) {
        for index in 0..self.queues.len() {
            let Some(queue) = self.queues.get(index) else { continue };
            let token = u32::try_from(index).unwrap_or(u32::MAX);
            match ops.add(Events::with_data(queue.kick(), token, EventSet::IN)) {
                Ok(()) => self.serve(index, ops),
                Err(reason) => {
                    error!(device = "fs", %reason, "The event loop cannot watch a queue");
                    self.interrupt.needs_reset();
                }
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.serve(usize::try_from(events.data()).unwrap_or(usize::MAX), ops);
    }
}

/// Length of an answer without data.
const OUT_HEADER_LEN: u32 = 16;
