//! The pure half: a request in, an answer out, and the books kept between.

use std::ops::Range;
use std::sync::Arc;

use tracing::debug;

use super::blocks::{BlockState, Blocks, MAX_RUNS};
use super::handle::Shared;
use super::request::{Answer, Part, REQUEST_SIZE, RESPONSE_SIZE, Request};
use crate::GuestMemory;
use crate::virtio::queue::{Chain, QueueError};
use crate::virtio::worker::ChainHandler;

/// Serves requests.
pub struct Handler {
    shared: Arc<Shared>,
}

impl Handler {
    /// A handler for the region that `shared` describes.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Decides about a request and carries it out.
    pub fn serve(&self, request: Request) -> (Answer, u16) {
        let answer = match request {
            Request::Plug(part) => self.plug(part),
            Request::Unplug(part) => self.unplug(part),
            Request::UnplugAll => self.unplug_all(),
            Request::State(part) => return self.state(part),
            Request::Unknown(kind) => {
                debug!(device = "mem", kind, "A request is unknown");
                Answer::Error
            }
        };
        (answer, 0)
    }

    /// The blocks that a driver means, if they are in the region.
    fn range(&self, part: Part, blocks: &Blocks) -> Option<Range<u64>> {
        let region = &self.shared.region;
        let offset = part.addr.checked_sub(region.addr)?;
        if part.blocks == 0 || !offset.is_multiple_of(region.block_size) {
            return None;
        }
        let start = offset.checked_div(region.block_size)?;
        let end = start.checked_add(part.blocks.into())?;
        (end <= blocks.count()).then_some(start..end)
    }

    fn plug(&self, part: Part) -> Answer {
        let mut state = self.shared.lock();
        let Some(range) = self.range(part, &state.blocks) else { return Answer::Error };
        if state.blocks.state(range.clone()) != BlockState::Unplugged {
            return Answer::Error;
        }
        let wanted = state.blocks.plugged().saturating_add(part.blocks.into());
        if wanted > self.shared.region.blocks(state.requested) {
            return Answer::Nack;
        }
        if state.blocks.runs_after(&range, true) > MAX_RUNS {
            return Answer::Busy;
        }
        let (offset, len) = self.shared.region.bytes(&range);
        if let Err(error) = self.shared.memory.plug(offset, len) {
            self.shared.complaints.tell("mem", &error, "Memory cannot be plugged");
            return Answer::Busy;
        }
        state.blocks.set(range, true);
        self.shared.tell_host();
        Answer::Ack
    }

    fn unplug(&self, part: Part) -> Answer {
        let mut state = self.shared.lock();
        let Some(range) = self.range(part, &state.blocks) else { return Answer::Error };
        if state.blocks.state(range.clone()) != BlockState::Plugged {
            return Answer::Error;
        }
        if state.blocks.runs_after(&range, false) > MAX_RUNS {
            return Answer::Busy;
        }
        let (offset, len) = self.shared.region.bytes(&range);
        if let Err(error) = self.shared.memory.unplug(offset, len) {
            self.shared.complaints.tell("mem", &error, "Memory cannot be unplugged");
            return Answer::Busy;
        }
        state.blocks.set(range, false);
        self.shared.tell_host();
        Answer::Ack
    }

    fn unplug_all(&self) -> Answer {
        let mut state = self.shared.lock();
        let (offset, len) = self.shared.region.bytes(&(0..state.blocks.count()));
        if let Err(error) = self.shared.memory.unplug(offset, len) {
            self.shared.complaints.tell("mem", &error, "Memory cannot be unplugged");
            return Answer::Busy;
        }
        state.blocks.clear();
        self.shared.tell_host();
        Answer::Ack
    }

    fn state(&self, part: Part) -> (Answer, u16) {
        let state = self.shared.lock();
        let Some(range) = self.range(part, &state.blocks) else { return (Answer::Error, 0) };
        let common = match state.blocks.state(range) {
            BlockState::Plugged => 0,
            BlockState::Unplugged => 1,
            BlockState::Mixed => 2,
        };
        (Answer::Ack, common)
    }
}

impl ChainHandler for Handler {
    fn handle(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<u32, QueueError> {
        let mut bytes = [0; REQUEST_SIZE];
        if chain.readable().read(memory, &mut bytes)? < REQUEST_SIZE {
            return Err(chain.malformed());
        }
        // Looked at before anything is done: a request whose outcome nobody learns is not one.
        let (response, _) = chain.writable().split_at(RESPONSE_SIZE).ok_or_else(|| chain.malformed())?;
        let (answer, state) = self.serve(Request::parse(bytes));
        let written = response.write(memory, &answer.to_bytes(state))?;
        Ok(u32::try_from(written).unwrap_or_default())
    }
}
