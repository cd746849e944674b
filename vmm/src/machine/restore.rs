//! A machine from a directory: nothing boots.

use std::fs::File;
use std::path::Path;

use kvm_ioctls::VcpuFd;
use linux_loader::cmdline::Cmdline;

use devices::GuestMemory;

use super::assemble::{Assembly, kvm_error, open_kvm, seats};
use super::snapshot::IRQCHIPS;
use super::{BuildError, Machine};
use crate::arch::x86_64::cpuid::{FeatureGap, missing_features};
use crate::arch::x86_64::layout;
use crate::config::{MachineConfig, MemoryBacking, MemoryConfig, RestoreMemory};
use crate::memory::lazy::{LazyConfig, LazyError, LazyMemory};
use crate::memory::source::{FileSource, LayeredSource, Source};
use crate::memory::working_set::WorkingSet;
use crate::memory::{self, MemoryError};
use crate::snapshot::{CodecError, Head, Layers, LayersError, MachineState, codec, mapping};
use crate::vcpu::VcpuRestoreError;

/// Why a machine could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// There is no snapshot, or it is not complete.
    #[error("There is no snapshot that can be restored")]
    Snapshot(#[from] LayersError),
    /// Its state file.
    #[error("The snapshot's state cannot be read")]
    State(#[from] CodecError),
    /// The configuration has another number of something.
    #[error("The snapshot has {saved} {what}, the machine's configuration {configured}")]
    Differs {
        /// Of what.
        what: &'static str,
        /// In the snapshot.
        saved: u64,
        /// In the configuration.
        configured: u64,
    },
    /// A device that is not the one in the snapshot.
    #[error("Device {position} does not take its state")]
    Device {
        /// Its place in the order of attachment.
        position: usize,
        /// Why.
        #[source]
        source: devices::virtio::RestoreError,
    },
    /// This host's processor is not enough.
    #[error("This host's processor is not what the guest was told about its own")]
    Cpu(#[from] FeatureGap),
    /// A processor.
    #[error("A processor cannot be restored")]
    Vcpu(#[from] VcpuRestoreError),
    /// Memory that comes page by page.
    #[error("The machine's memory cannot be brought from its template")]
    Lazy(#[from] LazyError),
    /// The machine itself.
    #[error("The machine to restore into cannot be built")]
    Build(#[from] BuildError),
}

impl Machine {
    /// Makes a machine that goes on where the one in `directory` was when it was saved. Its processors wait for
    /// [`start`](Machine::start).
    ///
    /// `config` has what is this process's: files, directories, interfaces, sockets. The numbers of processors and of
    /// bytes of memory, and the devices in their order, must be those of the snapshot; what is said about booting is
    /// not looked at. Memory is a private mapping of the snapshot's, whatever backing is asked for, so that any number
    /// of machines can be restored at a time and share what none of them writes to. Checked are the state and the
    /// length of the memory file; see [`verify`](crate::snapshot::verify) for the rest.
    pub fn restore(config: MachineConfig, directory: &Path) -> Result<Self, RestoreError> {
        Self::restore_with(config, directory, RestoreMemory::Mapped { written: None })
    }

    /// As [`restore`](Self::restore), with memory that comes as `how` says. Memory that comes page by page has the backing that `config` asks
    /// for; whoever loses it ends the machine with [`ExitReason::MemoryLost`](super::ExitReason::MemoryLost). Where it has a source of its own,
    /// there need be no memory file.
    pub fn restore_with(config: MachineConfig, directory: &Path, how: RestoreMemory) -> Result<Self, RestoreError> {
        let mut how = how;
        if let RestoreMemory::Lazy(lazy) = &mut how
            && let Some(source) = lazy.source.take()
        {
            let (head, lazy) = (Head::open(directory)?, std::mem::take(lazy));
            let parts = (head.state(), head.manifest().memory.length, head.identity());
            return Self::restore_parts(config, parts, |config| lazy_memory(config, source, lazy));
        }
        let layers = Layers::open(directory)?;
        let parts = (layers.state(), layers.memory_size(), layers.identity());
        Self::restore_parts(config, parts, |config| match how {
            RestoreMemory::Mapped { written } => {
                let memory = map_memory(&config.memory, &layers)?;
                let mapped = Mapped { template: layers_source(config.memory.size, &layers)?, written };
                Ok((memory, None, Some(mapped)))
            }
            RestoreMemory::Lazy(lazy) => lazy_memory(config, layers_source(config.memory.size, &layers)?, lazy),
        })
    }

    /// From a state, bytes of memory and an identity, with the memory that `memory` makes.
    fn restore_parts(
        config: MachineConfig,
        (state, memory_size, identity): (&[u8], u64, &str),
        memory: impl FnOnce(&MachineConfig) -> Result<Memory, RestoreError>,
    ) -> Result<Self, RestoreError> {
        let state = codec::decode(state)?;
        expect("vCPUs", state.vcpus.len() as u64, config.vcpus.into())?;
        expect("bytes of memory", state.memory_size, config.memory.size)?;
        expect("bytes of memory", memory_size, config.memory.size)?;
        expect("interrupt controllers", state.irqchips.len() as u64, IRQCHIPS.len() as u64)?;
        super::build::check_vcpus(config.vcpus)?;

        // They confine themselves while the machine is made.
        let seats = seats(config.vcpus, config.confinement).map_err(BuildError::from)?;
        let kvm = open_kvm()?;
        let (memory, lazy, mapped) = memory(&config)?;
        // The guest has read it long ago.
        let mut cmdline =
            Cmdline::new(layout::CMDLINE_MAX).map_err(|error| BuildError::from(super::BootError::Cmdline(error)))?;
        let vcpus = config.vcpus;
        let mut assembly = Assembly::new(config, kvm, memory, &mut cmdline, Some(&state.serial))?;
        assembly.restored_from(identity);
        if let Some(Mapped { template, written }) = mapped {
            assembly.mapped_from(template, written);
        }
        lazy.map_or(Ok(()), |lazy| assembly.adopt_lazy(lazy))?;
        let processors = restore_all(&assembly, &state, vcpus).map_err(|error| match assembly.lost_memory() {
            // Whatever did not work, this is why.
            Some(reason) => LazyError::Lost(reason).into(),
            None => error,
        })?;
        let cpuid = state.vcpus.iter().map(|vcpu| vcpu.cpuid().to_vec()).collect();
        Ok(assembly.finish(seats, processors, cpuid)?)
    }
}

/// Guest memory, who brings its pages, and what it is a private mapping of.
type Memory = (GuestMemory, Option<LazyMemory>, Option<Mapped>);

/// What memory is a private mapping of, and the pages of it that are written to first.
struct Mapped {
    template: Box<dyn Source>,
    written: Option<WorkingSet>,
}

/// Private mappings of the memory files. Nothing of them is read.
fn map_memory(config: &MemoryConfig, layers: &Layers) -> Result<GuestMemory, RestoreError> {
    let failed = |source| BuildError::from(MemoryError::File { size: config.size, source });
    let file = layers.whole().try_clone().map_err(failed)?;
    let pieces = layers.pieces()?;
    let config = MemoryConfig { backing: MemoryBacking::File { file, shared: false }, ..*config };
    let memory = memory::reserve(&config).map_err(BuildError::from)?;
    if !pieces.is_empty() {
        mapping::overlay(&memory, &pieces, mapping::MAX_MAPPINGS).map_err(failed)?;
        memory::settle(&config, &memory).map_err(BuildError::from)?;
    }
    Ok(memory)
}

/// Fresh memory, whose pages come from `source` from now on.
fn lazy_memory(config: &MachineConfig, source: Box<dyn Source>, lazy: LazyConfig) -> Result<Memory, RestoreError> {
    // Making all pages at once would ask for each of them.
    let whole = config.memory.prealloc;
    let fresh = MemoryConfig {
        backing: config.memory.backing.try_clone().map_err(LazyError::Backing)?,
        prealloc: false,
        ..config.memory
    };
    let memory = memory::reserve(&fresh).map_err(BuildError::from)?;
    let started = LazyMemory::start(&memory, source, lazy, config.confinement)?;
    if whole || !config.vhost_user.is_empty() {
        // Other processes have mappings of their own, whose faults are not ours: they would find zeros.
        started.complete()?;
    }
    Ok((memory, Some(started), None))
}

/// What the memory files have, page by page.
fn layers_source(size: u64, layers: &Layers) -> Result<Box<dyn Source>, RestoreError> {
    let failed = |source| BuildError::from(MemoryError::File { size, source });
    let open = |file: &File| file.try_clone().and_then(FileSource::new).map_err(failed);
    let whole = open(layers.whole())?;
    let pieces = layers.pieces()?;
    if pieces.is_empty() {
        return Ok(Box::new(whole));
    }
    let pieces: Vec<_> = pieces.into_iter().map(|(piece, file)| (piece.bytes(), piece.layer, file)).collect();
    Ok(Box::new(LayeredSource::new(whole, &pieces).map_err(failed)?))
}

fn restore_all(assembly: &Assembly, state: &MachineState, vcpus: u8) -> Result<Vec<VcpuFd>, RestoreError> {
    restore_devices(assembly, state)?;
    let processors = assembly.create_vcpus(vcpus)?;
    restore_processors(assembly, state, &processors)?;
    // Not before the interrupt controllers are what they were.
    assembly.serial().interrupt_again();
    Ok(processors)
}

fn expect(what: &'static str, saved: u64, configured: u64) -> Result<(), RestoreError> {
    if saved == configured { Ok(()) } else { Err(RestoreError::Differs { what, saved, configured }) }
}

fn restore_devices(assembly: &Assembly, state: &MachineState) -> Result<(), RestoreError> {
    let transports = assembly.transports();
    let pairs = transports.iter().zip(&state.devices).enumerate();
    for (position, (transport, state)) in pairs {
        transport.restore(state).map_err(|source| RestoreError::Device { position, source })?;
    }
    expect("virtio devices", state.devices.len() as u64, transports.len() as u64)
}

/// Interrupt controllers before processors, whose local APICs refer to them, and the clock before processors read it.
fn restore_processors(assembly: &Assembly, state: &MachineState, processors: &[VcpuFd]) -> Result<(), RestoreError> {
    let vm = assembly.vm();
    for (chip, chip_id) in state.irqchips.iter().zip(IRQCHIPS) {
        expect("as the identifier of an interrupt controller", chip.chip_id.into(), chip_id.into())?;
        vm.set_irqchip(chip).map_err(|error| kvm_error("KVM_SET_IRQCHIP", error))?;
    }
    vm.set_clock(&state.clock).map_err(|error| kvm_error("KVM_SET_CLOCK", error))?;
    let host = assembly.cpuid(processors)?;
    if let Some(first) = state.vcpus.first() {
        missing_features(first.cpuid(), host.entries())?;
    }
    for ((index, processor), state) in (0u8..).zip(processors).zip(&state.vcpus) {
        state.restore(processor, index)?;
    }
    Ok(())
}
