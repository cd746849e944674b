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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BusDevice;

    /// Widths that a processor has, and those that only a mistake of the bus could make.
    #[test]
    fn ports_take_every_offset_and_width() {
        let (sink, _events) = event::recorder();
        let devices: [Box<dyn BusDevice>; 3] =
            [Box::new(I8042::new(sink.clone())), Box::new(PanicPort::new(sink)), Box::new(DebugPort::new())];
        for device in devices {
            for offset in (0..32).chain([255, 256, u64::MAX - 1, u64::MAX]) {
                for width in [0, 1, 2, 3, 4, 8, 16] {
                    for value in [0x00, 0x41, 0xfe, 0xff] {
                        device.write(offset, &vec![value; width]);
                        device.read(offset, &mut vec![value; width]);
                    }
                }
            }
        }
    }
}
