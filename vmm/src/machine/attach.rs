//! Devices on the buses of a machine.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use linux_loader::cmdline::Cmdline;
use vm_memory::GuestAddress;

use devices::legacy::{
    DEBUG_PORT, EventSink, I8042, I8042_PORT, I8042_PORT_COUNT, PANIC_PORT, PanicPort, SERIAL_PORT, SERIAL_PORT_COUNT,
    Serial,
};
use devices::virtio::balloon::{Balloon, BalloonConfig, BalloonHandle};
use devices::virtio::blk::{Blk, BlkConfig, BlkError};
use devices::virtio::console::{Console, ConsoleConfig, ConsoleError};
use devices::virtio::fs::{Fs, FsConfig, FsError, ShareControl};
use devices::virtio::mem::{Mem, MemConfig, MemError, MemHandle};
use devices::virtio::mmio::QUEUE_NOTIFY;
use devices::virtio::net::{Net, NetConfig, NetError};
use devices::virtio::pmem::{Pmem, PmemConfig};
use devices::virtio::rng::Rng;
use devices::virtio::vhost_user::{VhostUser, VhostUserConfig, VhostUserError};
use devices::virtio::vsock::{Connector, KernelVsock, KernelVsockConfig, Vsock, VsockConfig, VsockError};
use devices::virtio::{Interrupt, MmioTransport, VirtioDevice, WriteLog};
use devices::{BusDevice, GuestMemory};
use seccomp::{Confinement, Post, Role};

use crate::arch::x86_64::layout;
use crate::bus::{Bus, BusError};
use crate::config::RngConfig;
use crate::event::{EventError, LoopThread};
use crate::hotplug::{self, HotplugError, Pluggable, SlotKind, Slots};
use crate::irq::{self, IrqAllocator, IrqError};
use crate::memory::{Above, MemoryError, PluggableBlocks};
use crate::observe::TracePoints;

/// Why a device is not in the machine.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A console that was saved with more input than it can hold.
    #[error("The console's state holds more input than its buffer takes")]
    SerialState,
    /// No interrupt.
    #[error("A device cannot interrupt the guest")]
    Irq(#[from] IrqError),
    /// No address.
    #[error("A device has no place on its bus")]
    Bus(#[from] BusError),
    /// The transport's descriptors could not be made.
    #[error("Cannot make the transport of a virtio device")]
    Transport(#[source] io::Error),
    /// `KVM_IOEVENTFD` failed.
    #[error("Cannot wire the notifications of queue {queue} at {address:#x}")]
    Notification {
        /// Index of the queue.
        queue: u32,
        /// Address of the register.
        address: u64,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The command line is full.
    #[error("The kernel command line has no room for the address of a device")]
    Cmdline(#[source] linux_loader::cmdline::Error),
    /// A shared directory that cannot be shared.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// A drive that is none.
    #[error(transparent)]
    Blk(#[from] BlkError),
    /// A backend that is not there, or of no use.
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
    /// A network interface that cannot be made.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A vsock device that cannot be made.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// No source of entropy.
    #[error("Cannot open the host's source of entropy")]
    Rng(#[source] io::Error),
    /// No balloon.
    #[error("Cannot make the event descriptors of a balloon")]
    Balloon(#[source] io::Error),
    /// Memory that cannot be plugged.
    #[error(transparent)]
    Mem(#[from] MemError),
    /// Memory above the guest's own that is not there.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A console device that cannot be made.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// A slot that cannot be filled.
    #[error(transparent)]
    Slot(#[from] HotplugError),
    /// The thread for devices could not be started.
    #[error("The devices' thread cannot be started")]
    EventLoop(#[from] EventError),
}

/// Puts the devices on the port bus that a PC has without being asked.
pub(super) fn legacy(
    bus: &mut Bus,
    serial: Arc<Serial>,
    events: EventSink,
    trace: &TracePoints,
) -> Result<(), AttachError> {
    bus.insert(SERIAL_PORT.into(), SERIAL_PORT_COUNT.into(), serial)?;
    let i8042 = Arc::new(I8042::new(events.clone()));
    bus.insert(I8042_PORT.into(), I8042_PORT_COUNT.into(), i8042)?;
    bus.insert(PANIC_PORT.into(), 1, Arc::new(PanicPort::new(events)))?;
    bus.insert(DEBUG_PORT.into(), 1, Arc::new(trace.debug_port().clone()))?;
    Ok(())
}

/// Gives virtio devices an address window, an interrupt line and a word on the command line, in
/// the order in which they come.
pub(super) struct VirtioSlots<'a> {
    vm: &'a VmFd,
    memory: &'a GuestMemory,
    writes: WriteLog,
    bus: &'a mut Bus,
    cmdline: &'a mut Cmdline,
    lines: IrqAllocator,
    next_window: u64,
    loops: Loops,
    transports: Vec<Arc<MmioTransport>>,
}

/// The threads that devices asked for.
struct Loops {
    confinement: Confinement,
    io: Option<Arc<LoopThread>>,
    /// One for each shared directory, which is all that its thread can open.
    fs: Vec<Arc<LoopThread>>,
}

impl<'a> VirtioSlots<'a> {
    /// The first device comes to the start of the MMIO gap.
    pub(super) fn new(
        vm: &'a VmFd,
        memory: &'a GuestMemory,
        writes: WriteLog,
        bus: &'a mut Bus,
        cmdline: &'a mut Cmdline,
        confinement: Confinement,
    ) -> Self {
        let (lines, loops) = (IrqAllocator::default(), Loops { confinement, io: None, fs: Vec::new() });
        let transports = Vec::new();
        Self { vm, memory, writes, bus, cmdline, lines, next_window: layout::MMIO_GAP_START, loops, transports }
    }

    pub(super) fn fs(&mut self, config: FsConfig) -> Result<ShareControl, AttachError> {
        let fs = Fs::new(config, self.loops.confinement)?;
        let control = fs.control();
        let event_loop = self.loops.serving(fs.post()?)?;
        self.attach_to(event_loop, Box::new(fs))?;
        Ok(control)
    }

    /// Drives; in replaceable places where there are any.
    pub(super) fn drives(&mut self, configs: Vec<BlkConfig>, places: u8, slots: &Slots) -> Result<(), AttachError> {
        if places == 0 {
            return configs.into_iter().try_for_each(|config| self.blk(config));
        }
        let places = hotplug::fill(configs, places, SlotKind::Blk, Pluggable::Blk)?;
        places.into_iter().try_for_each(|device| self.slot(slots, SlotKind::Blk, device))
    }

    /// Interfaces; in replaceable places where there are any, unless the host's kernel serves them.
    pub(super) fn interfaces(&mut self, configs: Vec<NetConfig>, places: u8, slots: &Slots) -> Result<(), AttachError> {
        if places == 0 {
            return configs.into_iter().try_for_each(|config| self.net(config));
        }
        let (kernel, own): (Vec<_>, Vec<_>) = configs.into_iter().partition(|config| !config.vhost.is_empty());
        let places = hotplug::fill(own, places, SlotKind::Net, Pluggable::Net)?;
        places.into_iter().try_for_each(|device| self.slot(slots, SlotKind::Net, device))?;
        kernel.into_iter().try_for_each(|config| self.net(config))
    }

    fn blk(&mut self, config: BlkConfig) -> Result<(), AttachError> {
        self.attach(Box::new(Blk::new(config, self.loops.confinement)?)).map(drop)
    }

    fn net(&mut self, config: NetConfig) -> Result<(), AttachError> {
        self.attach(Box::new(Net::new(config)?)).map(drop)
    }

    pub(super) fn vhost_user(&mut self, config: VhostUserConfig) -> Result<(), AttachError> {
        self.attach(Box::new(VhostUser::new(config, self.memory, self.loops.confinement)?)).map(drop)
    }

    pub(super) fn vhost_vsock(&mut self, config: KernelVsockConfig) -> Result<(), AttachError> {
        self.attach(Box::new(KernelVsock::new(config)?)).map(drop)
    }

    pub(super) fn vsock(&mut self, config: VsockConfig) -> Result<Connector, AttachError> {
        let (vsock, connector) = Vsock::new(config)?;
        self.attach(Box::new(vsock))?;
        Ok(connector)
    }

    pub(super) fn rng(&mut self, config: RngConfig) -> Result<(), AttachError> {
        self.attach(Box::new(Rng::new(config.limits).map_err(AttachError::Rng)?)).map(drop)
    }

    /// A place for a drive or an interface, with a device in it or not, that `slots` can change from now on.
    fn slot(&mut self, slots: &Slots, kind: SlotKind, device: Option<Pluggable>) -> Result<(), AttachError> {
        let occupant = device.as_ref().map(|device| device.id().to_owned());
        let device = match device {
            Some(device) => device.into_device(self.loops.confinement)?,
            None => hotplug::vacant(kind, kind.queue_sizes()),
        };
        let transport = self.attach(device)?;
        slots.add(kind, transport, occupant);
        Ok(())
    }

    /// A balloon for a guest with `memory` bytes.
    pub(super) fn balloon(&mut self, config: &BalloonConfig, memory: u64) -> Result<BalloonHandle, AttachError> {
        let (balloon, handle) = Balloon::new(config, memory).map_err(AttachError::Balloon)?;
        self.attach(Box::new(balloon))?;
        Ok(handle)
    }

    /// Memory to be plugged, in a region above the guest's own.
    pub(super) fn pluggable(
        &mut self,
        config: MemConfig,
        address: u64,
        blocks: PluggableBlocks,
    ) -> Result<MemHandle, AttachError> {
        let (mem, handle) = Mem::new(config, address, Box::new(blocks))?;
        self.attach(Box::new(mem))?;
        Ok(handle)
    }

    /// A file as memory above the guest's own.
    pub(super) fn pmem(&mut self, config: PmemConfig, above: &mut Above) -> Result<(), AttachError> {
        let (address, size) = above.persistent(self.vm, &config)?;
        let file = (!config.read_only).then_some(config.file);
        self.attach(Box::new(Pmem::new(address, size, file))).map(drop)
    }

    pub(super) fn console(&mut self, config: ConsoleConfig) -> Result<(), AttachError> {
        self.attach(Box::new(Console::new(config)?)).map(drop)
    }

    /// The event loops that were started for the devices, and the devices in the order in which they came.
    pub(super) fn into_parts(self) -> (Vec<Arc<LoopThread>>, Vec<Arc<MmioTransport>>) {
        (self.loops.io.into_iter().chain(self.loops.fs).collect(), self.transports)
    }

    fn attach(&mut self, device: Box<dyn VirtioDevice>) -> Result<Arc<MmioTransport>, AttachError> {
        let event_loop = self.loops.io()?;
        self.attach_to(event_loop, device)
    }

    fn attach_to(
        &mut self,
        event_loop: Arc<LoopThread>,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Arc<MmioTransport>, AttachError> {
        let line = self.lines.allocate()?;
        let interrupt = Interrupt::new(irq::wire(self.vm, line)?);
        let transport = MmioTransport::new(device, self.memory.clone(), event_loop, interrupt);
        let transport = Arc::new(transport.map_err(AttachError::Transport)?.noting(self.writes.clone()));

        let base = self.next_window;
        let address = base + QUEUE_NOTIFY;
        for (queue, kick) in (0u32..).zip(transport.kicks()) {
            self.vm
                .register_ioevent(kick, &IoEventAddress::Mmio(address), queue)
                .map_err(|source| AttachError::Notification { queue, address, source })?;
        }
        self.transports.push(Arc::clone(&transport));
        self.bus.insert(base, layout::MMIO_WINDOW, Arc::clone(&transport) as Arc<dyn BusDevice>)?;
        self.cmdline
            .add_virtio_mmio_device(layout::MMIO_WINDOW, GuestAddress(base), line, None)
            .map_err(AttachError::Cmdline)?;
        self.next_window += layout::MMIO_WINDOW;
        Ok(transport)
    }
}

impl Loops {
    /// The loop of all devices but shared directories, started when it is first asked for.
    fn io(&mut self) -> Result<Arc<LoopThread>, EventError> {
        match &self.io {
            Some(event_loop) => Ok(Arc::clone(event_loop)),
            None => {
                let event_loop = Arc::new(LoopThread::start(Role::Io, self.confinement)?);
                Ok(Arc::clone(self.io.insert(event_loop)))
            }
        }
    }

    /// A loop of its own.
    fn serving(&mut self, post: Post) -> Result<Arc<LoopThread>, EventError> {
        let event_loop = Arc::new(LoopThread::start(post, self.confinement)?);
        self.fs.push(Arc::clone(&event_loop));
        Ok(event_loop)
    }
}
