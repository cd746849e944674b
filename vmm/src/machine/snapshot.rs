//! Writing a machine to a directory.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, PoisonError};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip};
use sha2::{Digest, Sha256};

use devices::virtio::{MmioTransport, SaveError, TransportState};

use super::{Hardware, Machine};
use crate::snapshot::manifest::{FORMAT, StateFile};
use crate::snapshot::{MANIFEST, MEMORY, MachineState, Manifest, STATE, SnapshotError, codec, hex, write_memory};
use crate::vcpu::VcpuState;

/// The interrupt controllers that KVM emulates.
pub(super) const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl Machine {
    /// Pauses the machine and writes it to `directory`, which is made where it does not exist. A snapshot that is there
    /// already is replaced, file by file with new ones, so that machines that were restored from it keep what they
    /// have mapped; until the end there is none in the directory.
    ///
    /// The machine stays paused, and can go on whatever the outcome. Files are for this user alone: they hold the
    /// guest's secrets.
    pub fn snapshot(&self, directory: &Path) -> Result<(), SnapshotError> {
        self.pause()?;
        let hardware = self.hardware.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(hardware) = hardware.as_ref() else {
            // Stopped meanwhile.
            return Err(self.pause().err().map_or(SnapshotError::Gone, Into::into));
        };
        let parked = Parked::new(&hardware.transports);
        // Saving makes KVM write to guest memory (kvmclock, the steal time): before the memory is.
        let state = self.save_state(hardware, &parked)?;
        self.write(directory, hardware, &state)
    }

    fn save_state(&self, hardware: &Hardware, parked: &Parked<'_>) -> Result<MachineState, SnapshotError> {
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

    fn write(&self, directory: &Path, hardware: &Hardware, state: &MachineState) -> Result<(), SnapshotError> {
        fs::create_dir_all(directory).map_err(SnapshotError::write(directory))?;
        let path = directory.join(MANIFEST);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(SnapshotError::write(&path)(error));
            }
            _ => {}
        }
        let bytes = codec::encode(state)?;
        let memory = replace(directory, MEMORY, |file, path| write_memory(&hardware.memory, file, path))?;
        let put = |bytes: &[u8]| {
            let bytes = bytes.to_owned();
            move |file: &File, path: &Path| (&*file).write_all(&bytes).map_err(SnapshotError::write(path))
        };
        replace(directory, STATE, put(&bytes))?;
        let manifest = Manifest {
            format: FORMAT,
            writer: env!("CARGO_PKG_VERSION").into(),
            machine: self.name.clone(),
            vcpus: u8::try_from(state.vcpus.len()).unwrap_or(u8::MAX),
            devices: state.devices.iter().map(|device| device.device_type).collect(),
            state: StateFile { length: bytes.len() as u64, sha256: hex(&Sha256::digest(&bytes)) },
            memory,
        };
        let text = serde_json::to_vec_pretty(&manifest).map_err(|error| SnapshotError::write(&path)(error.into()))?;
        replace(directory, MANIFEST, put(&text))
    }
}

fn memory_size(hardware: &Hardware) -> u64 {
    use vm_memory::{GuestMemory as _, GuestMemoryRegion};
    hardware.memory.iter().map(GuestMemoryRegion::len).sum()
}

/// Writes a new file, which then takes the place of the old one.
fn replace<T>(
    directory: &Path,
    name: &str,
    write: impl FnOnce(&File, &Path) -> Result<T, SnapshotError>,
) -> Result<T, SnapshotError> {
    let (path, new) = (directory.join(name), directory.join(format!("{name}.new")));
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
    let file = file.map_err(SnapshotError::write(&new))?;
    let written = write(&file, &new)?;
    file.sync_all().and_then(|()| fs::rename(&new, &path)).map_err(SnapshotError::write(&path))?;
    Ok(written)
}

/// Devices that touch nothing until this is dropped.
struct Parked<'a>(&'a [Arc<MmioTransport>]);

impl<'a> Parked<'a> {
    fn new(transports: &'a [Arc<MmioTransport>]) -> Self {
        transports.iter().for_each(|transport| transport.park());
        Self(transports)
    }

    fn save(&self) -> Result<Vec<TransportState>, (usize, SaveError)> {
        let saved = self.0.iter().enumerate();
        saved.map(|(position, transport)| transport.save().map_err(|error| (position, error))).collect()
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|transport| transport.unpark());
    }
}
