//! Writing a machine to a directory.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, PoisonError};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip};
use sha2::{Digest, Sha256};

use devices::virtio::{MmioTransport, SaveError, TransportState};

use super::{Hardware, Machine};
use crate::snapshot::manifest::{Base, FORMAT, MemoryFile, StateFile};
use crate::snapshot::{
    Draft, Layers, MANIFEST, MAX_LAYERS, MEMORY, MachineState, Manifest, STATE, SnapshotError, codec, dirty, hex,
    write_memory, write_noted,
};
use crate::vcpu::VcpuState;

/// The interrupt controllers that KVM emulates.
pub(super) const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl Machine {
    /// Keeps track from now on of what is written to guest memory, so that snapshots can be differences. The first can be
    /// one to the snapshot that the machine was restored from, where this is called before it is
    /// [started](Self::start); else to the first that it is saved to. The guest pays for it with an exit for each page
    /// that it writes to for the first time after a snapshot.
    pub fn track_writes(&self) -> Result<(), SnapshotError> {
        let hardware = self.hardware.lock().unwrap_or_else(PoisonError::into_inner);
        let hardware = hardware.as_ref().ok_or(SnapshotError::Gone)?;
        if !hardware.writes.is_kept() {
            dirty::begin(&hardware.vm, &hardware.memory)?;
            hardware.writes.keep();
        }
        Ok(())
    }

    /// Pauses the machine and writes it to `directory`, which is made where it does not exist. A snapshot that is there
    /// already is replaced by new files when all are written, so that machines that were restored from it keep what
    /// they have mapped.
    ///
    /// The machine stays paused, and can go on whatever the outcome. Files are for this user alone: they hold the
    /// guest's secrets.
    pub fn snapshot(&self, directory: &Path) -> Result<(), SnapshotError> {
        self.save(directory, None)
    }

    /// As [`snapshot`](Self::snapshot), with the memory alone that was written since the one in `base`, which must be the
    /// last that the machine was saved to or restored from; see [`track_writes`](Self::track_writes). It is needed for
    /// as long as the new one is.
    ///
    /// What was written is forgotten only when it is saved: after an error, it is in the next difference.
    pub fn snapshot_diff(&self, directory: &Path, base: &Path) -> Result<(), SnapshotError> {
        self.save(directory, Some(base))
    }

    fn save(&self, directory: &Path, base: Option<&Path>) -> Result<(), SnapshotError> {
        // Before the guest stands still for nothing.
        self.live.expect_idle()?;
        self.pause()?;
        let mut hardware = self.hardware.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(hardware) = hardware.as_mut() else {
            // Stopped meanwhile.
            return Err(self.pause().err().map_or(SnapshotError::Gone, Into::into));
        };
        self.live.expect_idle()?;
        let base = base.map(|base| base_for(hardware, directory, base)).transpose()?;
        if !hardware.writes.is_kept() {
            // Devices go on after this, whatever comes of it.
            hardware.base = None;
        }
        if let Some(lazy) = self.lazy.as_ref().filter(|_| base.is_none()) {
            // What has not been asked for is in the template, and belongs to the snapshot as well. A difference has what was
            // written, which is here.
            lazy.complete()?;
        }
        let parked = Parked::new(hardware.transports.clone());
        // Saving makes KVM write to guest memory (kvmclock, the steal time): before the memory is.
        let state = self.save_state(hardware, &parked)?;
        if hardware.writes.is_kept() {
            dirty::collect(&hardware.vm, &hardware.memory, &hardware.writes)?;
        }
        let saved = self.write(directory, hardware, &state, base)?;
        hardware.saved_as(saved);
        Ok(())
    }

    pub(super) fn save_state(&self, hardware: &Hardware, parked: &Parked) -> Result<MachineState, SnapshotError> {
        let kvm = |call| move |source| SnapshotError::Kvm { call, source };
        let devices = parked.save().map_err(|(position, source)| SnapshotError::Device { position, source })?;
        let msrs = hardware.kvm.get_msr_index_list().map_err(kvm("KVM_GET_MSR_INDEX_LIST"))?;
        let processors = self.control.threads().iter().zip(&hardware.cpuid);
        let vcpus = (0u8..).zip(processors).map(|(index, (thread, cpuid))| {
            let saved = thread.with_vcpu(|vcpu| VcpuState::save(vcpu, index, cpuid, msrs.as_slice()));
            saved.ok_or(SnapshotError::Gone)?.map_err(SnapshotError::from)
        });
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        let irqchips = IRQCHIPS.iter().map(|chip_id| {
            let mut chip = kvm_irqchip { chip_id: *chip_id, ..Default::default() };
            hardware.vm.get_irqchip(&mut chip).map(|()| chip)
        });
        let irqchips = irqchips.collect::<Result<_, _>>().map_err(kvm("KVM_GET_IRQCHIP"))?;
        let mut clock = hardware.vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?;
        // It goes on from there, whatever time it is when it is restored.
        clock.flags = 0;
        let memory_size = memory_size(hardware);
        Ok(MachineState { memory_size, vcpus, irqchips, clock, serial: self.serial.save(), devices })
    }

    /// Returns the identity of what was written.
    fn write(
        &self,
        directory: &Path,
        hardware: &Hardware,
        state: &MachineState,
        base: Option<Layers>,
    ) -> Result<String, SnapshotError> {
        let mut draft = Draft::begin(directory)?;
        let (memory, base) = match base {
            None => (draft.put(MEMORY, |file, path| write_memory(&hardware.memory, file, path))?, None),
            Some(base) => {
                let put = |file: &File, path: &Path| write_noted(&hardware.memory, &hardware.writes, file, path);
                let (memory, pages) = draft.put(MEMORY, put)?;
                draft.put_base(base.directory())?;
                (memory, Some(Base { manifest: base.identity().to_owned(), pages }))
            }
        };
        self.publish(draft, directory, state, memory, base)
    }

    /// Adds all else to a draft that has the memory, and puts it in its place. Returns its identity.
    pub(super) fn publish(
        &self,
        draft: Draft<'_>,
        directory: &Path,
        state: &MachineState,
        memory: MemoryFile,
        base: Option<Base>,
    ) -> Result<String, SnapshotError> {
        let bytes = codec::encode(state)?;
        let put = |bytes: &[u8]| {
            let bytes = bytes.to_owned();
            move |file: &File, path: &Path| (&*file).write_all(&bytes).map_err(SnapshotError::write(path))
        };
        draft.put(STATE, put(&bytes))?;
        let manifest = Manifest {
            format: FORMAT,
            writer: env!("CARGO_PKG_VERSION").into(),
            machine: self.name.clone(),
            vcpus: u8::try_from(state.vcpus.len()).unwrap_or(u8::MAX),
            devices: state.devices.iter().map(|device| device.device_type).collect(),
            state: StateFile { length: bytes.len() as u64, sha256: hex(&Sha256::digest(&bytes)) },
            memory,
            base,
        };
        let path = directory.join(MANIFEST);
        let text = serde_json::to_vec_pretty(&manifest).map_err(|error| SnapshotError::write(&path)(error.into()))?;
        draft.put(MANIFEST, put(&text))?;
        draft.publish()?;
        Ok(hex(&Sha256::digest(&text)))
    }
}

impl Hardware {
    /// What was written is in a snapshot of this identity, and nothing was written since.
    fn saved_as(&mut self, identity: String) {
        self.writes.clear();
        self.base = self.writes.is_kept().then_some(identity);
    }
}

/// The snapshot in `base`, which a difference can be saved to.
fn base_for(hardware: &Hardware, directory: &Path, base: &Path) -> Result<Layers, SnapshotError> {
    if let Some(position) = hardware.transports.iter().position(|transport| !transport.writes_are_known()) {
        return Err(SnapshotError::Untold { position });
    }
    let layers = Layers::open(base).map_err(|source| SnapshotError::NoBase { base: base.to_owned(), source })?;
    if !hardware.writes.is_kept() || hardware.base.as_deref() != Some(layers.identity()) {
        return Err(SnapshotError::NotTheLast { base: base.to_owned() });
    }
    if layers.directories().count() == MAX_LAYERS {
        return Err(SnapshotError::TooMany { base: base.to_owned() });
    }
    // One that does not exist is none of them.
    if directory.canonicalize().is_ok_and(|directory| layers.directories().any(|layer| layer == directory)) {
        return Err(SnapshotError::InPlace { directory: directory.to_owned() });
    }
    Ok(layers)
}

fn memory_size(hardware: &Hardware) -> u64 {
    use vm_memory::{GuestMemory as _, GuestMemoryRegion};
    hardware.memory.iter().map(GuestMemoryRegion::len).sum()
}

/// Devices that touch nothing until this is dropped.
pub(super) struct Parked(Vec<Arc<MmioTransport>>);

impl Parked {
    pub(super) fn new(transports: Vec<Arc<MmioTransport>>) -> Self {
        transports.iter().for_each(|transport| transport.park());
        Self(transports)
    }

    fn save(&self) -> Result<Vec<TransportState>, (usize, SaveError)> {
        let saved = self.0.iter().enumerate();
        saved.map(|(position, transport)| transport.save().map_err(|error| (position, error))).collect()
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        self.0.iter().for_each(|transport| transport.unpark());
    }
}
