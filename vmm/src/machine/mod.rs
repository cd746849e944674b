//! A machine's life, one verb to a file: ahead (what is copied before it is needed), assemble, attach, build, boot, run, pause, peek, plug, snapshot, live (a snapshot of a guest that runs), restore, stop, exit.

mod ahead;
mod assemble;
mod attach;
mod boot;
mod build;
pub mod exit;
mod live;
mod pause;
mod peek;
mod plug;
mod restore;
mod run;
mod snapshot;
mod stop;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use devices::GuestMemory;
use devices::legacy::Serial;
use devices::virtio::balloon::BalloonHandle;
use devices::virtio::fs::ShareControl;
use devices::virtio::mem::MemHandle;
use devices::virtio::vsock::Connector;
use devices::virtio::{MmioTransport, WriteLog};

use crate::event::LoopThread;
use crate::hotplug::Slots;
use crate::memory::Above;
use crate::memory::lazy::{LazyHandle, LazyMemory};
use crate::memory::working_set::WorkingSet;
use crate::observe::TracePoints;
use crate::snapshot::live::Template;
use crate::vcpu::{Control, VcpuThread};
use seccomp::Role;

use live::Live;

pub use attach::AttachError;
pub use boot::BootError;
pub use build::BuildError;
pub use exit::ExitReason;
pub use live::{Copied, LiveSnapshot};
pub use restore::RestoreError;
pub use run::{RunState, StateError};

/// A virtual machine of this process.
///
/// ```text
///            start()           pause()
///   built ───────────▶ running ───────▶ paused
///                         ▲                │
///                         └──── resume() ──┘
///     any of them ── the guest ends, or stop(), or drop ──▶ ended
/// ```
///
/// All calls may be made from any thread but the machine's own. Dropping it ends it and leaves
/// no thread, descriptor or mapping behind; that takes as long as KVM needs to take a VM down, some
/// milliseconds.
pub struct Machine {
    name: String,
    control: Arc<Control>,
    trace: Arc<TracePoints>,
    serial: Arc<Serial>,
    vsock: Option<Connector>,
    balloon: Option<BalloonHandle>,
    pluggable: Option<MemHandle>,
    shares: Vec<ShareControl>,
    slots: Slots,
    loops: Vec<Arc<LoopThread>>,
    /// What brings memory page by page, where that is how it comes.
    lazy: Option<LazyMemory>,
    live: Arc<Live>,
    /// Bytes.
    copied_ahead: AtomicU64,
    /// Gone when the machine was stopped.
    hardware: Mutex<Option<Hardware>>,
}

/// What is not used while the guest runs, but is the machine.
struct Hardware {
    // Dropped before the memory that it uses.
    vm: VmFd,
    /// In the order of attachment.
    transports: Vec<Arc<MmioTransport>>,
    _above: Above,
    memory: GuestMemory,
    kvm: Kvm,
    /// What memory is a private mapping of, where it is that of a snapshot.
    template: Option<Template>,
    /// Which pages of it the guest is expected to write to.
    written: Option<WorkingSet>,
    /// What each processor was told about itself.
    cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    /// What was written to memory since the snapshot that is `base`, as far as KVM does not know it.
    writes: WriteLog,
    /// The identity of a snapshot that a difference can be saved to.
    base: Option<String>,
}

impl Machine {
    /// The name that its configuration gave it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The last 64 KiB that the guest wrote to its console.
    pub fn console_tail(&self) -> Vec<u8> {
        self.serial.tail().snapshot()
    }

    /// Sends input to the guest's console and returns how many bytes it took: its buffer has 64.
    pub fn console_input(&self, input: &[u8]) -> usize {
        self.serial.send(input)
    }

    /// Readable once the guest has taken all input of its console. Whoever waits for it reads it, and then sends more.
    pub fn console_drained(&self) -> &EventFd {
        self.serial.drained()
    }

    /// The way to the guest's sockets, where the machine has a vsock device.
    pub fn vsock(&self) -> Option<Connector> {
        self.vsock.clone()
    }

    /// Lets go of everything that the guest knows on the mount whose root is `path`, in all shared directories: see
    /// [`ShareControl::release_mount`]. To be called before unmounting it.
    pub fn release_mount(&self, path: &Path) -> io::Result<()> {
        self.shares.iter().try_for_each(|share| share.release_mount(path))
    }

    /// The machine's balloon, where it has one: to set its size, and to read what the guest says.
    pub fn balloon(&self) -> Option<BalloonHandle> {
        self.balloon.clone()
    }

    /// The memory that can be plugged into the machine, where there is some: to say how much of it the guest is to have.
    pub fn pluggable_memory(&self) -> Option<MemHandle> {
        self.pluggable.clone()
    }

    /// What is known of how memory comes, where it comes page by page.
    pub fn lazy_memory(&self) -> Option<LazyHandle> {
        self.lazy.as_ref().map(LazyMemory::handle)
    }

    /// Thread identifiers of the processors, in order; for placing them into a cgroup.
    pub fn vcpu_thread_ids(&self) -> Vec<i32> {
        self.control.wait_until_arrived();
        self.control.threads().iter().map(VcpuThread::id).collect()
    }

    /// Thread identifier of the event loop that devices share; `None` where the machine has no device for it.
    pub fn io_thread_id(&self) -> Option<i32> {
        self.loops.iter().find(|event_loop| event_loop.role() == Role::Io).map(|event_loop| event_loop.thread_id())
    }

    /// When the machine reached the stations of its start.
    pub fn trace(&self) -> &TracePoints {
        &self.trace
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("name", &self.name).finish_non_exhaustive()
    }
}
