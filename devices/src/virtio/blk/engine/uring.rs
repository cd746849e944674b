//! Operations are done by the kernel, through an I/O ring.
//!
//! The ring can do nothing but read, write, allocate and sync on the one image, whatever becomes
//! of this process: the kernel is told so before the ring is enabled.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use libc::EFD_CLOEXEC;
use tracing::error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Completion, Engine, MAX_IN_FLIGHT};
use crate::virtio::blk::image::Disk;
use crate::virtio::blk::operation::{Operation, Step};

/// The image, as the ring knows it.
const IMAGE: Fixed = Fixed(0);

/// Threads that the kernel may start for what it cannot do at once: on files and devices, and on
/// everything else, of which there is nothing.
const MAX_KERNEL_WORKERS: [u32; 2] = [16, 1];

pub(super) struct Uring {
    ring: IoUring,
    event: EventFd,
    /// Under way, by token. They hold what the kernel was pointed to.
    operations: Vec<Option<Operation>>,
    in_flight: u16,
    /// Done without the kernel.
    done: Vec<Completion>,
    /// Keeps the image open.
    _disk: Arc<Disk>,
}

impl Uring {
    /// Fails when the host does not let this process have a ring, or the image is not a raw one.
    pub fn new(disk: &Arc<Disk>) -> io::Result<Self> {
        let file = disk.file().ok_or(io::ErrorKind::Unsupported)?;
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        // Every operation has one entry at a time, so neither half of the ring can be full.
        let ring = IoUring::builder().setup_r_disabled().dontfork().build(MAX_IN_FLIGHT.into())?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_eventfd(event.as_raw_fd())?;
        submitter.register_iowq_max_workers(&mut MAX_KERNEL_WORKERS.clone())?;
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
        ])?;
        submitter.register_enable_rings()?;
        let operations = (0..MAX_IN_FLIGHT).map(|_| None).collect();
        Ok(Self { ring, event, operations, in_flight: 0, done: Vec::new(), _disk: Arc::clone(disk) })
    }

    /// Puts the next step of an operation into the ring, or completes it.
    fn advance(&mut self, token: u16, mut operation: Operation) {
        let Some(step) = operation.step() else {
            self.done.push(Completion { token, result: Ok(()) });
            return;
        };
        let entry = entry(step).user_data(token.into());
        let Some(slot) = self.operations.get_mut(usize::from(token)) else { return };
        // SAFETY: what the entry points to stays in place until its result is told to the
        // operation, which stays in its slot until the completion was seen.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        match pushed {
            Ok(()) => {
                *slot = Some(operation);
                self.in_flight = self.in_flight.saturating_add(1);
            }
            Err(_) => self.done.push(Completion { token, result: Err(io::ErrorKind::ResourceBusy.into()) }),
        }
    }

    /// Takes what the kernel has completed.
    fn take_completed(&mut self) {
        let completed: Vec<_> = self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (token, result) in completed {
            let Ok(token) = u16::try_from(token) else { continue };
            let Some(mut operation) = self.operations.get_mut(usize::from(token)).and_then(Option::take) else {
                continue;
            };
            self.in_flight = self.in_flight.saturating_sub(1);
            let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.saturating_neg()));
            match operation.finish(result) {
                Ok(()) => self.advance(token, operation),
                Err(error) => self.done.push(Completion { token, result: Err(error) }),
            }
        }
    }

    fn submit_and_wait(&self, count: usize) {
        match self.ring.submit_and_wait(count) {
            Ok(_) => {}
            // The kernel has no memory for it, or was interrupted: come back.
            Err(error)
                if [Some(libc::EINTR), Some(libc::EAGAIN), Some(libc::EBUSY)].contains(&error.raw_os_error()) =>
            {
                let _ = self.event.write(1);
            }
            Err(error) => error!(%error, "An I/O ring does not take what it is given"),
        }
    }
}

fn entry(step: Step) -> squeue::Entry {
    match step {
        Step::Read(call) => {
            opcode::Readv::new(IMAGE, call.vectors, call.count.unsigned_abs()).offset(call.position).build()
        }
        Step::Write(call) => {
            opcode::Writev::new(IMAGE, call.vectors, call.count.unsigned_abs()).offset(call.position).build()
        }
        Step::Allocate { mode, range } => {
            opcode::Fallocate::new(IMAGE, range.len).offset(range.position).mode(mode).build()
        }
        Step::Sync => opcode::Fsync::new(IMAGE).flags(FsyncFlags::DATASYNC).build(),
    }
}

impl Engine for Uring {
    fn start(&mut self, token: u16, operation: Operation) {
        self.advance(token, operation);
    }

    fn submit(&mut self) {
        if !self.ring.submission().is_empty() {
            self.submit_and_wait(0);
        }
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        // Before looking: what is done after the look makes it readable again.
        let _ = self.event.read();
        self.take_completed();
        // Steps that follow others.
        self.submit();
        completions.append(&mut self.done);
    }

    fn drain(&mut self, completions: &mut Vec<Completion>) {
        while self.in_flight > 0 {
            self.submit_and_wait(1);
            self.take_completed();
        }
        completions.append(&mut self.done);
    }

    fn event(&self) -> Option<&EventFd> {
        Some(&self.event)
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel must not have pointers into memory that is not held any more.
        self.drain(&mut Vec::new());
    }
}
