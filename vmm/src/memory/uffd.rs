//! userfaultfd(2): page faults of a part of this process that a thread of it serves.
//!
//! Processors fault from inside the kernel, so a descriptor that serves faults of user mode alone (`UFFD_USER_MODE_ONLY`)
//! is of no use. `/dev/userfaultfd` (Linux 6.1) gives a full one to whoever may open it; the system call to whoever has
//! `CAP_SYS_PTRACE`, or to all where `vm.unprivileged_userfaultfd` is 1.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use abi::*;

/// The device that gives descriptors.
pub const DEVICE: &str = "/dev/userfaultfd";

/// `UFFD_API`: the one version that there is.
const UFFD_API: u64 = 0xaa;

/// `UFFD_FEATURE_*`: all are in every kernel since 4.11.
const EVENT_REMOVE: u64 = 1 << 3;
const MISSING_HUGETLBFS: u64 = 1 << 4;
const MISSING_SHMEM: u64 = 1 << 5;
/// Those for writes: of Linux 5.7, and of 5.19 for memory of files without a disk.
const PAGEFAULT_FLAG_WP: u64 = 1;
const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;

/// `UFFDIO_REGISTER_MODE_MISSING`, `UFFDIO_REGISTER_MODE_WP`.
const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 1 << 1;

/// `UFFDIO_WRITEPROTECT_MODE_WP`: without it the protection is lifted, and who waits is woken.
const PROTECT: u64 = 1;

/// Numbers of operations, as bits of what a range can do (`_UFFDIO_COPY`, `_UFFDIO_ZEROPAGE`, `_UFFDIO_WRITEPROTECT`).
const CAN_COPY: u64 = 1 << 3;
const CAN_ZERO: u64 = 1 << 4;
const CAN_PROTECT: u64 = 1 << 6;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVED: u8 = 0x15;

/// `uffd_msg`: 32 bytes, packed.
const MESSAGE: usize = 32;
/// Messages that are read at once: what a machine's processors and devices can have under way at a time, about.
const MESSAGES: usize = 16;

/// Why faults cannot be served by this process.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// No descriptor.
    #[error(
        "Page faults cannot be served: {DEVICE} does not open ({device}), and userfaultfd(2) needs CAP_SYS_PTRACE or \
         vm.unprivileged_userfaultfd=1"
    )]
    Open {
        /// What opening the device said.
        device: io::Error,
        /// What the system call said.
        #[source]
        source: io::Error,
    },
    /// The kernel has another interface, or lacks what is asked of it.
    #[error("The kernel's userfaultfd has not the features that are needed")]
    Api(#[source] io::Error),
    /// Memory of a kind whose faults cannot be served: that of a file on a disk.
    #[error("Faults of the {length} bytes at {start:#x} cannot be served: is this memory of a file on a disk?")]
    Register {
        /// Host address.
        start: usize,
        /// Bytes.
        length: usize,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What the kernel tells whoever serves faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// A thread waits for the page at this host address.
    Fault(u64),
    /// A range of pages (host addresses, the end exclusive) is being given back: what was in them is gone. Until this has been read,
    /// and for a moment after, the kernel takes no pages.
    Removed(u64, u64),
}

/// What came of an attempt to give pages.
#[derive(Debug)]
pub enum Placed {
    /// All of them are there.
    All,
    /// The first so many bytes are.
    Part(u64),
    /// The first one was there already.
    Exists,
    /// The kernel takes none while pages are being given back: read messages, then try again.
    Busy,
    /// Nobody waits any more: the range, or the process, is gone.
    Gone,
    /// It cannot be done.
    Failed(io::Error),
}

/// Faults, as whoever serves them sees the kernel. The tests have another one.
pub trait Faults {
    /// What has happened; appended to `messages`. Returns at once.
    fn read(&self, messages: &mut Vec<Message>) -> io::Result<()>;
    /// Gives pages with these contents, and wakes who waits for them.
    fn copy(&self, to: u64, contents: &[u8]) -> Placed;
    /// Gives pages of zeros, and wakes who waits for them.
    fn zero(&self, to: u64, length: u64) -> Placed;
    /// Wakes who waits for pages that are there.
    fn wake(&self, start: u64, length: u64);
}

/// Writes to memory that is protected, as whoever lets them go on sees the kernel. The tests have another one.
pub trait Writes {
    /// Who waits; appended to `messages`. Returns at once.
    fn read(&self, messages: &mut Vec<Message>) -> io::Result<()>;
    /// Lets writes to a range of host addresses go on, and wakes who waits.
    fn lift(&self, start: u64, length: u64) -> io::Result<()>;
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd {
    descriptor: OwnedFd,
    /// What takes its place when it is closed.
    null: File,
}

impl Uffd {
    /// Opens one whose faults may come from the kernel, and which tells of pages that are given back.
    pub fn open() -> Result<Self, UffdError> {
        Self::with(EVENT_REMOVE | MISSING_HUGETLBFS | MISSING_SHMEM)
    }

    /// Opens one for writes to memory that is there, which may come from the kernel. It tells of nothing else.
    pub fn open_for_writes() -> Result<Self, UffdError> {
        Self::with(PAGEFAULT_FLAG_WP | WP_HUGETLBFS_SHMEM)
    }

    fn with(features: u64) -> Result<Self, UffdError> {
        let descriptor = match from_device() {
            Ok(descriptor) => descriptor,
            Err(device) => from_call().map_err(|source| UffdError::Open { device, source })?,
        };
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the request's structure.
        if unsafe { ioctl_with_mut_ref(&descriptor, UFFDIO_API(), &mut api) } != 0 {
            return Err(UffdError::Api(io::Error::last_os_error()));
        }
        let null = File::open("/dev/null").map_err(UffdError::Api)?;
        Ok(Self { descriptor, null })
    }

    /// From now on this serves the faults of missing pages in `length` bytes at `start`. Whether it can give pages of zeros that take no
    /// memory is returned: there are none among huge pages.
    ///
    /// What the kernel says that it can do beside that, in this version or a later one, is not looked at.
    pub fn register(&self, start: usize, length: usize) -> Result<bool, UffdError> {
        let can = self.register_for(MODE_MISSING, CAN_COPY, start, length)?;
        Ok(can & CAN_ZERO != 0)
    }

    /// From now on [`protect`](Self::protect) can be asked for in `length` bytes at `start`. Nothing is protected yet.
    pub fn register_writes(&self, start: usize, length: usize) -> Result<(), UffdError> {
        self.register_for(MODE_WP, CAN_PROTECT, start, length).map(|_| ())
    }

    /// What the range can do is returned: `needed` at the least.
    fn register_for(&self, mode: u64, needed: u64, start: usize, length: usize) -> Result<u64, UffdError> {
        let range = Range { start: start as u64, length: length as u64 };
        let mut register = Register { range, mode, ioctls: 0 };
        // SAFETY: the request's structure. The kernel checks the range, and what is in it is never changed: memory that is not
        // there is served, writes to what is there wait.
        let failed = unsafe { ioctl_with_mut_ref(&self.descriptor, UFFDIO_REGISTER(), &mut register) } != 0;
        let source = if failed { io::Error::last_os_error() } else { io::ErrorKind::Unsupported.into() };
        if failed || register.ioctls & needed == 0 {
            return Err(UffdError::Register { start, length, source });
        }
        Ok(register.ioctls)
    }

    /// Makes all writes to the pages of a range wait, whoever they come from, until the protection is [lifted](Writes::lift) or the
    /// descriptor closed. Of private memory, only those to pages that are there: others are served as ever.
    pub fn protect(&self, start: u64, length: u64) -> io::Result<()> {
        self.write_protect(start, length, PROTECT)
    }

    fn write_protect(&self, start: u64, length: u64, mode: u64) -> io::Result<()> {
        let protect = Protect { range: Range { start, length }, mode };
        // SAFETY: the request's structure. The kernel takes ranges that were registered; what is in them does not change.
        match unsafe { ioctl_with_ref(&self.descriptor, UFFDIO_WRITEPROTECT(), &protect) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Serves these faults no more: who waits is woken, and finds what is there, or fresh pages.
    pub fn unregister(&self, start: usize, length: usize) -> io::Result<()> {
        let range = Range { start: start as u64, length: length as u64 };
        // SAFETY: the request's structure.
        match unsafe { ioctl_with_ref(&self.descriptor, UFFDIO_UNREGISTER(), &range) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Serves no faults any more, whoever still holds this: all who wait are woken, those who give pages back too. The number stays
    /// taken, by something that answers every request with an error, until this is dropped.
    ///
    /// A thread that waits for messages keeps the descriptor alive until it is woken.
    pub fn close(&self) -> io::Result<()> {
        // SAFETY: both descriptors belong to `self`; the second is replaced in one step, and its number goes to nobody else.
        match unsafe { libc::dup3(self.null.as_raw_fd(), self.descriptor.as_raw_fd(), libc::O_CLOEXEC) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
}

impl Writes for Uffd {
    fn read(&self, messages: &mut Vec<Message>) -> io::Result<()> {
        Faults::read(self, messages)
    }

    fn lift(&self, start: u64, length: u64) -> io::Result<()> {
        self.write_protect(start, length, 0)
    }
}

impl Faults for Uffd {
    fn read(&self, messages: &mut Vec<Message>) -> io::Result<()> {
        let mut bytes = [0_u8; MESSAGE * MESSAGES];
        // SAFETY: the buffer has that length.
        let read = unsafe { libc::read(self.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
        let length = match usize::try_from(read) {
            // Closed, see above.
            Ok(0) => return Err(io::ErrorKind::BrokenPipe.into()),
            Ok(length) => length,
            Err(_) => {
                let error = io::Error::last_os_error();
                return match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
                    _ => Err(error),
                };
            }
        };
        let (whole, _) = bytes.get(..length).unwrap_or_default().as_chunks::<MESSAGE>();
        messages.extend(whole.iter().filter_map(message));
        Ok(())
    }

    fn copy(&self, to: u64, contents: &[u8]) -> Placed {
        let mut copy = Copy { to, from: contents.as_ptr() as u64, length: contents.len() as u64, mode: 0, copied: 0 };
        // SAFETY: the request's structure. The kernel reads the contents, and writes only to pages that are missing in
        // ranges that were registered: nobody has seen anything in them.
        let result = unsafe { ioctl_with_mut_ref(&self.descriptor, UFFDIO_COPY(), &mut copy) };
        outcome(result, copy.copied)
    }

    fn zero(&self, to: u64, length: u64) -> Placed {
        let mut zero = Zero { range: Range { start: to, length }, mode: 0, zeroed: 0 };
        // SAFETY: as above.
        let result = unsafe { ioctl_with_mut_ref(&self.descriptor, UFFDIO_ZEROPAGE(), &mut zero) };
        outcome(result, zero.zeroed)
    }

    fn wake(&self, start: u64, length: u64) {
        // SAFETY: the request's structure. Who is woken for nothing faults again.
        unsafe { ioctl_with_ref(&self.descriptor, UFFDIO_WAKE(), &Range { start, length }) };
    }
}

fn outcome(result: libc::c_int, done: i64) -> Placed {
    if result == 0 {
        return Placed::All;
    }
    let error = io::Error::last_os_error();
    match (error.raw_os_error(), u64::try_from(done)) {
        (Some(libc::EAGAIN), Ok(done)) if done > 0 => Placed::Part(done),
        (Some(libc::EAGAIN), _) => Placed::Busy,
        (Some(libc::EEXIST), _) => Placed::Exists,
        // No such range, no such process; ENOTTY is a descriptor that was closed, see `close`.
        (Some(libc::ENOENT | libc::ESRCH | libc::ENOTTY), _) => Placed::Gone,
        _ => Placed::Failed(error),
    }
}

/// A message; none of a kind that was not asked for.
fn message(bytes: &[u8; MESSAGE]) -> Option<Message> {
    let (kind, _) = bytes.split_first()?;
    let (_, arguments) = bytes.split_at_checked(8)?;
    let (words, _) = arguments.as_chunks::<8>();
    let [first, second, ..] = words else { return None };
    let (first, second) = (u64::from_ne_bytes(*first), u64::from_ne_bytes(*second));
    match *kind {
        // Flags, then the address.
        EVENT_PAGEFAULT => Some(Message::Fault(second)),
        EVENT_REMOVED => Some(Message::Removed(first, second)),
        _ => None,
    }
}

fn from_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(DEVICE)?;
    let flags = libc::c_ulong::from((libc::O_CLOEXEC | libc::O_NONBLOCK).cast_unsigned());
    // SAFETY: the argument is a number.
    owned(unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags) })
}

fn from_call() -> io::Result<OwnedFd> {
    // SAFETY: the argument is a number.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    owned(libc::c_int::try_from(descriptor).unwrap_or(-1))
}

fn owned(descriptor: libc::c_int) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Requests and their structures, as linux/userfaultfd.h has them.
mod abi {
    use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

    /// `UFFDIO`.
    const UFFDIO: u32 = 0xaa;

    #[repr(C)]
    pub struct Api {
        pub api: u64,
        pub features: u64,
        pub ioctls: u64,
    }

    #[repr(C)]
    #[derive(Clone, Copy)]
    pub struct Range {
        pub start: u64,
        pub length: u64,
    }

    #[repr(C)]
    pub struct Register {
        pub range: Range,
        pub mode: u64,
        pub ioctls: u64,
    }

    #[repr(C)]
    pub struct Copy {
        pub to: u64,
        pub from: u64,
        pub length: u64,
        pub mode: u64,
        /// Bytes that were copied; not written by a call that did not come to copying.
        pub copied: i64,
    }

    #[repr(C)]
    pub struct Zero {
        pub range: Range,
        pub mode: u64,
        pub zeroed: i64,
    }

    #[repr(C)]
    pub struct Protect {
        pub range: Range,
        pub mode: u64,
    }

    ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0x00);
    ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
    ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFDIO, 0x01, Range);
    ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, Range);
    ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, 0x03, Copy);
    ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFDIO, 0x04, Zero);
    ioctl_iowr_nr!(UFFDIO_WRITEPROTECT, UFFDIO, 0x06, Protect);
    ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
}
