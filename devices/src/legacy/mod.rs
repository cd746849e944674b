//! Devices that a Linux kernel without ACPI and PCI still wants, and the ports by which a guest
//! says how it fares.

mod console_tail;
mod debug_port;
mod event;
mod i8042;
mod panic_port;
mod serial;

pub use console_tail::{CONSOLE_TAIL_SIZE, ConsoleTail};
pub use debug_port::{DEBUG_PORT, DebugPort};
pub use event::{EventSink, MachineEvent};
pub use i8042::{I8042, I8042_PORT, I8042_PORT_COUNT};
pub use panic_port::{PANIC_PORT, PanicPort};
pub use serial::{SERIAL_PORT, SERIAL_PORT_COUNT, Serial, SerialState};
