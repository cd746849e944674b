//! The thread of a processor.

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use seccomp::{Confinement, Entering, Role};
use vmm_sys_util::signal::{Killable, unblock_signal};

use super::Control;
use super::exits::{Buses, Outcome, run_once};
use super::gate::Pass;
use super::kick::{ImmediateExit, install_handler, kick_signal};
use crate::machine::exit::ExitReason;
use crate::observe::TracePoints;

/// Why a processor has no thread.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The page by which it is interrupted cannot be mapped.
    #[error("Cannot map the run page of vCPU {vcpu}")]
    RunPage {
        /// Index of the vCPU.
        vcpu: u8,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No thread could be made.
    #[error("Cannot start the thread of vCPU {vcpu}")]
    Thread {
        /// Index of the vCPU.
        vcpu: u8,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A processor's thread, as others see it.
pub struct VcpuThread {
    /// The thread's own: locked while it is in the guest, gone when it has left.
    vcpu: Weak<Mutex<VcpuFd>>,
    immediate_exit: ImmediateExit,
    /// 0 until the thread has told.
    id: Arc<AtomicI32>,
    handle: Mutex<Option<JoinHandle<()>>>,
}

/// The thread of a processor that is still to be made: it confines itself meanwhile, and ends when this is dropped.
pub struct Seat {
    index: u8,
    id: Arc<AtomicI32>,
    /// Gone when there is a processor.
    waiting: Option<(Entering, SyncSender<Runner>)>,
}

impl Seat {
    /// Starts the thread of processor `index`.
    pub fn start(index: u8, confinement: Confinement) -> Result<Self, SpawnError> {
        install_handler();
        let id = Arc::new(AtomicI32::new(0));
        let (sender, processor) = sync_channel::<Runner>(1);
        let thread = seccomp::start(confinement, Role::Vcpu, format!("vcpu{index}"), {
            let id = Arc::clone(&id);
            move || {
                // Nobody sends one where the machine could not be built.
                let Ok(runner) = processor.recv() else { return };
                // SAFETY: always succeeds, and touches no memory.
                id.store(unsafe { libc::gettid() }, Ordering::Release);
                runner.run();
            }
        });
        let thread = thread.map_err(|source| SpawnError::Thread { vcpu: index, source })?;
        Ok(Self { index, id, waiting: Some((thread, sender)) })
    }

    /// Gives the thread its processor, with which it waits at the gate of `control`.
    pub fn occupy(
        mut self,
        vcpu: VcpuFd,
        buses: Buses,
        control: Arc<Control>,
        trace: Arc<TracePoints>,
    ) -> Result<VcpuThread, SpawnError> {
        let index = self.index;
        let failed = |source| SpawnError::Thread { vcpu: index, source };
        let immediate_exit = ImmediateExit::map(&vcpu).map_err(|source| SpawnError::RunPage { vcpu: index, source })?;
        let (thread, sender) = self.waiting.take().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let handle = thread.confined().map_err(failed)?;
        let vcpu = Arc::new(Mutex::new(vcpu));
        let shared = Arc::downgrade(&vcpu);
        sender
            .send(Runner { index, vcpu, buses, control, trace })
            .map_err(|_| failed(io::ErrorKind::BrokenPipe.into()))?;
        Ok(VcpuThread { vcpu: shared, immediate_exit, id: Arc::clone(&self.id), handle: Mutex::new(Some(handle)) })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some((thread, sender)) = self.waiting.take() {
            drop(sender);
            if let Ok(thread) = thread.confined() {
                // An error is a panic, which its own message has told.
                let _ = thread.join();
            }
        }
    }
}

impl VcpuThread {
    /// Its thread identifier; 0 until the thread has come to the gate.
    pub fn id(&self) -> i32 {
        self.id.load(Ordering::Acquire)
    }

    /// Does something with the processor, which stands at the gate; `None` when its thread has left.
    pub fn with_vcpu<T>(&self, call: impl FnOnce(&VcpuFd) -> T) -> Option<T> {
        let vcpu = self.vcpu.upgrade()?;
        let vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        Some(call(&vcpu))
    }

    /// Makes the thread look at the gate soon.
    pub fn kick(&self) {
        let handle = self.handle();
        if let Some(handle) = handle.as_ref() {
            self.immediate_exit.set();
            // Fails only for a thread that has ended.
            let _ = handle.kill(kick_signal());
        }
    }

    /// Waits for the thread's end.
    pub fn join(&self) {
        let handle = self.handle().take();
        if let Some(handle) = handle {
            // An error is a panic, which its own message has told.
            let _ = handle.join();
        }
    }

    fn handle(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread owns.
struct Runner {
    index: u8,
    /// Shared for the time at the gate, when the thread does not hold the lock.
    vcpu: Arc<Mutex<VcpuFd>>,
    buses: Buses,
    control: Arc<Control>,
    trace: Arc<TracePoints>,
}

impl Runner {
    fn run(self) {
        self.control.gate.arrive();
        // The signal mask comes from whoever built the machine.
        let _ = unblock_signal(kick_signal());
        let mut started = false;
        loop {
            // In this order: a kick that comes after the gate was read sets the flag again.
            self.vcpu().set_kvm_immediate_exit(0);
            match self.control.gate.pass() {
                Pass::End => break,
                Pass::Run { waited } if waited && started => {
                    // Else the guest's watchdog takes the pause for a processor that hangs.
                    // Fails where the guest does not use kvmclock.
                    let _ = self.vcpu().kvmclock_ctrl();
                }
                Pass::Run { .. } => {}
            }
            if !started && self.index == 0 {
                self.trace.record_first_run();
            }
            started = true;
            match self.run_until_interrupted() {
                Outcome::End(reason) => self.control.end(reason),
                Outcome::Fault(cause) => {
                    self.control.end(ExitReason::VcpuError { vcpu: self.index, cause });
                }
                Outcome::Continue | Outcome::Interrupted => {}
            }
        }
        self.control.gate.leave();
    }

    fn vcpu(&self) -> MutexGuard<'_, VcpuFd> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when no exit is half served: KVM completes what a device has answered when it is entered again.
    fn run_until_interrupted(&self) -> Outcome {
        let mut vcpu = self.vcpu();
        loop {
            match run_once(&mut vcpu, &self.buses) {
                Outcome::Continue => {}
                other => return other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Threads of this process that have the name.
    fn named(name: &str) -> usize {
        let tasks = fs::read_dir("/proc/self/task").expect("tasks").flatten();
        tasks.filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)).count()
    }

    #[test]
    fn a_seat_that_nobody_takes_leaves_no_thread() {
        for confinement in [Confinement::On, Confinement::Off] {
            let seat = Seat::start(77, confinement).expect("start");
            drop(seat);
            assert_eq!(named("vcpu77"), 0);
        }
    }
}
