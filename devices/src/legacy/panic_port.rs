//! The port by which a guest says that it panicked or has shut down: the pvpanic protocol
//! (QEMU's `docs/specs/pvpanic`).

use super::{EventSink, MachineEvent};
use crate::BusDevice;

/// The I/O port; one byte wide.
pub const PANIC_PORT: u16 = 0x505;

const PANICKED: u8 = 1 << 0;
const SHUTDOWN: u8 = 1 << 2;

/// Reads as the set of events that it understands; a write is an event.
pub struct PanicPort {
    events: EventSink,
}

impl PanicPort {
    /// A port that sends [`MachineEvent::Panicked`] and [`MachineEvent::Shutdown`].
    pub fn new(events: EventSink) -> Self {
        Self { events }
    }
}

impl BusDevice for PanicPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, [byte]) = (offset, data) {
            *byte = PANICKED | SHUTDOWN;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (0, [event]) = (offset, data) else { return };
        // A panic is the more urgent news should a guest report both.
        if event & PANICKED != 0 {
            (self.events)(MachineEvent::Panicked);
        } else if event & SHUTDOWN != 0 {
            (self.events)(MachineEvent::Shutdown);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::event::recorder;

    #[test]
    fn a_write_is_an_event() {
        let (sink, events) = recorder();
        let port = PanicPort::new(sink);
        for (value, expected) in [
            (1, &[MachineEvent::Panicked][..]),
            (4, &[MachineEvent::Shutdown]),
            (5, &[MachineEvent::Panicked]),
            (0, &[]),
            (2, &[]),
        ] {
            port.write(0, &[value]);
            assert_eq!(events(), expected, "{value}");
        }
        port.write(1, &[1]);
        port.write(0, &[1, 0]);
        assert!(events().is_empty());
    }

    #[test]
    fn reads_tell_what_is_supported() {
        let port = PanicPort::new(recorder().0);
        let mut byte = [0];
        port.read(0, &mut byte);
        assert_eq!(byte, [5]);
        let mut word = [0; 2];
        port.read(0, &mut word);
        assert_eq!(word, [0, 0]);
    }
}
