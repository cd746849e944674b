//! A tap interface of the host.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

use super::HEADER_SIZE;

// linux/if_tun.h
ioctl_iow_nr!(TUNSETIFF, 0x54, 202, libc::c_int);
ioctl_iow_nr!(TUNSETOFFLOAD, 0x54, 208, libc::c_uint);
ioctl_ior_nr!(TUNGETIFF, 0x54, 210, libc::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, 0x54, 216, libc::c_int);
ioctl_iow_nr!(TUNSETQUEUE, 0x54, 217, libc::c_int);

/// Ethernet frames, without packet information, with the virtio-net header.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Why a tap interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// An interface name has 1 to 15 bytes.
    #[error("{0:?} is not an interface name")]
    Name(String),
    /// `/dev/net/tun` cannot be opened.
    #[error("Cannot open /dev/net/tun")]
    Open(#[source] io::Error),
    /// The interface cannot be made or attached to.
    #[error("Cannot attach to the tap interface {name}")]
    Attach {
        /// The interface's name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A descriptor that was handed over is not a tap with a virtio-net header.
    #[error("The descriptor is not of a tap interface with IFF_NO_PI and IFF_VNET_HDR")]
    WrongKind,
    /// The interface does not take a setting.
    #[error("Cannot set up the tap interface")]
    Setup(#[source] io::Error),
}

/// One queue of a tap interface, opened. Dropping it detaches; an interface that is not persistent
/// and has no queue left is then gone.
#[derive(Debug)]
pub struct Tap {
    file: File,
    /// The interface takes several queues, which can be switched on and off.
    multi_queue: bool,
    /// The kernel gives frames to this queue.
    attached: AtomicBool,
}

impl Tap {
    /// Attaches to the interface `name`, which is made if there is none.
    pub fn open(name: &str) -> Result<Self, TapError> {
        Self::attach(&mut interface_request(name)?, FLAGS)
    }

    /// Attaches `count` queues to the interface `name`, which is made if there is none. More than
    /// one need an interface that was made for it (`ip tuntap add … multi_queue`).
    pub fn open_queues(name: &str, count: u16) -> Result<Vec<Self>, TapError> {
        let flags = if count > 1 { FLAGS | libc::IFF_MULTI_QUEUE } else { FLAGS };
        let mut request = interface_request(name)?;
        // The kernel writes the name it chose back, so a pattern such as `tap%d` is one interface.
        (0..count).map(|_| Self::attach(&mut request, flags)).collect()
    }

    fn attach(request: &mut libc::ifreq, flags: libc::c_int) -> Result<Self, TapError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(TapError::Open)?;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or_default();
        // SAFETY: the kernel reads and writes one `ifreq`, which is what `request` is.
        let result = unsafe { ioctl_with_mut_ref(&file, TUNSETIFF(), request) };
        check(result).map_err(|source| TapError::Attach { name: interface_name(request), source })?;
        Self::set_up(file, flags & libc::IFF_MULTI_QUEUE != 0)
    }

    /// Takes a descriptor that somebody with the privilege to do so has attached to an interface.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let mut request = empty_request();
        // SAFETY: the kernel writes one `ifreq`, which is what `request` is.
        let result = unsafe { ioctl_with_mut_ref(&fd, TUNGETIFF(), &mut request) };
        check(result).map_err(|_| TapError::WrongKind)?;
        // SAFETY: TUNGETIFF has set the flags, and a short is valid whatever its bits.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let flags = libc::c_int::from(flags);
        if flags & FLAGS != FLAGS {
            return Err(TapError::WrongKind);
        }
        let on: libc::c_int = 1;
        // SAFETY: FIONBIO reads one int, which is what `on` is.
        let result = unsafe { ioctl_with_ref(&fd, libc::FIONBIO, &on) };
        check(result).map_err(TapError::Setup)?;
        Self::set_up(File::from(fd), flags & libc::IFF_MULTI_QUEUE != 0)
    }

    fn set_up(file: File, multi_queue: bool) -> Result<Self, TapError> {
        let size = libc::c_int::try_from(HEADER_SIZE).unwrap_or_default();
        // SAFETY: the kernel reads one int, which is what `size` is.
        let result = unsafe { ioctl_with_ref(&file, TUNSETVNETHDRSZ(), &size) };
        check(result).map_err(TapError::Setup)?;
        Ok(Self { file, multi_queue, attached: AtomicBool::new(true) })
    }

    /// Tells the host what the guest takes beyond plain frames: `TUN_F_*` bits.
    pub fn set_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        // SAFETY: the argument is a value, no memory is touched.
        let result = unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD(), offloads.into()) };
        check(result)
    }

    /// Switches this queue on or off: the kernel spreads frames over the queues that are on. An
    /// interface with one queue has it always on.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        if !self.multi_queue || self.attached.load(Ordering::Relaxed) == attached {
            return Ok(());
        }
        let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let mut request = empty_request();
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flag).unwrap_or_default();
        // SAFETY: the kernel reads one `ifreq`, which is what `request` is.
        let result = unsafe { ioctl_with_ref(&self.file, TUNSETQUEUE(), &request) };
        check(result)?;
        self.attached.store(attached, Ordering::Relaxed);
        Ok(())
    }

    /// Whether there can be others beside this queue.
    pub fn is_multi_queue(&self) -> bool {
        self.multi_queue
    }

    /// The descriptor, for a back-end that is given files.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// One end of a socket pair in place of an interface.
    #[cfg(test)]
    pub(super) fn from_socket(socket: OwnedFd) -> Self {
        Self { file: File::from(socket), multi_queue: false, attached: AtomicBool::new(true) }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn empty_request() -> libc::ifreq {
    // SAFETY: `ifreq` is integers, and pointers that may be null.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn interface_request(name: &str) -> Result<libc::ifreq, TapError> {
    let mut request = empty_request();
    // The last byte stays 0.
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(TapError::Name(name.to_owned()));
    }
    for (target, source) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = libc::c_char::from_ne_bytes([source]);
    }
    Ok(request)
}

fn interface_name(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().take_while(|byte| **byte != 0);
    bytes.map(|byte| char::from(byte.to_ne_bytes()[0])).collect()
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
