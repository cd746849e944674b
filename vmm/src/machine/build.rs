//! Everything up to the guest's first instruction.

use std::io;
use std::thread;

use devices::GuestMemory;
use kvm_ioctls::{Kvm, VcpuFd};
use linux_loader::cmdline::Cmdline;

use super::Machine;
use super::assemble::{Assembly, open_kvm, seats};
use super::attach::AttachError;
use super::boot::{self, BootError, Loaded};
use crate::arch::x86_64::{ArchError, cpuid, lapic, layout, msr, regs};
use crate::config::{MachineConfig, Placement};
use crate::memory::{self, MemoryError};
use crate::vcpu::SpawnError;

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
        let (vcpus, size) = (config.vcpus, config.memory.size);
        check_vcpus(vcpus)?;
        let mut cmdline = boot::parse_cmdline(&config.boot)?;
        // They confine themselves while the machine is made.
        let seats = seats(vcpus, config.confinement)?;
        let kvm = open_kvm()?;
        let memory = memory::reserve(&config.memory)?;
        // What is mapped over the memory is not in the file that other processes map.
        let images = if config.memory.backing.is_private() { config.images } else { Placement::Copied };
        let (loaded, assembly) = load_and_assemble(config, images, kvm, memory, &mut cmdline)?;
        let entry = boot::describe(assembly.memory(), size, vcpus, &loaded, &cmdline)?;

        let processors = assembly.create_vcpus(vcpus)?;
        let cpuid = assembly.cpuid(&processors)?;
        set_up(&processors, &cpuid)?;
        if let Some(boot_processor) = processors.first() {
            regs::set_boot_processor(boot_processor, entry)?;
        }
        assembly.finish(seats, processors, (0..vcpus).map(|index| cpuid.entries_of(index)).collect())
    }
}

/// Bytes of kernel and initrd from which on copying them takes longer than starting a thread for that.
const LARGE: u64 = 256 << 10;

/// Copies kernel and initrd on one processor while the devices are made on another: the two are most of what building a
/// machine takes, unless they are small. Images that are mapped come first, as KVM is told of each mapping in memory that it knows.
fn load_and_assemble(
    config: MachineConfig,
    images: Placement,
    kvm: Kvm,
    memory: GuestMemory,
    cmdline: &mut Cmdline,
) -> Result<(Loaded, Assembly), BuildError> {
    let boot = config.boot.clone();
    if images == Placement::Mapped || boot::bytes(&boot) < LARGE {
        let loaded = boot::load(&memory, &boot, images)?;
        return Ok((loaded, Assembly::new(config, kvm, memory, cmdline, None)?));
    }
    let target = memory.clone();
    thread::scope(|scope| {
        let loading = scope.spawn(move || boot::load(&target, &boot, images));
        let assembly = Assembly::new(config, kvm, memory, cmdline, None);
        let loaded = loading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((loaded, assembly?))
    })
}

pub(super) fn check_vcpus(vcpus: u8) -> Result<(), BuildError> {
    if vcpus == 0 || vcpus > layout::MAX_VCPUS { Err(BuildError::Vcpus(vcpus)) } else { Ok(()) }
}

/// Makes fresh processors what a kernel expects.
fn set_up(processors: &[VcpuFd], cpuid: &cpuid::Template) -> Result<(), BuildError> {
    for (index, processor) in (0..).zip(processors) {
        cpuid.apply(processor, index)?;
        msr::set(processor, index)?;
        lapic::set(processor, index)?;
    }
    Ok(())
}
