//! What a sandbox's machine is made of.
//!
//! A machine that is saved as a template is made of the same: see [`devices`].

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use devices::virtio::fs::CachePolicy;
use tracing_subscriber::filter::LevelFilter;
use vmm::{
    BASE_CMDLINE, BlkConfig, BootConfig, FsConfig, MachineConfig, MemConfig, MemoryConfig, RngConfig, VsockConfig,
};

use crate::config::{Config, FsCache, GuestRoot, Hypervisor};
use crate::ids::Id;
use crate::resources::share::TAG;

/// The guest's context id. Every machine has a vsock device of its own, so one number does for all; it is the first
/// that may be a guest's (virtio 1.2 section 5.10.4).
const GUEST_CID: u64 = 3;
/// Request queues of the shared file system. One is served by one thread.
const FS_REQUEST_QUEUES: u16 = 1;
const FS_QUEUE_SIZE: u16 = 128;
/// One thread for what waits for a disk, and one for data.
const FS_WORKERS: u16 = 2;
/// The kernel makes no dummy interface by itself: nobody asked for it, and its random address would be the same in all
/// clones of a template. Programs can still make some.
const NO_DUMMIES: &str = "dummy.numdummies=0";

/// The drive with the guest's root, which is its only one: Linux names drives in their order.
const ROOT_DRIVE: &str = "root";
const ROOT_DEVICE: &str = "/dev/vda";

/// Memory is plugged in blocks of this size, the smallest that there can be.
pub const BLOCK: u64 = 2 << 20;
/// Linux has plugged memory in pieces of this size, and leaves a part of one at the end of the region alone; in larger ones
/// where it boots with a lot of memory (`probe_memory_block_size` of its `arch/x86/mm/init_64.c`).
const PIECE: u64 = 128 << 20;
const LARGE_PIECE: u64 = 2 << 30;
/// That much.
const A_LOT: u64 = 64 << 30;

/// The guest's root file system cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("Cannot open the guest's image {}", path.display())]
pub struct ImageError {
    path: PathBuf,
    source: io::Error,
}

/// What a sandbox's machine is made of, but for what has to be opened: see [`drives`].
pub fn machine_config(sandbox: &Id, config: &Config, shared: &Path, socket: &Path) -> MachineConfig {
    let hypervisor = &config.hypervisor;
    let boot = BootConfig {
        kernel: hypervisor.kernel.clone(),
        initrd: match &hypervisor.root {
            GuestRoot::Initrd(path) => Some(path.clone()),
            GuestRoot::Image { .. } => None,
        },
        cmdline: command_line(config),
    };
    let memory = MemoryConfig::from_size(hypervisor.memory_mib << 20);
    let mut machine = MachineConfig::new(sandbox.as_str(), memory, boot);
    machine.vcpus = u8::try_from(hypervisor.vcpus.get()).unwrap_or(u8::MAX);
    machine.fs = vec![FsConfig {
        tag: TAG.to_owned(),
        shared_dir: shared.to_owned(),
        cache: match hypervisor.fs_cache {
            FsCache::Never => CachePolicy::Never,
            FsCache::Auto => CachePolicy::Auto,
            FsCache::Always => CachePolicy::Always,
        },
        num_request_queues: FS_REQUEST_QUEUES,
        queue_size: FS_QUEUE_SIZE,
        writeback: false,
        workers: FS_WORKERS,
        xattr: true,
        // Nobody but the sandbox writes to its share.
        posix_locks: false,
    }];
    // The shim itself needs no socket; a person needs one to reach the debug console.
    let uds_path = config.agent.debug_console.then(|| socket.to_owned());
    machine.vsock = Some(VsockConfig { guest_cid: GUEST_CID, uds_path });
    machine.rng = Some(RngConfig::default());
    machine.pluggable = pluggable(hypervisor);
    machine.confinement = config.runtime.confinement;
    machine
}

/// The drive with the guest's root, where it has one, open for reading alone.
pub fn drives(config: &Config) -> Result<Vec<BlkConfig>, ImageError> {
    let GuestRoot::Image { path, .. } = &config.hypervisor.root else { return Ok(Vec::new()) };
    let file = File::open(path).map_err(|source| ImageError { path: path.clone(), source })?;
    Ok(vec![BlkConfig { read_only: true, ..BlkConfig::new(ROOT_DRIVE, file) }])
}

/// Room for memory that is plugged when containers need it, of which the guest has none at first. Whole pieces: what is
/// wanted of it stays below what is configured.
fn pluggable(hypervisor: &Hypervisor) -> Option<MemConfig> {
    let piece = if hypervisor.memory_mib << 20 < A_LOT { PIECE } else { LARGE_PIECE };
    let size = (hypervisor.more_memory_mib << 20).next_multiple_of(piece);
    (size > 0).then_some(MemConfig { size, block_size: BLOCK, requested: 0, node: 0 })
}

/// The kernel's command line: the machine's own words, the agent's, then what the operator added.
pub fn command_line(config: &Config) -> String {
    let mut words = vec![BASE_CMDLINE.to_owned(), NO_DUMMIES.to_owned()];
    if let GuestRoot::Image { kind, .. } = &config.hypervisor.root {
        words.push(format!("root={ROOT_DEVICE} ro"));
        words.extend(kind.map(|kind| format!("rootfstype={}", kind.name())));
    }
    if config.runtime.log_level < LevelFilter::DEBUG {
        // Every line on the serial console costs the guest an exit for each byte.
        words.push("quiet".to_owned());
    }
    if config.agent.debug {
        words.push("agent.log=debug".to_owned());
    }
    if config.agent.debug_console {
        words.push("agent.debug_console".to_owned());
    }
    if !config.hypervisor.kernel_params.is_empty() {
        words.push(config.hypervisor.kernel_params.clone());
    }
    words.join(" ")
}

/// The devices in their order, each with what the guest knows of it: a machine that is restored must have the same.
pub fn devices(machine: &MachineConfig, root: &GuestRoot) -> Vec<String> {
    let fs = machine.fs.iter().map(|fs| {
        let FsConfig { tag, num_request_queues: queues, queue_size: size, .. } = fs;
        format!("fs {tag} with {queues} queue of {size}")
    });
    // It is not open yet.
    let blk = matches!(root, GuestRoot::Image { .. }).then(|| format!("blk {ROOT_DRIVE}"));
    let vsock = machine.vsock.iter().map(|vsock| format!("vsock {}", vsock.guest_cid));
    let rng = machine.rng.iter().map(|_| "rng".to_owned());
    let mem = machine.pluggable.iter().map(|mem| {
        let MemConfig { size, block_size, .. } = mem;
        format!("mem of {} MiB in blocks of {} MiB", size >> 20, block_size >> 20)
    });
    fs.chain(blk).chain(vsock).chain(rng).chain(mem).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::root::ImageType;

    #[test]
    fn the_command_line_has_the_agents_and_the_operators_words() {
        let mut config = Config::default();
        assert!(command_line(&config).starts_with(BASE_CMDLINE) && command_line(&config).ends_with(" quiet"));
        config.agent.debug = true;
        config.agent.debug_console = true;
        config.hypervisor.kernel_params = "a=b c".to_owned();
        config.runtime.log_level = LevelFilter::DEBUG;
        assert_eq!(
            command_line(&config),
            format!("{BASE_CMDLINE} {NO_DUMMIES} agent.log=debug agent.debug_console a=b c")
        );
    }

    #[test]
    fn the_machine_is_what_the_configuration_says() {
        let mut config = Config::default();
        config.hypervisor.memory_mib = 300;
        let make = |config: &Config| {
            machine_config(&Id::try_from("x").unwrap(), config, Path::new("/s"), Path::new("/socket"))
        };
        let machine = make(&config);
        assert_eq!(machine.vsock.unwrap().uds_path, None);
        assert_eq!((machine.memory.size, machine.vcpus), (300 << 20, 1));
        assert_eq!((machine.fs[0].tag.as_str(), machine.fs[0].shared_dir.as_path()), (TAG, Path::new("/s")));
        config.agent.debug_console = true;
        assert_eq!(make(&config).vsock.unwrap().uds_path.as_deref(), Some(Path::new("/socket")));
    }

    #[test]
    fn an_image_is_a_drive_that_the_kernel_mounts() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut config = Config::default();
        assert!(drives(&config).unwrap().is_empty() && !command_line(&config).contains("root="));
        config.hypervisor.root = GuestRoot::Image { path: file.path().to_owned(), kind: Some(ImageType::Erofs) };
        let machine = machine_config(&Id::try_from("x").unwrap(), &config, Path::new("/s"), Path::new("/socket"));
        assert_eq!(machine.boot.initrd, None);
        assert!(machine.boot.cmdline.contains(" root=/dev/vda ro rootfstype=erofs "), "{}", machine.boot.cmdline);
        let [drive] = drives(&config).unwrap().try_into().unwrap();
        assert!(drive.read_only);
        config.hypervisor.root = GuestRoot::Image { path: "/nonexistent/i".into(), kind: None };
        assert_eq!(drives(&config).unwrap_err().to_string(), "Cannot open the guest's image /nonexistent/i");
    }

    #[test]
    fn devices_are_told_in_their_order() {
        let machine =
            machine_config(&Id::try_from("x").unwrap(), &Config::default(), Path::new("/s"), Path::new("/socket"));
        let initrd = GuestRoot::default();
        assert_eq!(devices(&machine, &initrd), ["fs kataShared with 1 queue of 128", "vsock 3", "rng"]);
        let image = GuestRoot::Image { path: "/x".into(), kind: None };
        assert_eq!(devices(&machine, &image), ["fs kataShared with 1 queue of 128", "blk root", "vsock 3", "rng"]);
    }

    #[test]
    fn there_is_room_for_memory_where_it_is_configured() {
        let mut config = Config::default();
        let told = |config: &Config| {
            let machine = machine_config(&Id::try_from("x").unwrap(), config, Path::new("/s"), Path::new("/socket"));
            if let Some(mem) = machine.pluggable {
                mem.check().unwrap();
            }
            devices(&machine, &config.hypervisor.root).get(3).cloned()
        };
        assert_eq!(told(&config), None);
        for (memory, more, size) in [(256, 1, 128), (256, 128, 128), (256, 129, 256), (64 << 10, 129, 2048)] {
            (config.hypervisor.memory_mib, config.hypervisor.more_memory_mib) = (memory, more);
            assert_eq!(told(&config), Some(format!("mem of {size} MiB in blocks of 2 MiB")));
        }
    }
}
