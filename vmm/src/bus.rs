//! Which device answers at which address: one map for port I/O, one for memory-mapped I/O.

// A guest chooses the numbers.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::sync::Arc;

use devices::BusDevice;

/// Why a device could not be put on a bus.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// Another device is there.
    #[error("The window of {length:#x} at {base:#x} overlaps another device's")]
    Overlap {
        /// First address.
        base: u64,
        /// Length of the window.
        length: u64,
    },
    /// The window is empty or runs past the end of the address space.
    #[error("A window of {length:#x} at {base:#x} does not exist")]
    Impossible {
        /// First address.
        base: u64,
        /// Length of the window.
        length: u64,
    },
}

/// Devices by address window. Complete before the first vCPU runs, never changed after.
#[derive(Default)]
pub struct Bus {
    /// Sorted by `base`, disjoint.
    windows: Vec<Window>,
}

struct Window {
    base: u64,
    length: u64,
    device: Arc<dyn BusDevice>,
}

impl Bus {
    /// Lets `device` answer in the window.
    pub fn insert(&mut self, base: u64, length: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let end = base.checked_add(length).filter(|_| length > 0);
        let end = end.ok_or(BusError::Impossible { base, length })?;
        let position = self.windows.partition_point(|window| window.base < base);
        let before = position.checked_sub(1).and_then(|position| self.windows.get(position));
        let after = self.windows.get(position);
        if before.is_some_and(|window| window.base.saturating_add(window.length) > base)
            || after.is_some_and(|window| window.base < end)
        {
            return Err(BusError::Overlap { base, length });
        }
        self.windows.insert(position, Window { base, length, device });
        Ok(())
    }

    /// Reads at `address`. Where no device is, the bus floats: all ones, as on a PC.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                data.fill(0);
                device.read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes at `address`. Where no device is, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    /// The device whose window holds the whole access.
    fn find(&self, address: u64, length: usize) -> Option<(u64, &dyn BusDevice)> {
        let position = self.windows.partition_point(|window| window.base <= address);
        let window = self.windows.get(position.checked_sub(1)?)?;
        let offset = address.checked_sub(window.base)?;
        let end = offset.checked_add(length as u64)?;
        (end <= window.length).then_some((offset, &*window.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = u8::try_from(offset).expect("small");
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().expect("lock").push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_at_its_offset() {
        let mut bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.insert(0x1000, 0x10, device.clone()).expect("free");
        bus.write(0x100f, &[7]);
        assert_eq!(*device.0.lock().expect("lock"), [(15, vec![7])]);
        let mut data = [9, 9];
        bus.read(0x1003, &mut data);
        assert_eq!(data, [3, 0]);
    }

    #[test]
    fn an_access_beside_a_window_floats() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, Arc::new(Recorder::default())).expect("free");
        for address in [0, 0xfff, 0x100f, 0x1010, u64::MAX] {
            let mut data = [0, 0];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff, 0xff], "{address:#x}");
            bus.write(address, &data);
        }
    }

    #[test]
    fn windows_do_not_overlap() {
        let mut bus = Bus::default();
        let device: Arc<dyn BusDevice> = Arc::new(Recorder::default());
        let mut insert = |base, length| bus.insert(base, length, device.clone());
        insert(0x1000, 0x10).expect("free");
        insert(0x1010, 0x10).expect("adjacent");
        insert(0xff0, 0x10).expect("adjacent");
        for (base, length) in [(0x1000, 1), (0x100f, 4), (0xfff, 2), (0, u64::MAX)] {
            assert!(matches!(insert(base, length), Err(BusError::Overlap { .. })), "{base:#x}");
        }
        assert!(matches!(insert(0, 0), Err(BusError::Impossible { .. })));
        assert!(matches!(insert(u64::MAX, 2), Err(BusError::Impossible { .. })));
    }
}
