//! The host's ends of devices, opened before the devices are plugged.

use std::collections::BTreeMap;
use std::os::fd::{OwnedFd, RawFd};

use serde_json::json;

use devices::virtio::net::{NetConfig, Tap};

use super::arguments::{Address, BlockdevAdd, BlockdevDel, ById, DeviceAdd, Mac, NetdevAdd, number};
use super::commands::Answer;
use super::error::CommandError;
use super::event::Event;
use super::monitor::Monitor;
use crate::hotplug::Pluggable;
use crate::stratovirt::drive::HostDrive;
use crate::stratovirt::launch::inherited;

/// Drives and interfaces that are known at once: each may hold a descriptor, and only six fit the slots.
pub const MAX_BACKENDS: usize = 64;

/// Drives and network interfaces by name. They stay while their devices are plugged, and go with them.
#[derive(Debug, Default)]
pub struct Backends {
    backends: BTreeMap<String, Backend>,
    /// The backend of each device that was plugged.
    used: BTreeMap<String, String>,
}

#[derive(Debug)]
enum Backend {
    Drive(HostDrive),
    Interface(String),
    Tap(OwnedFd),
}

impl Backends {
    /// Drives that are plugged already, by device.
    pub fn new(drives: Vec<(String, HostDrive)>) -> Self {
        let mut backends = Self::default();
        for (device, drive) in drives {
            backends.used.insert(device, drive.id().to_owned());
            backends.backends.insert(drive.id().to_owned(), Backend::Drive(drive));
        }
        backends
    }

    /// The drives, each with the device on top of it.
    pub fn drives(&self) -> impl Iterator<Item = (&HostDrive, Option<&str>)> {
        let device = |name: &str| self.used.iter().find(|(_, used)| *used == name).map(|(device, _)| device.as_str());
        self.backends.iter().filter_map(move |(name, backend)| match backend {
            Backend::Drive(drive) => Some((drive, device(name))),
            Backend::Interface(_) | Backend::Tap(_) => None,
        })
    }

    fn add(&mut self, name: String, open: impl FnOnce() -> Result<Backend, CommandError>) -> Answer {
        if self.backends.contains_key(&name) {
            return Err(CommandError::refused(format!("There is a backend {name} already")));
        }
        if self.backends.len() >= MAX_BACKENDS {
            return Err(CommandError::refused(format!("There are {MAX_BACKENDS} backends already")));
        }
        self.backends.insert(name, open()?);
        Ok(json!({}))
    }

    fn remove(&mut self, name: &str, fits: impl Fn(&Backend) -> bool) -> Answer {
        if !self.backends.get(name).is_some_and(fits) {
            return Err(CommandError::refused(format!("There is no backend {name}")));
        }
        if self.used.values().any(|used| used == name) {
            return Err(CommandError::refused(format!("The backend {name} is in use")));
        }
        self.backends.remove(name);
        Ok(json!({}))
    }

    fn find(&self, name: &str) -> Result<&Backend, CommandError> {
        if self.used.values().any(|used| used == name) {
            return Err(CommandError::refused(format!("The backend {name} is in use")));
        }
        self.backends.get(name).ok_or_else(|| CommandError::refused(format!("There is no backend {name}")))
    }

    fn drive(&self, arguments: DeviceAdd) -> Result<(String, Pluggable), CommandError> {
        let DeviceAdd { id, drive, serial, .. } = arguments;
        let name = drive.unwrap_or_else(|| id.clone());
        let Backend::Drive(drive) = self.find(&name)? else {
            return Err(CommandError::refused(format!("The backend {name} is no drive")));
        };
        let config = drive.device(id, serial)?;
        Ok((name, Pluggable::Blk(config)))
    }

    fn interface(&self, arguments: DeviceAdd) -> Result<(String, Pluggable), CommandError> {
        let DeviceAdd { id, netdev, chardev, mac, .. } = arguments;
        let name = netdev.or(chardev).unwrap_or_else(|| id.clone());
        let tap = match self.find(&name)? {
            Backend::Interface(interface) => Tap::open(interface)?,
            Backend::Tap(file) => {
                let what = || format!("Cannot duplicate the descriptor of interface {name}");
                let file = file.try_clone().map_err(|source| CommandError::Host { what: what(), source })?;
                Tap::from_fd(file)?
            }
            Backend::Drive(_) => {
                return Err(CommandError::refused(format!("The backend {name} is no network interface")));
            }
        };
        let mac = mac.unwrap_or_else(Mac::random).0;
        Ok((name, Pluggable::Net(NetConfig::new(id, vec![tap], mac))))
    }
}

impl Backend {
    fn is_drive(&self) -> bool {
        matches!(self, Self::Drive(_))
    }
}

impl Monitor {
    pub(super) fn blockdev_add(&mut self, arguments: BlockdevAdd) -> Answer {
        if arguments.driver.as_ref().is_some_and(|driver| driver != "raw") || arguments.backing.is_some() {
            return Err(CommandError::refused("The format of a drive is raw, and nothing is behind it"));
        }
        let drive = arguments.into_drive();
        self.backends().add(drive.id.clone(), || Ok(Backend::Drive(HostDrive::open(drive)?)))
    }

    pub(super) fn blockdev_del(&mut self, arguments: BlockdevDel) -> Answer {
        self.backends().remove(&arguments.node_name, Backend::is_drive)
    }

    pub(super) fn netdev_add(&mut self, arguments: NetdevAdd) -> Answer {
        let NetdevAdd { id, kind, ifname, fd, fds, vhostfd, vhostfds, queues, chardev } = arguments;
        if kind.is_some_and(|kind| kind != "tap") || chardev.is_some() {
            return Err(CommandError::refused("A replaceable network device has a tap interface behind it"));
        }
        if queues.is_some_and(|pairs| pairs != 1) {
            return Err(CommandError::refused("A replaceable network device has one pair of queues"));
        }
        let name = match (ifname, fd.or(fds)) {
            (Some(name), None) => Ok(name),
            (None, Some(names)) => Err(names),
            _ => return Err(CommandError::refused("A network backend needs either ifname, or fd or fds")),
        };
        let Self { front, files, .. } = self;
        front.backends().add(id.clone(), || {
            let backend = match name {
                Ok(interface) => Backend::Interface(interface),
                Err(names) => {
                    // As StratoVirt, which takes the last one.
                    let (extra, last) = names.rsplit_once(':').unwrap_or(("", &names));
                    let file = named_or_inherited(files, &id, last)?;
                    extra.split(':').for_each(|name| drop(files.remove(name)));
                    Backend::Tap(file)
                }
            };
            // Nor is there a use for what was meant for vhost.
            let vhost = [vhostfd, vhostfds];
            vhost.iter().flatten().flat_map(|names| names.split(':')).for_each(|name| drop(files.remove(name)));
            Ok(backend)
        })
    }

    pub(super) fn netdev_del(&mut self, arguments: ById) -> Answer {
        self.backends().remove(&arguments.id, |backend| !backend.is_drive())
    }

    pub(super) fn device_add(&mut self, arguments: DeviceAdd) -> Answer {
        let slot = slot(&arguments)?;
        let id = arguments.id.clone();
        let mut backends = self.backends();
        let (name, device) = match arguments.driver.as_str() {
            "virtio-blk-mmio" | "virtio-blk-device" => backends.drive(arguments)?,
            "virtio-net-mmio" | "virtio-net-device" => backends.interface(arguments)?,
            other => return Err(CommandError::refused(format!("A device of the kind {other} cannot be plugged"))),
        };
        self.machine().plug(slot, device)?;
        backends.used.insert(id, name);
        Ok(json!({}))
    }

    pub(super) fn device_del(&mut self, arguments: ById) -> Answer {
        let id = arguments.id;
        let mut backends = self.backends();
        self.machine().unplug(&id)?;
        if let Some(name) = backends.used.remove(&id) {
            backends.backends.remove(&name);
        }
        drop(backends);
        self.tell(Event::DeviceDeleted { path: id.clone(), device: id });
        Ok(json!({}))
    }
}

/// The descriptor that `getfd` has named, or else of that number.
fn named_or_inherited(
    files: &mut BTreeMap<String, OwnedFd>,
    interface: &str,
    name: &str,
) -> Result<OwnedFd, CommandError> {
    if let Some(file) = files.remove(name) {
        return Ok(file);
    }
    let missing = || CommandError::refused(format!("There is no file descriptor {name}"));
    let number = number(name).and_then(|number| RawFd::try_from(number).ok()).ok_or_else(missing)?;
    inherited(&format!("interface {interface}"), number).map_err(|error| CommandError::refused(error.to_string()))
}

/// The slot that a device asks for.
fn slot(arguments: &DeviceAdd) -> Result<Option<usize>, CommandError> {
    match &arguments.addr {
        None => Ok(arguments.lun.map(|lun| lun.saturating_add(1))),
        Some(Address::Number(slot)) => Ok(Some(*slot)),
        Some(Address::Text(text)) => {
            let slot = number(text).and_then(|slot| usize::try_from(slot).ok());
            slot.map(Some).ok_or_else(|| CommandError::refused(format!("{text:?} is not the number of a slot")))
        }
    }
}
