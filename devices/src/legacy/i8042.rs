//! The one thing that is left of the keyboard controller: resetting the machine (`reboot=k`).

use super::{EventSink, MachineEvent};
use crate::BusDevice;

/// First I/O port: data. The command and status port is 4 further.
pub const I8042_PORT: u16 = 0x60;

/// Ports from [`I8042_PORT`] on that the device covers.
pub const I8042_PORT_COUNT: u16 = 5;

const COMMAND: u64 = 4;
/// Pulse the processor's reset line.
const RESET: u8 = 0xfe;

/// A keyboard controller without a keyboard. All its ports read 0: no data, input buffer empty.
pub struct I8042 {
    events: EventSink,
}

impl I8042 {
    /// A controller that sends [`MachineEvent::Reset`].
    pub fn new(events: EventSink) -> Self {
        Self { events }
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [RESET] {
            (self.events)(MachineEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::event::recorder;

    #[test]
    fn only_the_reset_command_on_the_command_port_resets() {
        let (sink, events) = recorder();
        let device = I8042::new(sink);
        for (offset, data) in
            [(0, &[RESET][..]), (COMMAND, &[0xaa]), (COMMAND, &[RESET, 0]), (COMMAND, &[]), (9, &[RESET])]
        {
            device.write(offset, data);
        }
        assert!(events().is_empty());
        device.write(COMMAND, &[RESET]);
        assert_eq!(events(), [MachineEvent::Reset]);
    }

    #[test]
    fn status_says_that_commands_are_welcome() {
        let device = I8042::new(recorder().0);
        let mut status = [0];
        device.read(COMMAND, &mut status);
        assert_eq!(status, [0]);
    }
}
