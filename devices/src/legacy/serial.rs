//! A 16550 serial port: the guest's console.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ConsoleTail;
use crate::BusDevice;

/// First I/O port of the first serial port, `ttyS0`. Its interrupt is 4.
pub const SERIAL_PORT: u16 = 0x3f8;

/// Ports from [`SERIAL_PORT`] on that the device covers.
pub const SERIAL_PORT_COUNT: u16 = 8;

/// In the interrupt identification register: nothing is pending.
const NO_INTERRUPT: u8 = 1;

/// A serial port.
///
/// What the guest writes goes to a sink byte by byte and is lost where the sink does not take it:
/// a guest must not be able to make its console grow in this process, nor be held up by who reads
/// it. Wrap a sink in a `LineWriter` where a system call for each byte is too much. The end of the
/// output is kept in a [`ConsoleTail`] in any case.
pub struct Serial {
    uart: Mutex<Uart>,
    line: Arc<EventFd>,
    tail: ConsoleTail,
    drained: Arc<EventFd>,
}

type Uart = vm_superio::Serial<Line, Drained, Output>;

impl Serial {
    /// A port that interrupts through `line` (an irqfd, edge-triggered) and writes to `sink`,
    /// which should not block.
    ///
    /// Fails when no event descriptor can be made.
    pub fn new(line: EventFd, sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let tail = ConsoleTail::default();
        let output = Output { sink, tail: tail.clone() };
        let drained = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let line = Arc::new(line);
        let uart = vm_superio::Serial::with_events(Line(Arc::clone(&line)), Drained(Arc::clone(&drained)), output);
        Ok(Self { uart: Mutex::new(uart), line, tail, drained })
    }

    /// A port as it was saved; `None` when the state holds more input than its buffer.
    pub fn restored(line: EventFd, sink: Box<dyn Write + Send>, state: &SerialState) -> Option<Self> {
        let tail = ConsoleTail::default();
        let output = Output { sink, tail: tail.clone() };
        let drained = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).ok()?);
        let events = Drained(Arc::clone(&drained));
        let line = Arc::new(line);
        let uart = vm_superio::Serial::from_state(&state.registers(), Line(Arc::clone(&line)), events, output).ok()?;
        Some(Self { uart: Mutex::new(uart), line, tail, drained })
    }

    /// What a snapshot needs. The tail is not part of it: it is this process's.
    pub fn save(&self) -> SerialState {
        SerialState::of(&self.lock().state())
    }

    /// Raises the interrupt once more that the port tells of, if it does: when the machine was saved it may have been on
    /// its way, and a driver that is not told of an empty transmitter never sends again. One too many is harmless.
    pub fn interrupt_again(&self) {
        if self.lock().state().interrupt_identification & NO_INTERRUPT == 0 {
            // A full counter means that one is on its way.
            let _ = self.line.write(1);
        }
    }

    /// The end of what the guest wrote.
    pub fn tail(&self) -> &ConsoleTail {
        &self.tail
    }

    /// Sends input to the guest and returns how many bytes fit: the port's buffer has 64.
    pub fn send(&self, input: &[u8]) -> usize {
        // An error is a full buffer, or an interrupt that is pending already.
        self.lock().enqueue_raw_bytes(input).unwrap_or_default()
    }

    /// Readable once the guest has taken all input. Whoever waits for it reads it, and then sends more.
    pub fn drained(&self) -> &EventFd {
        &self.drained
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The registers and the input that the guest has not read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

impl SerialState {
    fn of(state: &vm_superio::SerialState) -> Self {
        Self {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer.clone(),
        }
    }

    fn registers(&self) -> vm_superio::SerialState {
        let [baud_divisor_low, baud_divisor_high] = self.divisor;
        vm_superio::SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.input.clone(),
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (Ok(register), [byte]) = (u8::try_from(offset), data) {
            *byte = self.lock().read(register);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(register), [byte]) = (u8::try_from(offset), data) {
            // An error is a byte that the sink did not take, or an interrupt that is pending.
            let _ = self.lock().write(register, *byte);
        }
    }
}

/// The interrupt line.
struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells of a buffer that has become empty.
struct Drained(Arc<EventFd>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // Fails only when it has been readable for ages.
        let _ = self.0.write(1);
    }
}

struct Output {
    sink: Box<dyn Write + Send>,
    tail: ConsoleTail,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.tail.push(*byte);
        }
        // One try: a sink that is full now must not hold up the guest.
        let _ = self.sink.write(bytes);
        Ok(bytes.len())
    }

    /// Called after each byte; when to flush is the sink's own affair.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::CONSOLE_TAIL_SIZE;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const MODEM_CONTROL: u64 = 4;
    const LINE_STATUS: u64 = 5;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Full;

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port(sink: impl Write + Send + 'static) -> (Serial, EventFd) {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        (Serial::new(line.try_clone().unwrap(), Box::new(sink)).unwrap(), line)
    }

    fn read(serial: &Serial, offset: u64) -> u8 {
        let mut byte = [0];
        serial.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn output_goes_to_the_sink_and_the_tail() {
        let sink = Sink::default();
        let (serial, _line) = port(sink.clone());
        for byte in b"hello" {
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(*sink.0.lock().unwrap(), b"hello");
        assert_eq!(serial.tail().snapshot(), b"hello");
    }

    #[test]
    fn input_interrupts_and_is_read_back() {
        let (serial, line) = port(Sink::default());
        serial.write(INTERRUPT_ENABLE, &[1]);
        assert_eq!(serial.send(b"ok"), 2);
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(read(&serial, LINE_STATUS) & 1, 1);
        assert_eq!(read(&serial, DATA), b'o');
        assert!(serial.drained().read().is_err());
        assert_eq!(read(&serial, DATA), b'k');
        assert_eq!(serial.drained().read().unwrap(), 1);
        assert_eq!(read(&serial, LINE_STATUS) & 1, 0);
    }

    #[test]
    fn what_is_pending_is_told_again_after_a_restore() {
        let (serial, line) = port(Sink::default());
        let restored = |serial: &Serial| {
            let line = EventFd::new(EFD_NONBLOCK).unwrap();
            let other = Serial::restored(line.try_clone().unwrap(), Box::new(Sink::default()), &serial.save()).unwrap();
            // What came while the interrupt controllers were not restored is lost with their state.
            let _ = line.read();
            other.interrupt_again();
            (other, line)
        };
        assert!(restored(&serial).1.read().is_err(), "Nothing is pending");
        // The transmitter is empty, and the driver is told; then it sends again.
        serial.write(INTERRUPT_ENABLE, &[2]);
        serial.write(DATA, b"x");
        assert_eq!(line.read().unwrap(), 1);
        let (restored_once, line) = restored(&serial);
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(restored_once.save(), serial.save());
        // The driver reads what it was interrupted for.
        assert_eq!(read(&restored_once, 2) & 0xf, 2);
        assert!(restored(&restored_once).1.read().is_err());
    }

    #[test]
    fn input_is_bounded() {
        let (serial, _line) = port(Sink::default());
        assert_eq!(serial.send(&[b'x'; 65]), 64);
        assert_eq!(serial.send(b"x"), 0);
    }

    #[test]
    fn loopback_is_bounded() {
        let (serial, _line) = port(Sink::default());
        serial.write(MODEM_CONTROL, &[0x10]);
        for _ in 0..1000 {
            serial.write(DATA, b"x");
        }
        let mut looped = 0;
        while read(&serial, LINE_STATUS) & 1 != 0 {
            read(&serial, DATA);
            looped += 1;
        }
        assert_eq!(looped, 64);
    }

    #[test]
    fn a_flood_into_a_full_sink_is_bounded_and_does_not_hold_up_the_guest() {
        let (serial, _line) = port(Full);
        for _ in 0..(CONSOLE_TAIL_SIZE + 1) {
            serial.write(DATA, b"x");
        }
        assert_eq!(serial.tail().snapshot().len(), CONSOLE_TAIL_SIZE);
    }

    #[test]
    fn an_interrupt_storm_that_nobody_takes_does_not_block() {
        let (serial, line) = port(Sink::default());
        line.write(u64::MAX - 1).unwrap();
        serial.write(INTERRUPT_ENABLE, &[3]);
        for _ in 0..1000 {
            serial.write(DATA, b"x");
            read(&serial, 2);
        }
    }

    #[test]
    fn every_offset_and_width_is_taken() {
        let (serial, _line) = port(Sink::default());
        for offset in [0, 1, 2, 3, 4, 5, 6, 7, 8, 255, 256, u64::MAX] {
            for width in [0, 1, 2, 4, 8] {
                for value in [0x00, 0xff, 0x80, 0x03] {
                    serial.write(offset, &vec![value; width]);
                    serial.read(offset, &mut vec![0; width]);
                }
            }
        }
    }
}
