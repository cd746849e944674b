//! What boots.

use std::path::PathBuf;

/// What a Linux guest of this machine should be told in any case: console on the serial port;
/// a panic or reboot ends the machine through the keyboard controller at once; no PCI and no ACPI
/// to probe for; no probing of keyboard and mouse either; no comparing of clocks twice a second, for which a guest that
/// does nothing would wake: KVM answers for the processor's counter.
pub const BASE_CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 pci=off acpi=off \
     i8042.nokbd i8042.noaux 8250.nr_uarts=1 tsc=nowatchdog";

/// Kernel, initrd and command line.
#[derive(Debug, Clone)]
pub struct BootConfig {
    /// The kernel image: ELF, bzImage or flat, see [`crate::kernel`].
    pub kernel: PathBuf,
    /// The initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// The kernel command line. The machine appends where its virtio devices are.
    pub cmdline: String,
}
