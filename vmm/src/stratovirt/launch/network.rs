//! Network interfaces: a `-netdev` and the device on top of it.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use devices::virtio::net::{NetConfig, Tap};
use devices::virtio::vhost_user::{Patience, VhostUserConfig, VhostUserKind};

use super::{Backends, LaunchError, QUEUE_SIZE, conflict};
use crate::config::MachineConfig;
use crate::stratovirt::command_line::backend::{Netdev, TapNetdev};
use crate::stratovirt::command_line::device::NetDevice;

/// Descriptors below are standard input, output and error.
const FIRST_INHERITED: RawFd = 3;

impl Backends {
    pub(super) fn interface(&mut self, device: NetDevice, machine: &mut MachineConfig) -> Result<(), LaunchError> {
        let NetDevice { id, netdev, mac, mq, queue_size } = device;
        let missing = || LaunchError::Missing { user: format!("Device {id}"), option: "-netdev", id: netdev.clone() };
        let index = self.netdevs.iter().position(|known| known.id() == netdev).ok_or_else(missing)?;
        if mq {
            return Err(conflict(format!("Device {id} with mq=on"), "an interface has one pair of queues"));
        }
        match self.netdevs.swap_remove(index) {
            Netdev::Tap(tap) => {
                if queue_size.is_some_and(|size| size != QUEUE_SIZE) {
                    return Err(conflict(format!("Device {id}"), "the queues of an interface have 256 entries"));
                }
                let tap = open_tap(&tap)?;
                let address = mac.map_or_else(|| address_of(&id), |mac| mac.0);
                machine.net.push(NetConfig::new(id, vec![tap], address));
            }
            Netdev::VhostUser(remote) => {
                if remote.queues.unwrap_or(1) != 1 {
                    return Err(conflict(format!("Device {id}"), "an interface has one pair of queues"));
                }
                machine.vhost_user.push(VhostUserConfig {
                    socket: self.socket(&id, &remote.chardev)?,
                    kind: VhostUserKind::Net { mac: Some(mac.map_or_else(|| address_of(&id), |mac| mac.0)) },
                    id,
                    num_queues: 2,
                    queue_size: queue_size.unwrap_or(QUEUE_SIZE),
                    patience: Patience::default(),
                });
            }
        }
        Ok(())
    }
}

fn open_tap(config: &TapNetdev) -> Result<Tap, LaunchError> {
    let conflict = |why| conflict(format!("Interface {}", config.id), why);
    if config.vhost || !config.vhost_descriptors().is_empty() {
        return Err(LaunchError::Absent("vhost-net"));
    }
    if config.queues.unwrap_or(1) != 1 {
        return Err(conflict("it has one pair of queues"));
    }
    let failed = |source| LaunchError::Tap { id: config.id.clone(), source };
    match (&config.ifname, &config.descriptors()[..]) {
        (Some(name), []) => Tap::open(name).map_err(failed),
        (None, [fd]) => Tap::from_fd(inherited(config, *fd)?).map_err(failed),
        (None, []) => Err(conflict("it has neither ifname nor fd")),
        (Some(_), _) => Err(conflict("it has ifname and fd")),
        (None, _) => Err(conflict("it has one pair of queues, and more than one descriptor")),
    }
}

/// Takes over a descriptor that the caller of this program left open.
fn inherited(config: &TapNetdev, fd: RawFd) -> Result<OwnedFd, LaunchError> {
    // SAFETY: F_GETFD takes and changes nothing; a number that is no descriptor is an error.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    // What this process opened itself closes on exec; what it inherited cannot have had that flag.
    if fd < FIRST_INHERITED || flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        return Err(conflict(
            format!("Descriptor {fd} of interface {}", config.id),
            "it was not left open for this program",
        ));
    }
    // SAFETY: as above; it is open.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(conflict(format!("Descriptor {fd} of interface {}", config.id), "it cannot be kept"));
    }
    // SAFETY: it is open and was inherited, so nothing in this process owns it; its flag makes a second use of the same
    // number an error.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An address for an interface without one: locally administered, and the same for the same name (FNV-1a).
fn address_of(id: &str) -> [u8; 6] {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let [a, b, c, d, e, ..] = id.bytes().fold(0xcbf2_9ce4_8422_2325, step).to_le_bytes();
    [0x02, a, b, c, d, e]
}
