//! The virtual machine and its devices, for a guest that boots as for one that goes on.

use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use linux_loader::cmdline::Cmdline;
use seccomp::Confinement;

use devices::GuestMemory;
use devices::legacy::{EventSink, MachineEvent, Serial, SerialState};
use devices::virtio::balloon::BalloonHandle;
use devices::virtio::fs::ShareControl;
use devices::virtio::mem::MemHandle;
use devices::virtio::vsock::Connector;
use devices::virtio::{MmioTransport, WriteLog};

use super::attach::{self, AttachError, VirtioSlots};
use super::exit::{ExitReason, panic_message};
use super::live::Live;
use super::{BuildError, Hardware, Machine};
use crate::arch::x86_64::{cpuid, layout};
use crate::bus::Bus;
use crate::config::{MachineConfig, MemConfig, SerialConfig};
use crate::event::LoopThread;
use crate::hotplug::Slots;
use crate::irq;
use crate::memory::lazy::{LazyError, LazyMemory};
use crate::memory::source::Source;
use crate::memory::working_set::WorkingSet;
use crate::memory::{self, Above, PluggableRegion};
use crate::observe::TracePoints;
use crate::vcpu::{Buses, Control, Seat, SpawnError};

/// A machine without processors.
pub(super) struct Assembly {
    name: String,
    control: Arc<Control>,
    trace: Arc<TracePoints>,
    buses: Buses,
    serial: Arc<Serial>,
    vsock: Option<Connector>,
    balloon: Option<BalloonHandle>,
    pluggable: Option<MemHandle>,
    shares: Vec<ShareControl>,
    slots: Slots,
    loops: Vec<Arc<LoopThread>>,
    // Dropped after the threads that may wait for it, and before the memory.
    lazy: Option<LazyMemory>,
    live: Arc<Live>,
    hardware: Hardware,
}

impl Assembly {
    /// Makes the virtual machine with `memory`, and its devices, which are appended to `cmdline`. Memory and boot
    /// configuration are not looked at.
    pub(super) fn new(
        config: MachineConfig,
        kvm: Kvm,
        memory: GuestMemory,
        cmdline: &mut Cmdline,
        serial: Option<&SerialState>,
    ) -> Result<Self, BuildError> {
        config.confinement.announce();
        let confinement = config.confinement;
        let trace = Arc::new(TracePoints::default());
        let mut above = Above::new(&memory);
        let (vm, pluggable) = create_vm(&kvm, &memory, config.pluggable, &mut above, &trace)?;
        let control = Arc::new(Control::new(config.vcpus).map_err(BuildError::EventFd)?);

        let mut port = Bus::default();
        let serial = attach_legacy(&vm, config.serial, &mut port, &control, &trace, serial)?;
        let mut mmio = Bus::default();
        let device_memory = pluggable.as_ref().map_or(&memory, |(_, region)| &region.memory).clone();
        let writes = WriteLog::new(&memory);
        let mut slots = VirtioSlots::new(&vm, &device_memory, writes.clone(), &mut mmio, cmdline, config.confinement);
        // The guest names devices of a kind by this order.
        let shares = config.fs.into_iter().map(|config| slots.fs(config)).collect::<Result<_, _>>()?;
        let replaceable = Slots::new(confinement);
        slots.drives(config.blk, config.slots.blk, &replaceable)?;
        slots.interfaces(config.net, config.slots.net, &replaceable)?;
        config.vhost_user.into_iter().try_for_each(|config| slots.vhost_user(config))?;
        let vsock = config.vsock.map(|config| slots.vsock(config)).transpose()?;
        config.vhost_vsock.map(|config| slots.vhost_vsock(config)).transpose()?;
        config.rng.map(|config| slots.rng(config)).transpose()?;
        let size = config.memory.size;
        let balloon = config.balloon.map(|config| slots.balloon(&config, size)).transpose()?;
        let pluggable =
            pluggable.map(|(config, region)| slots.pluggable(config, region.address, region.blocks)).transpose()?;
        config.pmem.into_iter().try_for_each(|config| slots.pmem(config, &mut above))?;
        config.console.map(|config| slots.console(config)).transpose()?;
        let (loops, transports) = slots.into_parts();
        let buses = Buses { port: Arc::new(port), mmio: Arc::new(mmio) };
        let hardware = Hardware {
            vm,
            transports,
            _above: above,
            memory,
            kvm,
            cpuid: Vec::new(),
            writes,
            base: None,
            template: None,
            written: None,
        };
        Ok(Self {
            name: config.name,
            control,
            trace,
            buses,
            serial,
            vsock,
            balloon,
            pluggable,
            shares,
            slots: replaceable,
            loops,
            lazy: None,
            live: Arc::new(Live::new(confinement)),
            hardware,
        })
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.hardware.memory
    }

    /// The machine goes on from the snapshot of this identity.
    pub(super) fn restored_from(&mut self, identity: &str) {
        self.hardware.base = Some(identity.to_owned());
    }

    /// Memory is a private mapping of what `template` has, and the guest will write to the pages in `written`.
    pub(super) fn mapped_from(&mut self, template: Box<dyn Source>, written: Option<WorkingSet>) {
        self.hardware.template = Some(Arc::new(Mutex::new(template)));
        self.hardware.written = written;
    }

    pub(super) fn serial(&self) -> &Serial {
        &self.serial
    }

    /// Hands over what brings the memory: the machine ends when that is lost.
    pub(super) fn adopt_lazy(&mut self, lazy: LazyMemory) -> Result<(), LazyError> {
        let control = Arc::clone(&self.control);
        lazy.on_loss(move |reason| control.end(ExitReason::MemoryLost(reason.to_owned())))?;
        self.lazy = Some(lazy);
        Ok(())
    }

    /// Why the memory was lost, if it was.
    pub(super) fn lost_memory(&self) -> Option<String> {
        self.lazy.as_ref().and_then(LazyMemory::lost)
    }

    pub(super) fn vm(&self) -> &VmFd {
        &self.hardware.vm
    }

    /// The virtio devices in the order in which they were attached.
    pub(super) fn transports(&self) -> &[Arc<MmioTransport>] {
        &self.hardware.transports
    }

    /// Makes processors as they come out of a reset.
    pub(super) fn create_vcpus(&self, vcpus: u8) -> Result<Vec<VcpuFd>, BuildError> {
        let processors = (0..vcpus).map(|index| self.hardware.vm.create_vcpu(index.into())).collect::<Result<_, _>>();
        processors.map_err(|error| kvm_error("KVM_CREATE_VCPU", error))
    }

    /// What such processors can say about themselves on this host.
    pub(super) fn cpuid(&self, processors: &[VcpuFd]) -> Result<cpuid::Template, BuildError> {
        let vcpus = u8::try_from(processors.len()).unwrap_or(layout::MAX_VCPUS);
        let template = cpuid::Template::new(&self.hardware.kvm, vcpus);
        let mut template = template.map_err(|error| kvm_error("KVM_GET_SUPPORTED_CPUID", error))?;
        // Fails on a host whose TSC is not stable: the guest finds out for itself.
        if let Some(Ok(tsc_khz)) = processors.first().map(VcpuFd::get_tsc_khz) {
            template.set_clock(tsc_khz);
        }
        Ok(template)
    }

    /// Gives each thread its processor, with which it waits at the machine's gate. `cpuid` is what each was told.
    pub(super) fn finish(
        self,
        seats: Vec<Seat>,
        processors: Vec<VcpuFd>,
        cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    ) -> Result<Machine, BuildError> {
        for event_loop in &self.loops {
            event_loop.confirm().map_err(AttachError::from)?;
        }
        let Self {
            name,
            control,
            trace,
            buses,
            serial,
            vsock,
            balloon,
            pluggable,
            shares,
            slots,
            loops,
            lazy,
            live,
            mut hardware,
        } = self;
        hardware.cpuid = cpuid;
        seat_processors(seats, processors, &buses, &control, &trace)?;
        let hardware = Mutex::new(Some(hardware));
        Ok(Machine {
            name,
            control,
            trace,
            serial,
            vsock,
            balloon,
            pluggable,
            shares,
            slots,
            loops,
            lazy,
            live,
            copied_ahead: AtomicU64::new(0),
            hardware,
        })
    }
}

pub(super) fn open_kvm() -> Result<Kvm, BuildError> {
    let kvm = Kvm::new().map_err(|error| {
        let source = io::Error::from(error);
        match source.kind() {
            io::ErrorKind::NotFound => BuildError::KvmMissing(source),
            io::ErrorKind::PermissionDenied => BuildError::KvmDenied(source),
            _ => BuildError::Kvm { call: "opening /dev/kvm", source },
        }
    })?;
    Ok(kvm)
}

/// Makes the VM with its memory and interrupt controllers.
///
/// Memory comes first: the interrupt controllers put devices on KVM's buses, after which each
/// change of the memory map waits for all readers of the old one.
///
/// There is no PIT: its emulation costs a kernel thread, and a kernel that knows kvmclock, or
/// reads CPUID leaf 0x15, and the local APIC's deadline timer asks nothing of it.
fn create_vm(
    kvm: &Kvm,
    memory: &GuestMemory,
    pluggable: Option<MemConfig>,
    above: &mut Above,
    trace: &TracePoints,
) -> Result<(VmFd, Option<(MemConfig, PluggableRegion)>), BuildError> {
    let failed = |call| move |error| kvm_error(call, error);
    let vm = retry(|| kvm.create_vm()).map_err(failed("KVM_CREATE_VM"))?;
    trace.record_vm_created();
    vm.set_tss_address(layout::KVM_TSS).map_err(failed("KVM_SET_TSS_ADDR"))?;
    memory::attach(&vm, memory)?;
    let pluggable = pluggable.map(|config| reserve_pluggable(&vm, memory, above, config)).transpose()?;
    vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
    Ok((vm, pluggable))
}

/// `KVM_CREATE_VM` gives up when a signal arrives, any signal of a busy process.
fn retry<T>(call: impl Fn() -> Result<T, kvm_ioctls::Error>) -> Result<T, kvm_ioctls::Error> {
    const ATTEMPTS: u8 = 5;
    let mut result = call();
    for _ in 1..ATTEMPTS {
        match result {
            Err(error) if error.errno() == libc::EINTR => result = call(),
            other => return other,
        }
    }
    result
}

pub(super) fn kvm_error(call: &'static str, error: kvm_ioctls::Error) -> BuildError {
    BuildError::Kvm { call, source: error.into() }
}

/// Checks what was asked for before memory is made for it.
fn reserve_pluggable(
    vm: &VmFd,
    memory: &GuestMemory,
    above: &mut Above,
    config: MemConfig,
) -> Result<(MemConfig, PluggableRegion), BuildError> {
    config.check().map_err(AttachError::Mem)?;
    let region = above.pluggable(vm, memory, config.size)?;
    Ok((config, region))
}

fn attach_legacy(
    vm: &VmFd,
    config: SerialConfig,
    bus: &mut Bus,
    control: &Arc<Control>,
    trace: &TracePoints,
    state: Option<&SerialState>,
) -> Result<Arc<Serial>, BuildError> {
    let line = irq::wire(vm, irq::SERIAL_LINE).map_err(AttachError::Irq)?;
    let serial = match state {
        None => Serial::new(line, config.into_writer()).map_err(BuildError::EventFd)?,
        Some(state) => Serial::restored(line, config.into_writer(), state).ok_or(AttachError::SerialState)?,
    };
    let serial = Arc::new(serial);
    let tail = serial.tail().clone();
    let control = Arc::clone(control);
    let events: EventSink = Arc::new(move |event| {
        control.end(match event {
            MachineEvent::Reset => ExitReason::Reset,
            MachineEvent::Shutdown => ExitReason::Shutdown,
            MachineEvent::Panicked => ExitReason::Panicked(panic_message(&tail.snapshot())),
        });
    });
    attach::legacy(bus, Arc::clone(&serial), events, trace)?;
    Ok(serial)
}

/// Starts the threads of the processors, which are to be made.
pub(super) fn seats(vcpus: u8, confinement: Confinement) -> Result<Vec<Seat>, SpawnError> {
    (0..vcpus).map(|index| Seat::start(index, confinement)).collect()
}

/// Gives each processor its thread, which waits at the gate of `control`.
fn seat_processors(
    seats: Vec<Seat>,
    processors: Vec<VcpuFd>,
    buses: &Buses,
    control: &Arc<Control>,
    trace: &Arc<TracePoints>,
) -> Result<(), BuildError> {
    let mut threads = Vec::with_capacity(processors.len());
    let mut failed = None;
    for (seat, processor) in seats.into_iter().zip(processors) {
        match seat.occupy(processor, buses.clone(), Arc::clone(control), Arc::clone(trace)) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    control.adopt(threads);
    match failed {
        None => Ok(()),
        Some(error) => {
            control.end(ExitReason::Stopped);
            control.join();
            Err(error.into())
        }
    }
}
