//! Device slots: places on the bus that are there from the start, and whose devices come and go.
//!
//! A machine without PCI and ACPI cannot show its guest a new device. So it is shown some drives and network interfaces that
//! have nothing behind them: a drive of no sectors, an interface without a cable. To plug a device is to put it behind one
//! of them, and to tell the driver that the configuration changed; a Linux guest then sees the drive's new size.
//!
//! ```text
//!              plug()                       driver: reads and writes
//!   vacant ───────────────▶ occupied ─────────────────────────────────▶ the device
//!      ▲                       │
//!      └────── unplug() ───────┘  what is in flight ends first; later requests fail
//! ```

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::virtio::blk::{Blk, BlkConfig, BlkError};
use devices::virtio::net::{Net, NetConfig, NetError};
use devices::virtio::{MmioTransport, ReplaceError, Vacant, VirtioDevice};
use seccomp::Confinement;

/// What fits a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotKind {
    /// A drive.
    Blk,
    /// A network interface.
    Net,
}

impl fmt::Display for SlotKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blk => "block device",
            Self::Net => "network",
        })
    }
}

/// A device for a slot.
#[derive(Debug)]
pub enum Pluggable {
    /// A drive.
    Blk(BlkConfig),
    /// A network interface.
    Net(NetConfig),
}

impl Pluggable {
    /// What slot it fits.
    pub fn kind(&self) -> SlotKind {
        match self {
            Self::Blk(_) => SlotKind::Blk,
            Self::Net(_) => SlotKind::Net,
        }
    }

    /// Its name.
    pub fn id(&self) -> &str {
        match self {
            Self::Blk(config) => &config.id,
            Self::Net(config) => &config.id,
        }
    }

    /// Gives it the queues of the slot, which are those that the guest's driver has found.
    fn fit(&mut self, queue_sizes: &[u16]) {
        if let (Self::Blk(config), Some(size)) = (self, queue_sizes.first()) {
            config.queues = u16::try_from(queue_sizes.len()).unwrap_or(u16::MAX);
            config.queue_size = *size;
        }
    }

    /// Makes the device, before its first driver comes or after.
    pub(crate) fn into_device(self, confinement: Confinement) -> Result<Box<dyn VirtioDevice>, HotplugError> {
        match self {
            Self::Blk(config) => Ok(Box::new(Blk::new(config, confinement)?)),
            Self::Net(config) => Ok(Box::new(Net::new(config)?)),
        }
    }
}

/// Why a device was not plugged or unplugged. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// The machine was built without slots of the kind.
    #[error("The machine has no {0} slots")]
    NoSlots(SlotKind),
    /// The slots are counted from 0.
    #[error("There is no {kind} slot {index}, the last one is {last}")]
    NoSuchSlot {
        /// Of what kind.
        kind: SlotKind,
        /// Which.
        index: usize,
        /// Which there is.
        last: usize,
    },
    /// There is a device.
    #[error("The {kind} slot {index} is taken by {occupant}")]
    Taken {
        /// Of what kind.
        kind: SlotKind,
        /// Which.
        index: usize,
        /// What is there.
        occupant: String,
    },
    /// There is a device in each.
    #[error("All {count} {kind} slots are taken")]
    AllTaken {
        /// Of what kind.
        kind: SlotKind,
        /// How many.
        count: usize,
    },
    /// Names are unique among slots.
    #[error("There is a device {0} already")]
    Exists(String),
    /// No slot has a device of the name.
    #[error("Device {0} not found")]
    NotFound(String),
    /// The drive is none.
    #[error(transparent)]
    Blk(#[from] BlkError),
    /// The interface is none.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The driver does not get along with the device.
    #[error("Device {id} cannot take the place")]
    Replace {
        /// The device.
        id: String,
        /// Why.
        #[source]
        source: ReplaceError,
    },
}

/// The slots of a machine.
pub struct Slots {
    /// Whether the threads that devices bring are confined.
    confinement: Confinement,
    slots: Mutex<Vec<Slot>>,
}

struct Slot {
    kind: SlotKind,
    transport: Arc<MmioTransport>,
    occupant: Option<String>,
}

/// What is in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotState {
    /// What fits.
    pub kind: SlotKind,
    /// Its number among its kind.
    pub index: usize,
    /// The name of the device in it.
    pub occupant: Option<String>,
}

impl Slots {
    /// None yet.
    pub(crate) fn new(confinement: Confinement) -> Self {
        Self { confinement, slots: Mutex::default() }
    }

    /// Adds a slot whose transport is on the bus.
    pub(crate) fn add(&self, kind: SlotKind, transport: Arc<MmioTransport>, occupant: Option<String>) {
        self.lock().push(Slot { kind, transport, occupant });
    }

    /// Plugs a device into slot `index` of its kind, or the first that is vacant, and returns which it was.
    pub fn plug(&self, index: Option<usize>, mut device: Pluggable) -> Result<usize, HotplugError> {
        let mut slots = self.lock();
        let (kind, id) = (device.kind(), device.id().to_owned());
        if slots.iter().any(|slot| slot.occupant.as_ref() == Some(&id)) {
            return Err(HotplugError::Exists(id));
        }
        let mut candidates: Vec<_> = slots.iter_mut().filter(|slot| slot.kind == kind).collect();
        let count = candidates.len();
        let last = count.checked_sub(1).ok_or(HotplugError::NoSlots(kind))?;
        let index = match index {
            Some(index) => index,
            None => candidates
                .iter()
                .position(|slot| slot.occupant.is_none())
                .ok_or(HotplugError::AllTaken { kind, count })?,
        };
        let slot = candidates.get_mut(index).ok_or(HotplugError::NoSuchSlot { kind, index, last })?;
        if let Some(occupant) = &slot.occupant {
            return Err(HotplugError::Taken { kind, index, occupant: occupant.clone() });
        }
        device.fit(&slot.transport.queue_max_sizes());
        slot.replace(device.into_device(self.confinement)?, &id)?;
        slot.occupant = Some(id);
        Ok(index)
    }

    /// Takes the device `id` out of its slot. What it had begun is done when this returns.
    pub fn unplug(&self, id: &str) -> Result<(), HotplugError> {
        let mut slots = self.lock();
        let slot = slots
            .iter_mut()
            .find(|slot| slot.occupant.as_deref() == Some(id))
            .ok_or_else(|| HotplugError::NotFound(id.to_owned()))?;
        slot.replace(vacant(slot.kind, &slot.transport.queue_max_sizes()), id)?;
        slot.occupant = None;
        Ok(())
    }

    /// What is where.
    pub fn states(&self) -> Vec<SlotState> {
        let (mut drives, mut networks) = (0.., 0..);
        self.lock()
            .iter()
            .map(|slot| {
                let index = match slot.kind {
                    SlotKind::Blk => drives.next(),
                    SlotKind::Net => networks.next(),
                };
                SlotState { kind: slot.kind, index: index.unwrap_or_default(), occupant: slot.occupant.clone() }
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    fn replace(&self, device: Box<dyn VirtioDevice>, id: &str) -> Result<(), HotplugError> {
        self.transport.replace(device).map_err(|source| HotplugError::Replace { id: id.to_owned(), source })
    }
}

impl SlotKind {
    /// The queues of a slot that nothing was ever in: those of a device whose configuration does not name others.
    pub(crate) fn queue_sizes(self) -> &'static [u16] {
        match self {
            Self::Blk => &[256],
            // A receive, a transmit and a control queue.
            Self::Net => &[256, 256, 256],
        }
    }
}

/// What is behind a slot that nothing is plugged into.
pub(crate) fn vacant(kind: SlotKind, queue_sizes: &[u16]) -> Box<dyn VirtioDevice> {
    Box::new(match kind {
        SlotKind::Blk => Vacant::blk(queue_sizes),
        SlotKind::Net => Vacant::net(queue_sizes),
    })
}

/// The devices of `configs` in their slots, and vacant ones up to the number of slots.
pub(crate) fn fill<C>(
    configs: Vec<C>,
    count: u8,
    kind: SlotKind,
    pluggable: impl Fn(C) -> Pluggable,
) -> Result<Vec<Option<Pluggable>>, HotplugError> {
    let count = usize::from(count);
    if configs.len() > count {
        return Err(HotplugError::AllTaken { kind, count });
    }
    let vacant = count - configs.len();
    let devices = configs.into_iter().map(|config| Some(pluggable(config)));
    Ok(devices.chain(std::iter::repeat_with(|| None).take(vacant)).collect())
}
