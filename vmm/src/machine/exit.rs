//! How a machine ends.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::Machine;
use crate::vcpu::VcpuFault;

/// Why a machine ended. Displayed, it is one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExitReason {
    /// The guest has shut down and asked to be switched off.
    #[error("The guest has shut down")]
    Shutdown,
    /// [`Machine::stop`] was called, or the machine was dropped.
    #[error("The machine was stopped")]
    Stopped,
    /// The guest asked for a reset.
    #[error("The guest has reset itself")]
    Reset,
    /// The guest's processor met a fault while handling a fault while handling a fault.
    #[error("The guest's processor has met a triple fault")]
    TripleFault,
    /// The guest's kernel panicked. Empty where it told nothing on the console.
    #[error("The guest's kernel has panicked{}{}", if .0.is_empty() { "" } else { ": " }, .0)]
    Panicked(String),
    /// Its memory could not be provided any more.
    #[error("The guest's memory is lost: {0}")]
    MemoryLost(String),
    /// A processor could not go on.
    #[error("vCPU {vcpu} has stopped: {cause}")]
    VcpuError {
        /// Index of the vCPU.
        vcpu: u8,
        /// What happened to it.
        cause: VcpuFault,
    },
}

/// Takes the first reason and keeps it.
pub struct ExitLatch {
    reason: Mutex<Option<ExitReason>>,
    changed: Condvar,
    event: EventFd,
}

impl ExitLatch {
    pub(crate) fn new() -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { reason: Mutex::new(None), changed: Condvar::new(), event })
    }

    pub(crate) fn set(&self, reason: ExitReason) {
        let mut current = self.lock();
        if current.is_none() {
            *current = Some(reason);
            self.changed.notify_all();
            // Written once: it cannot be full.
            let _ = self.event.write(1);
        }
    }

    pub(crate) fn get(&self) -> Option<ExitReason> {
        self.lock().clone()
    }

    fn wait(&self) -> ExitReason {
        let mut current = self.lock();
        loop {
            match &*current {
                Some(reason) => return reason.clone(),
                None => {
                    current = self.changed.wait(current).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn wait_for(&self, time: Duration) -> Option<ExitReason> {
        let running = |reason: &mut Option<ExitReason>| reason.is_none();
        let waited = self.changed.wait_timeout_while(self.lock(), time, running);
        let (reason, _) = waited.unwrap_or_else(PoisonError::into_inner);
        reason.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<ExitReason>> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Machine {
    /// Waits until the machine has ended.
    pub fn wait(&self) -> ExitReason {
        self.control.exit().wait()
    }

    /// Waits until the machine has ended, but not longer than `time`.
    pub fn wait_for(&self, time: Duration) -> Option<ExitReason> {
        self.control.exit().wait_for(time)
    }

    /// Why the machine ended, if it has.
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.control.exit().get()
    }

    /// An event descriptor that is readable from the machine's end on. It is to be polled, not
    /// read.
    pub fn exit_fd(&self) -> BorrowedFd<'_> {
        let descriptor = self.control.exit().event.as_raw_fd();
        // SAFETY: the machine owns the descriptor for at least as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(descriptor) }
    }
}

/// The line of a console's end that says why a Linux kernel panicked.
pub(crate) fn panic_message(console: &[u8]) -> String {
    const MARK: &str = "Kernel panic - not syncing: ";
    let console = String::from_utf8_lossy(console);
    let line = console.lines().rev().find_map(|line| line.split_once(MARK));
    line.map(|(_, message)| message.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays() {
        let latch = ExitLatch::new().expect("latch");
        assert_eq!(latch.get(), None);
        assert_eq!(latch.wait_for(Duration::from_millis(1)), None);
        latch.set(ExitReason::Reset);
        latch.set(ExitReason::Stopped);
        assert_eq!(latch.wait(), ExitReason::Reset);
        assert_eq!(latch.wait_for(Duration::MAX), Some(ExitReason::Reset));
        assert_eq!(latch.event.read().expect("readable"), 1);
    }

    #[test]
    fn the_panics_reason_is_found_on_the_console() {
        let console = b"[    0.5] Run /init\r\n\
            [    0.6] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n\
            [    0.6] CPU: 0 PID: 1\r\n\xff";
        assert_eq!(panic_message(console), "VFS: Unable to mount root fs on unknown-block(0,0)");
        assert_eq!(panic_message(b"nothing"), "");
    }

    #[test]
    fn reasons_are_sentences() {
        let reason = ExitReason::Panicked("out of luck".into());
        assert_eq!(reason.to_string(), "The guest's kernel has panicked: out of luck");
        assert_eq!(ExitReason::Panicked(String::new()).to_string(), "The guest's kernel has panicked");
        let cause = VcpuFault::Internal { suberror: 1, rip: 0x10, data: vec![2, 0xf4] };
        assert_eq!(
            ExitReason::VcpuError { vcpu: 1, cause }.to_string(),
            "vCPU 1 has stopped: KVM cannot emulate an instruction at 0x10, suberror 1, \
             details [2, f4]"
        );
    }
}
