//! Network interfaces: a `-netdev` and the device on top of it; and what the host's kernel serves.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use devices::virtio::net::{MAX_QUEUE_PAIRS, NetConfig, Tap};
use devices::virtio::vhost_user::{Patience, VhostUserConfig, VhostUserKind};

use super::{Backends, LaunchError, QUEUE_SIZE, conflict};
use crate::config::{KernelVhost, KernelVsockConfig, MachineConfig, VhostKind};
use crate::stratovirt::command_line::backend::{Netdev, TapNetdev};
use crate::stratovirt::command_line::device::{NetDevice, VhostVsockDevice};

/// Descriptors below are standard input, output and error.
const FIRST_INHERITED: RawFd = 3;

impl Backends {
    pub(super) fn interface(&mut self, device: NetDevice, machine: &mut MachineConfig) -> Result<(), LaunchError> {
        let NetDevice { id, netdev, mac, queue_size } = device;
        let missing = || LaunchError::Missing { user: format!("Device {id}"), option: "-netdev", id: netdev.clone() };
        let index = self.netdevs.iter().position(|known| known.id() == netdev).ok_or_else(missing)?;
        match self.netdevs.swap_remove(index) {
            Netdev::Tap(tap) => {
                if queue_size.is_some_and(|size| size != QUEUE_SIZE) {
                    return Err(conflict(format!("Device {id}"), "the queues of an interface have 256 entries"));
                }
                let taps = open_taps(&tap)?;
                let vhost = open_vhosts(&tap, taps.len())?;
                let address = mac.map_or_else(|| address_of(&id), |mac| mac.0);
                machine.net.push(NetConfig { vhost, ..NetConfig::new(id, taps, address) });
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

/// The queues of an interface of the host, one for each pair of the guest's.
fn open_taps(config: &TapNetdev) -> Result<Vec<Tap>, LaunchError> {
    let conflict = |why| conflict(format!("Interface {}", config.id), why);
    let failed = |source| LaunchError::Tap { id: config.id.clone(), source };
    let descriptors = config.descriptors();
    if config.queues.is_some_and(|queues| !(1..=MAX_QUEUE_PAIRS).contains(&queues)) {
        return Err(conflict("it has 1 to 16 pairs of queues"));
    }
    match (&config.ifname, config.queues) {
        (Some(_), _) if !descriptors.is_empty() => Err(conflict("it has ifname and fd")),
        (Some(name), queues) => Tap::open_queues(name, queues.unwrap_or(1)).map_err(failed),
        (None, _) if descriptors.is_empty() => Err(conflict("it has neither ifname nor fd")),
        (None, Some(queues)) if usize::from(queues) != descriptors.len() => {
            Err(conflict("it has another number of queues than of descriptors"))
        }
        (None, _) => {
            let user = format!("interface {}", config.id);
            descriptors.iter().map(|fd| Tap::from_fd(inherited(&user, *fd)?).map_err(failed)).collect()
        }
    }
}

/// The host's kernel's ends of `pairs` pairs of queues, where it is to move the frames.
fn open_vhosts(config: &TapNetdev, pairs: usize) -> Result<Vec<KernelVhost>, LaunchError> {
    let conflict = |why| conflict(format!("Interface {}", config.id), why);
    let descriptors = config.vhost_descriptors();
    let user = format!("interface {}", config.id);
    match (config.vhost, descriptors.len()) {
        (false, 0) => Ok(Vec::new()),
        (false, _) => Err(conflict("it has descriptors of /dev/vhost-net without vhost=on")),
        (true, 0) => (0..pairs).map(|_| open_vhost(VhostKind::Net, &user, None)).collect(),
        (true, count) if count != pairs => Err(conflict("each pair of queues takes a descriptor of /dev/vhost-net")),
        (true, _) => descriptors.into_iter().map(|fd| open_vhost(VhostKind::Net, &user, Some(fd))).collect(),
    }
}

/// Sockets through the host's kernel.
pub(super) fn vsock(device: &VhostVsockDevice) -> Result<KernelVsockConfig, LaunchError> {
    let vhost = open_vhost(VhostKind::Vsock, &format!("device {}", device.id), device.vhostfd)?;
    Ok(KernelVsockConfig { guest_cid: device.guest_cid.into(), vhost })
}

fn open_vhost(kind: VhostKind, user: &str, fd: Option<RawFd>) -> Result<KernelVhost, LaunchError> {
    let vhost = match fd {
        Some(fd) => KernelVhost::from_fd(kind, inherited(user, fd)?),
        None => KernelVhost::open(kind),
    };
    vhost.map_err(|source| LaunchError::Vhost { user: user.to_owned(), source })
}

/// Takes over a descriptor for `user` that the caller of this program left open.
pub fn inherited(user: &str, fd: RawFd) -> Result<OwnedFd, LaunchError> {
    let conflict = |why| conflict(format!("Descriptor {fd} of {user}"), why);
    // SAFETY: F_GETFD takes and changes nothing; a number that is no descriptor is an error.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    // What this process opened itself closes on exec; what it inherited cannot have had that flag.
    if fd < FIRST_INHERITED || flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        return Err(conflict("it was not left open for this program"));
    }
    // SAFETY: as above; it is open.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(conflict("it cannot be kept"));
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
