//! From a command line to a machine's configuration: options that name each other are put together, and files, interfaces
//! and sockets are opened.

mod network;
mod streams;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use devices::virtio::blk::BlkConfig;
use devices::virtio::console::PortEnd;
use devices::virtio::fs::{CachePolicy, FsConfig};
use devices::virtio::kernel_vhost::VhostError;
use devices::virtio::mem::{MIN_BLOCK_SIZE, MemConfig};
use devices::virtio::net::TapError;
use devices::virtio::pmem::PmemConfig;
use devices::virtio::rate_limiter::{BucketConfig, RateLimits};
use devices::virtio::vhost_user::{Patience, VhostUserConfig, VhostUserKind};

use super::command_line::CommandLine;
use super::command_line::backend::{Chardev, Drive, Netdev, Serial, SocketStream};
use super::command_line::device::{
    BalloonDevice, BlkDevice, Device, FsDevice, MemDevice, PmemDevice, PortDevice, RngDevice, VhostUserBlkDevice,
    VhostUserFsDevice,
};
use super::command_line::machine::{FileMemoryBackend, Mon, Numa, Object, Qmp};
use super::command_line::values::Place;
use super::drive::{DriveError, HostDrive};
use super::inventory::{Inventory, StreamEntry};
use crate::config::{
    BalloonConfig, BootConfig, Confinement, MachineConfig, MemoryBacking, MemoryConfig, PortConfig, RngConfig,
    SerialConfig, SlotConfig,
};

pub(super) use network::inherited;
pub use streams::{Input, Sockets};

/// Memory of a machine that asks for none, in MiB.
const DEFAULT_MEMORY_MIB: u32 = 256;
/// Entries of each queue of a directory, served here or by another process: room for the largest requests of Linux.
const FS_QUEUE_SIZE: u16 = 1024;
/// Entries of each other queue, unless the command line says how many.
const QUEUE_SIZE: u16 = 256;
/// Bytes of entropy of a second that a guest can be limited to, as StratoVirt has it.
const ENTROPY_RATES: std::ops::RangeInclusive<u128> = 64..=1_000_000_000;
const NANOSECONDS_PER_MILLISECOND: NonZeroU64 = match NonZeroU64::new(1_000_000) {
    Some(count) => count,
    None => NonZeroU64::MIN,
};
/// Threads for requests for a directory that wait for a disk.
const FS_WORKERS: u16 = 4;

/// A machine to be built, and how the process is to deal with it.
#[derive(Debug)]
pub struct Launch {
    /// The machine.
    pub machine: MachineConfig,
    /// The snapshot that it goes on from, in place of booting.
    pub incoming: Option<PathBuf>,
    /// Where the console's input comes from.
    pub input: Option<Input>,
    /// Where QMP clients come: each for [`Front::serve`](super::qmp::Front::serve).
    pub monitors: Vec<OwnedFd>,
    /// What QMP clients may ask about.
    pub inventory: Inventory,
    /// Whether the processors wait.
    pub freeze: bool,
    /// What to keep as long as the machine.
    pub sockets: Sockets,
}

/// Why a command line is not a machine.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Two things of a kind with one name.
    #[error("There are two of {option} with the id {id}")]
    Twice {
        /// The option.
        option: &'static str,
        /// The name.
        id: String,
    },
    /// A name of nothing, or of something that is in use.
    #[error("{user} needs a {option} with the id {id} to itself, and there is none")]
    Missing {
        /// Who refers to it.
        user: String,
        /// The option that would define it.
        option: &'static str,
        /// The name.
        id: String,
    },
    /// Properties that exclude each other, or cannot be for this machine.
    #[error("{what} cannot be: {why}")]
    Conflict {
        /// What was asked for.
        what: String,
        /// Why not.
        why: &'static str,
    },
    /// A file that cannot be opened.
    #[error("Cannot open {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A drive.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// A tap interface.
    #[error("Interface {id} cannot be used")]
    Tap {
        /// Its name in the command line.
        id: String,
        /// Why.
        #[source]
        source: TapError,
    },
    /// What the host's kernel would serve.
    #[error("The host's kernel cannot serve {user}")]
    Vhost {
        /// Which device or interface.
        user: String,
        /// Why.
        #[source]
        source: VhostError,
    },
    /// A socket.
    #[error("Cannot listen at {place}")]
    Listen {
        /// Where.
        place: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A socket without an address.
    #[error("A socket has either a path, or a host and a port")]
    SocketPlace,
    /// A socket that does not listen, or is to be waited for.
    #[error("A machine listens and waits for no client: the properties server and nowait are needed")]
    NotServer,
    /// A pseudo-terminal or pair of sockets could not be made.
    #[error("Cannot make a stream")]
    Stream(#[source] io::Error),
    /// Standard input or output.
    #[error("Standard input and output cannot be used")]
    Stdio(#[source] io::Error),
}

impl Launch {
    /// Opens what `line` asks for. Takes over the descriptors that it names.
    pub fn open(line: CommandLine) -> Result<Self, LaunchError> {
        unique("-device", line.device.iter().filter_map(Device::id))?;
        unique("-chardev", line.chardev.iter().filter_map(Chardev::id))?;
        unique("-object", line.object.iter().map(Object::id))?;
        let smp = line.smp.as_ref();
        if smp.is_some_and(|smp| !smp.is_consistent()) {
            return Err(conflict("-smp", "sockets, dies, clusters, cores and threads do not make its processors"));
        }
        if line.daemonize && matches!(line.serial, Some(Serial::Own(Chardev::Stdio(_)))) {
            return Err(conflict("-daemonize with -serial stdio", "a daemon has no terminal"));
        }
        let incoming = match line.incoming.as_ref().map(|incoming| &incoming.from) {
            Some(Place::File(directory)) => Some(directory.clone()),
            Some(_) => return Err(conflict("-incoming", "a snapshot is a directory: file:DIR")),
            None => None,
        };
        let memory = memory(&line)?;
        let CommandLine { name, smp, kernel, initrd, append, freeze, .. } = line;
        let boot = BootConfig { kernel, initrd, cmdline: append.unwrap_or_default() };
        let mut machine = MachineConfig::new(name.unwrap_or_else(|| "microvm".into()), memory, boot);
        machine.vcpus = smp.map_or(1, |smp| smp.cpus);
        if line.disable_seccomp {
            machine.confinement = Confinement::Off;
        }
        machine.slots = SlotConfig::STRATOVIRT;

        let mut backends = Backends::new(line.drive, line.netdev, line.chardev, line.object);
        for device in line.device {
            match device {
                Device::VirtioBlkDevice(device) => machine.blk.push(backends.drive(device)?),
                Device::VirtioNetDevice(device) => backends.interface(device, &mut machine)?,
                Device::VirtioRngDevice(device) if machine.rng.is_none() => {
                    machine.rng = Some(backends.entropy(&device)?);
                }
                Device::VirtioRngDevice(_) => return Err(conflict("A second virtio-rng-device", "a machine has one")),
                Device::VirtioFsDevice(device) => machine.fs.push(shared_directory(device)),
                Device::VhostUserBlkDevice(device) => machine.vhost_user.push(backends.remote_drive(device)?),
                Device::VhostUserFsDevice(device) => machine.vhost_user.push(backends.remote_directory(device)?),
                Device::VirtioSerialDevice(_) => {
                    machine.console.get_or_insert_default();
                }
                Device::Virtconsole(device) => backends.port(device, true, &mut machine)?,
                Device::Virtserialport(device) => backends.port(device, false, &mut machine)?,
                Device::VhostVsockDevice(device) if machine.vhost_vsock.is_none() => {
                    machine.vhost_vsock = Some(network::vsock(&device)?);
                }
                Device::VhostVsockDevice(_) => {
                    return Err(conflict("A second vhost-vsock-device", "a machine has one"));
                }
                Device::VirtioBalloonDevice(device) if machine.balloon.is_none() => {
                    machine.balloon = Some(balloon(&device));
                }
                Device::VirtioBalloonDevice(_) => return Err(conflict("A second balloon", "a machine has one")),
                Device::VirtioMemDevice(device) if machine.pluggable.is_none() => {
                    machine.pluggable = Some(backends.pluggable(&device)?);
                }
                Device::VirtioMemDevice(_) => return Err(conflict("A second virtio-mem-device", "a machine has one")),
                Device::VirtioPmemDevice(device) => machine.pmem.push(backends.persistent(device)?),
            }
        }
        let (serial, input) = backends.console(line.serial)?;
        machine.serial = serial;
        if !machine.vhost_user.is_empty() && machine.memory.backing.is_private() {
            return Err(conflict("A device of another process", "it needs -machine mem-share=on"));
        }
        let monitors = backends.monitors(&line.qmp, line.mon)?;
        let (inventory, sockets) = backends.into_inventory();
        Ok(Self { machine, incoming, input, monitors, inventory, freeze, sockets })
    }
}

fn conflict(what: impl Into<String>, why: &'static str) -> LaunchError {
    LaunchError::Conflict { what: what.into(), why }
}

fn unique<'a>(option: &'static str, ids: impl Iterator<Item = &'a str>) -> Result<(), LaunchError> {
    let mut seen = std::collections::BTreeSet::new();
    for id in ids {
        if !seen.insert(id) {
            return Err(LaunchError::Twice { option, id: id.to_owned() });
        }
    }
    Ok(())
}

/// Guest memory: of `-m`, and of what `-mem-path` or the one NUMA node's memory backend says about it.
fn memory(line: &CommandLine) -> Result<MemoryConfig, LaunchError> {
    let machine = line.machine.clone().unwrap_or_default();
    let mut memory = match &line.memory {
        Some(memory) => MemoryConfig::from_size(memory.size.0),
        None => MemoryConfig::from_mib(DEFAULT_MEMORY_MIB),
    };
    memory.core_dump = machine.dump_guest_core;
    memory.prealloc = line.mem_prealloc;
    if machine.mem_share {
        memory.backing = MemoryBacking::Shared;
    }
    let mut nodes = line.numa.iter().filter_map(|Numa::Node(node)| node.memdev.as_deref());
    match (&line.mem_path, nodes.next(), nodes.next()) {
        (Some(path), None, None) => {
            memory.backing = MemoryBacking::File { file: memory_file(path)?, shared: machine.mem_share };
        }
        (None, Some(id), None) => back_by_object(&mut memory, id, &line.object)?,
        (None, None, None) => {}
        _ => return Err(conflict("More than one memory", "a microvm has one NUMA node, whose memory has one backend")),
    }
    Ok(memory)
}

fn back_by_object(memory: &mut MemoryConfig, id: &str, objects: &[Object]) -> Result<(), LaunchError> {
    let missing =
        || LaunchError::Missing { user: "-numa node".into(), option: "-object memory-backend", id: id.into() };
    let (size, prealloc, dump) = match objects.iter().find(|object| object.id() == id).ok_or_else(missing)? {
        Object::MemoryBackendRam(backend) => {
            memory.backing = if backend.share { MemoryBacking::Shared } else { MemoryBacking::Private };
            (backend.size, backend.prealloc, backend.dump)
        }
        // A memfd is there to be shared.
        Object::MemoryBackendMemfd(backend) => {
            memory.backing = MemoryBacking::Shared;
            (backend.size, backend.prealloc, backend.dump)
        }
        Object::MemoryBackendFile(FileMemoryBackend { mem_path, share, size, prealloc, dump, .. }) => {
            memory.backing = MemoryBacking::File { file: memory_file(mem_path)?, shared: *share };
            (*size, *prealloc, *dump)
        }
        Object::RngRandom(_) | Object::Iothread(_) => return Err(missing()),
    };
    if size.0 != memory.size {
        return Err(conflict(format!("Memory backend {id}"), "its size is not that of -m"));
    }
    memory.prealloc |= prealloc;
    memory.core_dump = dump.unwrap_or(memory.core_dump);
    Ok(())
}

/// The file at `path`, made if there is none; or one without a name in the directory `path`.
fn memory_file(path: &Path) -> Result<File, LaunchError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if path.is_dir() {
        options.custom_flags(libc::O_TMPFILE).mode(0o600);
    } else {
        options.create(true).truncate(false);
    }
    options.open(path).map_err(|source| LaunchError::File { path: path.into(), source })
}

/// What devices are put on top of; each is taken once.
struct Backends {
    drives: Vec<Drive>,
    netdevs: Vec<Netdev>,
    chardevs: Vec<Chardev>,
    objects: Vec<Object>,
    sockets: Sockets,
    /// By device.
    plugged: Vec<(String, HostDrive)>,
    /// Sockets of processes that serve devices.
    remote: Vec<StreamEntry>,
    /// The device of memory that can be plugged.
    memory: Option<String>,
}

impl Backends {
    fn new(drives: Vec<Drive>, netdevs: Vec<Netdev>, chardevs: Vec<Chardev>, objects: Vec<Object>) -> Self {
        let (sockets, plugged, remote, memory) = Default::default();
        Self { drives, netdevs, chardevs, objects, sockets, plugged, remote, memory }
    }

    /// The one port of the console device, which must be there before it.
    fn port(&mut self, device: PortDevice, console: bool, machine: &mut MachineConfig) -> Result<(), LaunchError> {
        let PortDevice { id, chardev } = device;
        let missing =
            |option, id: &str| LaunchError::Missing { user: format!("Device {}", &id), option, id: id.to_owned() };
        let bus = machine.console.as_mut().ok_or_else(|| missing("-device virtio-serial-device before it", &id))?;
        if !bus.ports.is_empty() {
            return Err(conflict(format!("Device {id}"), "a microvm has one port"));
        }
        let index = self.chardevs.iter().position(|known| known.id() == Some(chardev.as_str()));
        let index = index.ok_or_else(|| missing("-chardev", &chardev))?;
        let host = self.sockets.open(&self.chardevs.swap_remove(index), &id)?;
        bus.ports.push(PortConfig { number: 0, console, name: (!console).then_some(id), host });
        Ok(())
    }

    fn drive(&mut self, device: BlkDevice) -> Result<BlkConfig, LaunchError> {
        let BlkDevice { id, drive, serial, num_queues, queue_size } = device;
        let missing = || LaunchError::Missing { user: format!("Device {id}"), option: "-drive", id: drive.clone() };
        let index = self.drives.iter().position(|known| known.id == drive).ok_or_else(missing)?;
        let drive = HostDrive::open(self.drives.swap_remove(index))?;
        let mut config = drive.device(id.clone(), serial)?;
        config.queues = num_queues.unwrap_or(1);
        config.queue_size = queue_size.unwrap_or(QUEUE_SIZE);
        self.plugged.push((id, drive));
        Ok(config)
    }

    /// The socket of a process that serves a device.
    fn socket(&mut self, user: &str, id: &str) -> Result<PathBuf, LaunchError> {
        let missing =
            || LaunchError::Missing { user: format!("Device {user}"), option: "-chardev socket", id: id.to_owned() };
        let index = self.chardevs.iter().position(|known| known.id() == Some(id)).ok_or_else(missing)?;
        // `server` is in command lines that were written for StratoVirt, which connects all the same.
        match self.chardevs.swap_remove(index) {
            Chardev::Socket(SocketStream { path: Some(path), host: None, port: None, .. }) => {
                let filename = format!("unix:{}", path.display());
                self.remote.push(StreamEntry { label: id.to_owned(), filename });
                Ok(path)
            }
            _ => Err(missing()),
        }
    }

    fn remote_drive(&mut self, device: VhostUserBlkDevice) -> Result<VhostUserConfig, LaunchError> {
        Ok(VhostUserConfig {
            socket: self.socket(&device.id, &device.chardev)?,
            id: device.id,
            kind: VhostUserKind::Blk,
            num_queues: device.num_queues.unwrap_or(1),
            queue_size: device.queue_size.unwrap_or(QUEUE_SIZE),
            patience: Patience::default(),
        })
    }

    fn remote_directory(&mut self, device: VhostUserFsDevice) -> Result<VhostUserConfig, LaunchError> {
        Ok(VhostUserConfig {
            socket: self.socket(&device.id, &device.chardev)?,
            id: device.id,
            kind: VhostUserKind::Fs { tag: device.tag },
            num_queues: 1,
            queue_size: FS_QUEUE_SIZE,
            patience: Patience::default(),
        })
    }

    /// The console on the serial port.
    fn console(&mut self, serial: Option<Serial>) -> Result<(SerialConfig, Option<Input>), LaunchError> {
        let chardev = match serial {
            None => return Ok((SerialConfig::Null, None)),
            Some(Serial::Own(chardev)) => chardev,
            Some(Serial::Named(id)) => {
                let index = self.chardevs.iter().position(|known| known.id() == Some(id.as_str()));
                let missing = || LaunchError::Missing { user: "-serial".into(), option: "-chardev", id: id.clone() };
                self.chardevs.swap_remove(index.ok_or_else(missing)?)
            }
        };
        streams::serial(self.sockets.open(&chardev, "serial0")?)
    }

    /// The sockets of QMP.
    fn monitors(&mut self, qmp: &[Qmp], mon: Vec<Mon>) -> Result<Vec<OwnedFd>, LaunchError> {
        let mut listeners = Vec::new();
        for Qmp { address, server, nowait } in qmp {
            if !server || !nowait {
                return Err(LaunchError::NotServer);
            }
            listeners.push(self.sockets.listen(address)?);
        }
        for Mon { chardev } in mon {
            let index = self.chardevs.iter().position(|known| known.id() == Some(chardev.as_str()));
            let missing =
                || LaunchError::Missing { user: "-mon".into(), option: "-chardev socket", id: chardev.clone() };
            match self.sockets.open(&self.chardevs.swap_remove(index.ok_or_else(missing)?), &chardev)? {
                PortEnd::Listener(listener) => listeners.push(listener),
                _ => return Err(missing()),
            }
        }
        Ok(listeners)
    }

    /// What is left to tell, when everything has been taken.
    fn into_inventory(self) -> (Inventory, Sockets) {
        let Self { objects, mut sockets, plugged, remote, memory, .. } = self;
        let streams = sockets.take_streams().into_iter().chain(remote).collect();
        let iothreads = objects.into_iter().filter_map(|object| match object {
            Object::Iothread(thread) => Some(thread.id),
            _ => None,
        });
        (Inventory { drives: plugged, streams, memory, iothreads: iothreads.collect() }, sockets)
    }

    /// Memory to be plugged, as much as its backend has.
    fn pluggable(&mut self, device: &MemDevice) -> Result<MemConfig, LaunchError> {
        let MemDevice { id, memdev, requested_size, block_size } = device;
        let found = self.objects.iter().find_map(|object| match object {
            Object::MemoryBackendRam(backend) if backend.id == *memdev => Some(backend.size),
            _ => None,
        });
        let option = "-object memory-backend-ram";
        let missing = || LaunchError::Missing { user: format!("Device {id}"), option, id: memdev.clone() };
        self.memory = Some(id.clone());
        Ok(MemConfig {
            size: found.ok_or_else(missing)?.0,
            block_size: block_size.map_or(MIN_BLOCK_SIZE, |size| size.0),
            requested: requested_size.map_or(0, |size| size.0),
            node: 0,
        })
    }

    fn persistent(&mut self, device: PmemDevice) -> Result<PmemConfig, LaunchError> {
        let PmemDevice { id, drive } = device;
        let missing = || LaunchError::Missing { user: format!("Device {id}"), option: "-drive", id: drive.clone() };
        let index = self.drives.iter().position(|known| known.id == drive).ok_or_else(missing)?;
        let Drive { file: path, readonly: read_only, .. } = self.drives.swap_remove(index);
        let file = OpenOptions::new().read(true).write(!read_only).open(&path);
        Ok(PmemConfig { id, file: file.map_err(|source| LaunchError::File { path, source })?, read_only })
    }

    fn entropy(&self, device: &RngDevice) -> Result<RngConfig, LaunchError> {
        let RngDevice { rng: id, max_bytes, period, .. } = device;
        let found = self.objects.iter().find_map(|object| match object {
            Object::RngRandom(rng) if rng.id == *id => Some(rng),
            _ => None,
        });
        let option = "-object rng-random";
        let missing = || LaunchError::Missing { user: "virtio-rng-device".into(), option, id: id.clone() };
        let bytes = entropy_limit(*max_bytes, *period)?;
        match found.ok_or_else(missing)?.filename.to_str() {
            Some("/dev/urandom" | "/dev/random") => Ok(RngConfig { limits: RateLimits { ops: None, bytes } }),
            _ => Err(conflict(format!("Entropy {id}"), "it comes from /dev/urandom or /dev/random")),
        }
    }
}

/// `max-bytes` in each `period` of so many milliseconds.
fn entropy_limit(max_bytes: Option<u64>, period: Option<u64>) -> Result<Option<BucketConfig>, LaunchError> {
    let conflict = |why| conflict("Limit of a virtio-rng-device", why);
    let Some(bytes) = max_bytes else { return Ok(None) };
    let period = period.and_then(NonZeroU64::new).ok_or_else(|| conflict("max-bytes needs a period"))?;
    let rate = u128::from(bytes) * 1000 / u128::from(period.get());
    if !ENTROPY_RATES.contains(&rate) {
        return Err(conflict("it is 64 to 1,000,000,000 bytes of a second"));
    }
    let size = NonZeroU64::new(bytes).ok_or_else(|| conflict("no byte is no entropy"))?;
    let refill_ns =
        period.checked_mul(NANOSECONDS_PER_MILLISECOND).ok_or_else(|| conflict("its period is too long"))?;
    Ok(Some(BucketConfig { size, one_time_burst: 0, refill_ns }))
}

fn balloon(device: &BalloonDevice) -> BalloonConfig {
    BalloonConfig {
        target: 0,
        deflate_on_oom: device.deflate_on_oom,
        // What the monitor of StratoVirt's auto-balloon is for: the host gets back what the guest does not use.
        free_page_reporting: device.free_page_reporting || device.auto_balloon,
        stats_interval: None,
    }
}

fn shared_directory(device: FsDevice) -> FsConfig {
    FsConfig {
        tag: device.tag,
        shared_dir: device.source,
        cache: CachePolicy::Auto,
        num_request_queues: 1,
        queue_size: FS_QUEUE_SIZE,
        writeback: false,
        workers: FS_WORKERS,
        xattr: true,
        posix_locks: true,
    }
}
