//! The host's ends of devices, opened before the devices are plugged.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;

use serde_json::json;

use devices::virtio::blk::BlkConfig;
use devices::virtio::net::{NetConfig, Tap};

use super::arguments::{BlockdevAdd, BlockdevDel, ById, DeviceAdd, Mac, NetdevAdd, number};
use super::commands::Answer;
use super::error::CommandError;
use super::event::Event;
use super::monitor::Monitor;
use crate::hotplug::Pluggable;

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
    Drive { file: File, read_only: bool },
    Interface(String),
    Tap(OwnedFd),
}

impl Backends {
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
}

impl Backend {
    fn is_drive(&self) -> bool {
        matches!(self, Self::Drive { .. })
    }
}

impl Monitor {
    pub(super) fn blockdev_add(&mut self, arguments: BlockdevAdd) -> Answer {
        let BlockdevAdd { node_name, driver, file, read_only, iops, .. } = arguments;
        if driver.is_some_and(|driver| driver != "raw") {
            return Err(CommandError::refused("The format of a drive is raw"));
        }
        if iops.is_some() {
            return Err(CommandError::refused("A drive that is plugged has no limit of its own"));
        }
        self.backends.add(node_name, || {
            let path = file.filename;
            let opened = OpenOptions::new().read(true).write(!read_only).open(&path);
            let what = format!("Cannot open the drive {path}");
            let file = opened.map_err(|source| CommandError::Host { what, source })?;
            Ok(Backend::Drive { file, read_only })
        })
    }

    pub(super) fn blockdev_del(&mut self, arguments: BlockdevDel) -> Answer {
        self.backends.remove(&arguments.node_name, Backend::is_drive)
    }

    pub(super) fn netdev_add(&mut self, arguments: NetdevAdd) -> Answer {
        let NetdevAdd { id, kind, ifname, fd, fds, vhost, vhostfd, vhostfds, queues, chardev } = arguments;
        if kind.is_some_and(|kind| kind != "tap") || chardev.is_some() {
            return Err(CommandError::refused("A replaceable network device has a tap interface behind it"));
        }
        if vhost || vhostfd.is_some() || vhostfds.is_some() {
            return Err(CommandError::refused("A replaceable network device is not served by vhost"));
        }
        if queues.is_some_and(|pairs| pairs != 1) || fds.as_ref().is_some_and(|names| names.contains(':')) {
            return Err(CommandError::refused("A replaceable network device has one pair of queues"));
        }
        let files = &mut self.files;
        self.backends.add(id, || match (ifname, fd.or(fds)) {
            (Some(name), None) => Ok(Backend::Interface(name)),
            (None, Some(name)) => files
                .remove(&name)
                .map(Backend::Tap)
                .ok_or_else(|| CommandError::refused(format!("There is no file descriptor {name}"))),
            _ => Err(CommandError::refused("A network backend needs either ifname, or fd or fds")),
        })
    }

    pub(super) fn netdev_del(&mut self, arguments: ById) -> Answer {
        self.backends.remove(&arguments.id, |backend| !backend.is_drive())
    }

    pub(super) fn device_add(&mut self, arguments: DeviceAdd) -> Answer {
        let slot = slot(&arguments)?;
        let id = arguments.id.clone();
        let (name, device) = match arguments.driver.as_str() {
            "virtio-blk-mmio" | "virtio-blk-device" => self.drive(arguments)?,
            "virtio-net-mmio" | "virtio-net-device" => self.interface(arguments)?,
            other => return Err(CommandError::refused(format!("A device of the kind {other} cannot be plugged"))),
        };
        self.machine().plug(slot, device)?;
        self.backends.used.insert(id, name);
        Ok(json!({}))
    }

    pub(super) fn device_del(&mut self, arguments: ById) -> Answer {
        let id = arguments.id;
        self.machine().unplug(&id)?;
        if let Some(name) = self.backends.used.remove(&id) {
            self.backends.backends.remove(&name);
        }
        self.tell(Event::DeviceDeleted { path: id.clone(), device: id });
        Ok(json!({}))
    }

    fn drive(&self, arguments: DeviceAdd) -> Result<(String, Pluggable), CommandError> {
        let DeviceAdd { id, drive, serial, num_queues, .. } = arguments;
        if num_queues.is_some_and(|queues| queues != 1) {
            return Err(CommandError::refused("A drive in a slot has one queue"));
        }
        let name = drive.unwrap_or_else(|| id.clone());
        let Backend::Drive { file, read_only } = self.backends.find(&name)? else {
            return Err(CommandError::refused(format!("The backend {name} is no drive")));
        };
        let what = || format!("Cannot duplicate the descriptor of drive {name}");
        let file = file.try_clone().map_err(|source| CommandError::Host { what: what(), source })?;
        let config =
            BlkConfig { read_only: *read_only, serial: serial.unwrap_or_default(), ..BlkConfig::new(id, file) };
        Ok((name, Pluggable::Blk(config)))
    }

    fn interface(&self, arguments: DeviceAdd) -> Result<(String, Pluggable), CommandError> {
        let DeviceAdd { id, netdev, chardev, mac, .. } = arguments;
        let name = netdev.or(chardev).unwrap_or_else(|| id.clone());
        let tap = match self.backends.find(&name)? {
            Backend::Interface(interface) => Tap::open(interface)?,
            Backend::Tap(file) => {
                let what = || format!("Cannot duplicate the descriptor of interface {name}");
                let file = file.try_clone().map_err(|source| CommandError::Host { what: what(), source })?;
                Tap::from_fd(file)?
            }
            Backend::Drive { .. } => {
                return Err(CommandError::refused(format!("The backend {name} is no network interface")));
            }
        };
        let mac = mac.unwrap_or_else(Mac::random).0;
        Ok((name, Pluggable::Net(NetConfig::new(id, vec![tap], mac))))
    }
}

/// The slot that a device asks for.
fn slot(arguments: &DeviceAdd) -> Result<Option<usize>, CommandError> {
    let Some(text) = &arguments.addr else {
        return Ok(arguments.lun.map(|lun| lun.saturating_add(1)));
    };
    let slot = number(text).and_then(|slot| usize::try_from(slot).ok());
    slot.map(Some).ok_or_else(|| CommandError::refused(format!("{text:?} is not the number of a slot")))
}
