//! A machine and nothing else: builds it around the kernel given, runs it to its end, and prints
//! nanoseconds from the creation of the VM to the guest's word on the debug port.

use anyhow::{Context, Result, ensure};
use vmm::{BootConfig, ExitReason, Machine, MachineConfig, MemoryConfig};

fn main() -> Result<()> {
    let kernel = std::env::args_os().nth(1).context("A kernel image is needed")?;
    let boot = BootConfig { kernel: kernel.into(), initrd: None, cmdline: String::new() };
    let machine = Machine::build(MachineConfig::new("tiny", MemoryConfig::from_mib(128), boot))?;
    machine.start()?;
    let reason = machine.wait();
    ensure!(reason == ExitReason::TripleFault, "{reason}");
    let trace = machine.trace();
    let created = trace.vm_created().context("No VM was created")?;
    let said = trace.guest_init().context("The guest said nothing")?;
    println!("{}", said - created);
    Ok(())
}
