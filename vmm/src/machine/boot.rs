//! What stands in memory and in the registers when the guest's first instruction runs.

use std::fs;
use std::path::PathBuf;

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::load_cmdline;

use devices::GuestMemory;

use crate::arch::x86_64::regs::{self, Entry};
use crate::arch::x86_64::{ArchError, boot_params, layout, mptable, pvh};
use crate::config::BootConfig;
use crate::kernel::{self, BootImages, Initrd, KernelError, LoadedKernel};
use crate::memory::image::Placement;

/// Why a machine cannot boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel or initrd.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The boot structures.
    #[error("Cannot prepare the guest's memory for the kernel")]
    Arch(#[from] ArchError),
    /// Text that cannot be a command line, or is too long for one.
    #[error(
        "The kernel command line is not possible: it may have {} printable ASCII characters, devices included",
        layout::CMDLINE_MAX - 1
    )]
    Cmdline(#[source] linux_loader::cmdline::Error),
    /// The command line could not be written.
    #[error("Cannot write the kernel command line to guest memory")]
    CmdlineMemory(#[source] linux_loader::loader::Error),
}

/// Parses the configured command line, to which devices are appended.
pub(super) fn parse_cmdline(config: &BootConfig) -> Result<Cmdline, BootError> {
    Cmdline::try_from(&config.cmdline, layout::CMDLINE_MAX).map_err(BootError::Cmdline)
}

/// Kernel and initrd in guest memory.
pub(super) struct Loaded {
    kernel: LoadedKernel,
    initrd: Option<Initrd>,
}

/// How much there is to load. What cannot be told will not be loaded either.
pub(super) fn bytes(config: &BootConfig) -> u64 {
    let size = |path: &PathBuf| fs::metadata(path).map_or(0, |metadata| metadata.len());
    config.initrd.iter().chain([&config.kernel]).map(size).fold(0, u64::saturating_add)
}

/// Loads kernel and initrd. If they are mapped, best before KVM knows the memory: it is told of every mapping that is
/// replaced in memory that it knows.
pub(super) fn load(memory: &GuestMemory, config: &BootConfig, placement: Placement) -> Result<Loaded, BootError> {
    let kernel = kernel::load(memory, &config.kernel, placement)?;
    let initrd = match &config.initrd {
        Some(path) => Some(kernel::load_initrd(memory, path, &kernel, placement)?),
        None => None,
    };
    Ok(Loaded { kernel, initrd })
}

/// Writes what the kernel reads about the machine, and returns how vCPU 0 enters it.
pub(super) fn describe(
    memory: &GuestMemory,
    memory_size: u64,
    vcpus: u8,
    loaded: &Loaded,
    cmdline: &Cmdline,
) -> Result<Entry, BootError> {
    let Loaded { kernel, initrd } = *loaded;
    load_cmdline(memory, layout::CMDLINE, cmdline).map_err(BootError::CmdlineMemory)?;
    let cmdline_length = cmdline.as_cstring().map_err(BootError::Cmdline)?.count_bytes();
    let images = BootImages { cmdline_length, initrd };

    match kernel.entry {
        Entry::Pvh(_) => pvh::write(memory, memory_size, &images)?,
        Entry::Linux64(_) | Entry::Linux32(_) => {
            boot_params::write(memory, memory_size, &images, kernel.header.as_ref())?;
        }
    }
    mptable::write(memory, vcpus)?;
    regs::write_tables(memory, kernel.entry)?;
    Ok(kernel.entry)
}
