//! Everything up to the guest's first instruction.

use std::io;
use std::sync::{Arc, Mutex};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use seccomp::Confinement;

use devices::GuestMemory;
use devices::legacy::{EventSink, MachineEvent, Serial};

use super::attach::{self, AttachError, VirtioSlots};
use super::boot::{self, BootError};
use super::exit::{ExitReason, panic_message};
use super::{Hardware, Machine};
use crate::arch::x86_64::{ArchError, cpuid, lapic, layout, msr, regs};
use crate::bus::Bus;
use crate::config::{MachineConfig, MemConfig, Placement, SerialConfig};
use crate::irq;
use crate::memory::{self, Above, MemoryError, PluggableRegion};
use crate::observe::TracePoints;
use crate::vcpu::{Buses, Control, SpawnError, VcpuThread};

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// There is no `/dev/kvm`.
    #[error(
        "This host has no /dev/kvm: virtualization is off in its firmware, or the kernel's KVM module is not loaded"
    )]
    KvmMissing(#[source] io::Error),
    /// `/dev/kvm` is not for this user.
    #[error("This process may not use /dev/kvm")]
    KvmDenied(#[source] io::Error),
    /// A call to KVM for the whole machine failed.
    #[error("Cannot set up the virtual machine: {call} failed")]
    Kvm {
        /// The call.
        call: &'static str,
        /// What KVM said.
        #[source]
        source: io::Error,
    },
    /// No processor, or too many.
    #[error("A machine has 1 to {max} vCPUs, not {0}", max = layout::MAX_VCPUS)]
    Vcpus(u8),
    /// Guest memory.
    #[error("The machine has no memory")]
    Memory(#[from] MemoryError),
    /// Kernel, initrd or command line.
    #[error("The machine cannot boot")]
    Boot(#[from] BootError),
    /// A device.
    #[error("A device cannot be attached")]
    Attach(#[from] AttachError),
    /// A processor.
    #[error("A processor cannot be set up")]
    Arch(#[from] ArchError),
    /// A processor's thread.
    #[error("A processor's thread cannot be started")]
    Spawn(#[from] SpawnError),
    /// A descriptor could not be made.
    #[error("Cannot make an event descriptor")]
    EventFd(#[source] io::Error),
}

impl Machine {
    /// Builds a machine whose processors wait for [`start`](Machine::start).
    pub fn build(config: MachineConfig) -> Result<Self, BuildError> {
        let MachineConfig {
            name,
            vcpus,
            memory: memory_config,
            boot,
            images,
            serial,
            fs,
            blk,
            net,
            vhost_user,
            vsock,
            vhost_vsock,
            rng,
            balloon,
            pluggable,
            pmem,
            console,
            confinement,
        } = config;
        confinement.announce();
        if vcpus == 0 || vcpus > layout::MAX_VCPUS {
            return Err(BuildError::Vcpus(vcpus));
        }
        let mut cmdline = boot::parse_cmdline(&boot)?;
        let kvm = open_kvm()?;
        let memory = memory::reserve(&memory_config)?;
        // What is mapped over the memory is not in the file that other processes map.
        let images = if memory_config.backing.is_private() { images } else { Placement::Copied };
        let loaded = boot::load(&memory, &boot, images)?;

        let trace = Arc::new(TracePoints::default());
        let vm = create_vm(&kvm, &memory, &trace)?;
        let control = Arc::new(Control::new(vcpus).map_err(BuildError::EventFd)?);

        let mut port = Bus::default();
        let serial = attach_legacy(&vm, serial, &mut port, &control, &trace)?;
        let mut mmio = Bus::default();
        let mut above = Above::new(&memory);
        let pluggable = pluggable.map(|config| reserve_pluggable(&vm, &memory, &mut above, config)).transpose()?;
        let device_memory = pluggable.as_ref().map_or(&memory, |(_, region)| &region.memory).clone();
        let mut slots = VirtioSlots::new(&vm, &device_memory, &mut mmio, &mut cmdline, confinement);
        // The guest names devices of a kind by this order.
        let shares = fs.into_iter().map(|config| slots.fs(config)).collect::<Result<_, _>>()?;
        blk.into_iter().try_for_each(|config| slots.blk(config))?;
        net.into_iter().try_for_each(|config| slots.net(config))?;
        vhost_user.into_iter().try_for_each(|config| slots.vhost_user(config))?;
        let vsock = vsock.map(|config| slots.vsock(config)).transpose()?;
        vhost_vsock.map(|config| slots.vhost_vsock(config)).transpose()?;
        rng.map(|config| slots.rng(config)).transpose()?;
        let balloon = balloon.map(|config| slots.balloon(&config, memory_config.size)).transpose()?;
        let pluggable =
            pluggable.map(|(config, region)| slots.pluggable(config, region.address, region.blocks)).transpose()?;
        pmem.into_iter().try_for_each(|config| slots.pmem(config, &mut above))?;
        console.map(|config| slots.console(config)).transpose()?;
        let loops = slots.into_loops();
        let entry = boot::describe(&memory, &memory_config, vcpus, &loaded, &cmdline)?;

        let processors = create_processors(&kvm, &vm, vcpus)?;
        if let Some(boot_processor) = processors.first() {
            regs::set_boot_processor(boot_processor, entry)?;
        }
        let buses = Buses { port: Arc::new(port), mmio: Arc::new(mmio) };
        spawn_processors(processors, &buses, &control, &trace, confinement)?;
        let hardware = Mutex::new(Some(Hardware { _vm: vm, _above: above, _memory: memory }));
        Ok(Self { name, control, trace, serial, vsock, balloon, pluggable, shares, loops, hardware })
    }
}

fn open_kvm() -> Result<Kvm, BuildError> {
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
fn create_vm(kvm: &Kvm, memory: &GuestMemory, trace: &TracePoints) -> Result<VmFd, BuildError> {
    let failed = |call| move |error| kvm_error(call, error);
    let vm = retry(|| kvm.create_vm()).map_err(failed("KVM_CREATE_VM"))?;
    trace.record_vm_created();
    vm.set_tss_address(layout::KVM_TSS).map_err(failed("KVM_SET_TSS_ADDR"))?;
    memory::attach(&vm, memory)?;
    vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
    Ok(vm)
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

fn kvm_error(call: &'static str, error: kvm_ioctls::Error) -> BuildError {
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
) -> Result<Arc<Serial>, BuildError> {
    let line = irq::wire(vm, irq::SERIAL_LINE).map_err(AttachError::Irq)?;
    let serial = Arc::new(Serial::new(line, config.into_writer()).map_err(BuildError::EventFd)?);
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

fn create_processors(kvm: &Kvm, vm: &VmFd, vcpus: u8) -> Result<Vec<VcpuFd>, BuildError> {
    let processors = (0..vcpus)
        .map(|index| vm.create_vcpu(index.into()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| kvm_error("KVM_CREATE_VCPU", error))?;
    let mut cpuid = cpuid::Template::new(kvm, vcpus).map_err(|error| kvm_error("KVM_GET_SUPPORTED_CPUID", error))?;
    // Fails on a host whose TSC is not stable: the guest finds out for itself.
    if let Some(Ok(tsc_khz)) = processors.first().map(VcpuFd::get_tsc_khz) {
        cpuid.set_clock(tsc_khz);
    }
    for (index, processor) in (0..).zip(&processors) {
        cpuid.apply(processor, index)?;
        msr::set(processor, index)?;
        lapic::set(processor, index)?;
    }
    Ok(processors)
}

/// Starts a thread for each processor, which waits at the gate of `control`.
fn spawn_processors(
    processors: Vec<VcpuFd>,
    buses: &Buses,
    control: &Arc<Control>,
    trace: &Arc<TracePoints>,
    confinement: Confinement,
) -> Result<(), BuildError> {
    let mut threads = Vec::with_capacity(processors.len());
    let mut failed = None;
    for (index, processor) in (0..).zip(processors) {
        let (control, trace) = (Arc::clone(control), Arc::clone(trace));
        match VcpuThread::spawn(index, processor, buses.clone(), control, trace, confinement) {
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
