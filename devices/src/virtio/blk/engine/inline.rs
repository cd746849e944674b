//! Operations are done by the thread that asks for them.
//!
//! The least memory and no thread, for images that are in the host's page cache; a slow disk
//! holds up every device on the same event loop.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::{Completion, Engine};
use crate::virtio::blk::image::Disk;
use crate::virtio::blk::operation::Operation;

pub(super) struct Inline {
    disk: Arc<Disk>,
    done: Vec<Completion>,
}

impl Inline {
    pub fn new(disk: Arc<Disk>) -> Self {
        Self { disk, done: Vec::new() }
    }
}

impl Engine for Inline {
    fn start(&mut self, token: u16, operation: Operation) {
        let result = self.disk.run(operation);
        self.done.push(Completion { token, result });
    }

    fn submit(&mut self) {}

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.done);
    }

    fn drain(&mut self, completions: &mut Vec<Completion>) {
        self.reap(completions);
    }

    fn event(&self) -> Option<&EventFd> {
        None
    }
}
