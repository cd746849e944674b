//! Queues that the host's kernel serves: vhost-net and vhost-vsock.
//!
//! The kernel reads the guest's notifications from the queues' kick descriptors and interrupts
//! through the device's line, so this process sees neither. It moves data between the guest's
//! memory and a tap queue or the host's `AF_VSOCK` sockets in a thread of its own, which checks
//! what the guest writes as this process would; a mistake of the driver comes back through the
//! error descriptor.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use libc::EFD_CLOEXEC;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{
    VHOST_NET_SET_BACKEND, VHOST_VSOCK_SET_GUEST_CID, VHOST_VSOCK_SET_RUNNING, vhost_vring_file,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestMemory as _, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::GuestMemory;
use crate::virtio::{ActiveQueue, Interrupt};

/// What a descriptor is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VhostKind {
    /// Two queues of a network device.
    Net,
    /// The data queues of a vsock device.
    Vsock,
}

impl VhostKind {
    fn path(self) -> &'static str {
        match self {
            Self::Net => "/dev/vhost-net",
            Self::Vsock => "/dev/vhost-vsock",
        }
    }

    fn module(self) -> &'static str {
        match self {
            Self::Net => "vhost_net",
            Self::Vsock => "vhost_vsock",
        }
    }
}

/// Why queues cannot be left to the kernel.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// There is no such device.
    #[error("This host has no {path}: its kernel has no module {module}, or it is not loaded")]
    Missing {
        /// The device.
        path: &'static str,
        /// What would bring it.
        module: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is there and cannot be opened.
    #[error("Cannot open {path}")]
    Open {
        /// The device.
        path: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A descriptor that was handed over is something else, or serves another machine.
    #[error("The descriptor is not an unused one of {path}")]
    WrongKind {
        /// The device that it should be of.
        path: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another guest of this host has the context id, or it cannot be a guest's.
    #[error("The host's kernel does not take {cid} as a guest's context id")]
    Cid {
        /// The context id.
        cid: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// An open vhost device that serves nothing yet.
#[derive(Debug)]
pub struct KernelVhost {
    kind: VhostKind,
    file: File,
    features: u64,
}

impl KernelVhost {
    /// Opens the host's device.
    pub fn open(kind: VhostKind) -> Result<Self, VhostError> {
        let path = kind.path();
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|source| {
            match source.raw_os_error() {
                // ENODEV: the node is there, the module is not.
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                    VhostError::Missing { path, module: kind.module(), source }
                }
                _ => VhostError::Open { path, source },
            }
        })?;
        Self::own(kind, file)
    }

    /// Takes a descriptor that somebody with the privilege to do so has opened.
    pub fn from_fd(kind: VhostKind, fd: OwnedFd) -> Result<Self, VhostError> {
        Self::own(kind, fd.into())
    }

    fn own(kind: VhostKind, file: File) -> Result<Self, VhostError> {
        let kernel = Kernel { file: &file, memory: Arc::new(GuestMemory::new()) };
        let features = kernel.set_owner().and_then(|()| kernel.get_features());
        let features =
            features.map_err(|error| VhostError::WrongKind { path: kind.path(), source: io_error(error) })?;
        Ok(Self { kind, file, features })
    }

    /// What it serves.
    pub fn kind(&self) -> VhostKind {
        self.kind
    }

    /// A mask of features: all but those of `questionable` that the kernel does not have.
    pub fn supported(&self, questionable: u64) -> u64 {
        !questionable | self.features
    }

    /// Takes the context id `cid` for the guest, on the whole host.
    pub fn set_guest_cid(&self, cid: u64) -> Result<(), VhostError> {
        // SAFETY: the kernel reads one `u64`, which is what `cid` is.
        let result = unsafe { ioctl_with_ref(&self.file, VHOST_VSOCK_SET_GUEST_CID(), &cid) };
        check(result).map_err(|source| VhostError::Cid { cid, source })
    }

    /// Lets the kernel serve ring `index` from the tap queue, or no longer.
    fn set_tap(&self, index: u32, tap: Option<&File>) -> io::Result<()> {
        let backend = vhost_vring_file { index, fd: tap.map_or(-1, AsRawFd::as_raw_fd) };
        // SAFETY: the kernel reads one `vhost_vring_file`, which is what `backend` is.
        check(unsafe { ioctl_with_ref(&self.file, VHOST_NET_SET_BACKEND(), &backend) })
    }

    fn set_running(&self, running: bool) -> io::Result<()> {
        let running = libc::c_int::from(running);
        // SAFETY: the kernel reads one int, which is what `running` is.
        check(unsafe { ioctl_with_ref(&self.file, VHOST_VSOCK_SET_RUNNING(), &running) })
    }
}

/// Queues that the kernel serves until this is dropped.
pub struct KernelRings {
    vhost: Arc<KernelVhost>,
    memory: Arc<GuestMemory>,
    /// The kernel uses their rings and kicks.
    queues: Vec<ActiveQueue>,
    error: EventFd,
}

impl KernelRings {
    /// Describes `queues` to the kernel, which does not look at them before
    /// [`serve`](Self::serve).
    pub fn new(
        vhost: Arc<KernelVhost>,
        memory: &GuestMemory,
        acked_features: u64,
        queues: Vec<ActiveQueue>,
        interrupt: &Interrupt,
    ) -> io::Result<Self> {
        let error = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let memory = Arc::new(memory.clone());
        let call = interrupt.lend_line()?;
        let kernel = Kernel { file: &vhost.file, memory: Arc::clone(&memory) };
        kernel.set_features(acked_features & vhost.features).map_err(io_error)?;
        kernel.set_mem_table(&memory_table(&memory)).map_err(io_error)?;
        for (index, active) in queues.iter().enumerate() {
            describe(&kernel, index, active, &error, &call).map_err(io_error)?;
        }
        Ok(Self { vhost, memory, queues, error })
    }

    /// Readable when the kernel cannot go on with a queue.
    pub fn error(&self) -> &EventFd {
        &self.error
    }

    /// Begins. A vhost-net needs the tap queue that the frames come from.
    pub fn serve(&self, tap: Option<&File>) -> io::Result<()> {
        match self.vhost.kind {
            VhostKind::Net => self.indices().try_for_each(|index| self.vhost.set_tap(index, tap))?,
            VhostKind::Vsock => self.vhost.set_running(true)?,
        }
        // What the driver said before has been heard by a kernel that had nothing to do yet, and is not said again.
        self.queues.iter().try_for_each(|active| active.kick.write(1))
    }

    /// Ends, and gives the queues back at the places where the kernel has left them.
    pub fn park(mut self) -> Vec<Option<Queue>> {
        self.stop();
        let queues = std::mem::take(&mut self.queues);
        queues.into_iter().enumerate().map(|(index, active)| self.where_it_is(index, active.queue)).collect()
    }

    fn where_it_is(&self, index: usize, mut queue: Queue) -> Option<Queue> {
        let kernel = Kernel { file: &self.vhost.file, memory: Arc::clone(&self.memory) };
        // Of a split ring only the lower half says something.
        let next_avail = u16::try_from(kernel.get_vring_base(index).ok()? & 0xffff).ok()?;
        // The kernel keeps this one in the ring alone.
        let next_used = queue.used_idx(self.memory.as_ref(), Ordering::Acquire).ok()?;
        queue.set_next_avail(next_avail);
        queue.set_next_used(next_used.0);
        Some(queue)
    }

    /// When this returns, the kernel does not touch the rings any more.
    fn stop(&self) {
        // Both fail only for what was not begun.
        match self.vhost.kind {
            VhostKind::Net => self.indices().for_each(|index| drop(self.vhost.set_tap(index, None))),
            VhostKind::Vsock => drop(self.vhost.set_running(false)),
        }
    }

    fn indices(&self) -> std::ops::Range<u32> {
        0..u32::try_from(self.queues.len()).unwrap_or_default()
    }
}

impl Drop for KernelRings {
    fn drop(&mut self) {
        self.stop();
    }
}

fn describe(
    kernel: &Kernel<'_>,
    index: usize,
    active: &ActiveQueue,
    error: &EventFd,
    call: &EventFd,
) -> vhost::Result<()> {
    let queue = &active.queue;
    kernel.set_vring_num(index, queue.size())?;
    kernel.set_vring_base(index, queue.next_avail())?;
    let config = VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: queue.desc_table(),
        used_ring_addr: queue.used_ring(),
        avail_ring_addr: queue.avail_ring(),
        log_addr: None,
    };
    kernel.set_vring_addr(index, &config)?;
    kernel.set_vring_call(index, call)?;
    kernel.set_vring_err(index, error)?;
    kernel.set_vring_kick(index, &active.kick)
}

/// The guest's memory as the kernel finds it in this process.
fn memory_table(memory: &GuestMemory) -> Vec<VhostUserMemoryRegionInfo> {
    let region = |region: &vm_memory::GuestRegionMmap<()>| VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().raw_value(),
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        // Only a back-end in another process maps files.
        mmap_offset: 0,
        mmap_handle: -1,
    };
    memory.iter().map(region).collect()
}

/// A vhost device together with the memory that its queues are in, as the `vhost` crate wants it.
struct Kernel<'a> {
    file: &'a File,
    memory: Arc<GuestMemory>,
}

impl AsRawFd for Kernel<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for Kernel<'_> {
    type AS = Arc<GuestMemory>;

    fn mem(&self) -> &Arc<GuestMemory> {
        &self.memory
    }
}

fn io_error(error: vhost::Error) -> io::Error {
    match error {
        vhost::Error::IoctlError(source) => source,
        other => io::Error::other(other),
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_host_without_the_device_is_told_which_module_it_lacks() {
        for (kind, words) in
            [(VhostKind::Net, ["/dev/vhost-net", "vhost_net"]), (VhostKind::Vsock, ["/dev/vhost-vsock", "vhost_vsock"])]
        {
            if Path::new(kind.path()).exists() {
                eprintln!("SKIPPED: this host has {}", kind.path());
                continue;
            }
            let error = KernelVhost::open(kind).unwrap_err();
            assert!(matches!(error, VhostError::Missing { .. }), "{error:?}");
            assert!(words.iter().all(|word| error.to_string().contains(word)), "{error}");
        }
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused() {
        let null = File::open("/dev/null").unwrap();
        let error = KernelVhost::from_fd(VhostKind::Vsock, null.into()).unwrap_err();
        assert!(matches!(error, VhostError::WrongKind { path: "/dev/vhost-vsock", .. }), "{error:?}");
    }

    #[test]
    fn the_kernel_is_told_of_every_region() {
        let memory = crate::testkit::memory();
        let table = memory_table(&memory);
        let expected: Vec<_> = memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
        let told: Vec<_> = table.iter().map(|region| (region.guest_phys_addr, region.memory_size)).collect();
        assert_eq!(told, expected);
        assert!(table.iter().all(|region| region.userspace_addr != 0));
    }
}
