//! Boots a kernel with its console on standard output, and says how the machine ended.
//!
//! ```text
//! boot [--vcpus N] [--mib N] [--fs TAG=DIR]... [--blk FILE]... [--vhost-user-blk SOCKET]... [--vhost-user-fs TAG=SOCKET]...
//!      [--vsock CID] [--rng] [--map-images] KERNEL [INITRD] [-- COMMAND-LINE...]
//! ```
//! What follows `--` is appended to the machine's own base command line.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::ExitCode;

use devices::virtio::fs::CachePolicy;
use devices::virtio::vhost_user::{Patience, VhostUserKind};
use vmm::{
    BASE_CMDLINE, BlkConfig, BootConfig, ExitReason, FsConfig, Machine, MachineConfig, MemoryBacking, MemoryConfig,
    Placement, RngConfig, SerialConfig, VhostUserConfig, VsockConfig,
};

type Error = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)).and_then(boot) {
        Ok(reason) => {
            eprintln!("{reason}");
            match reason {
                ExitReason::Shutdown | ExitReason::Reset => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            eprint!("{error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn boot(config: MachineConfig) -> Result<ExitReason, Error> {
    let machine = Machine::build(config)?;
    machine.start()?;
    let reason = machine.wait();
    let trace = machine.trace();
    let since_creation = |at: Option<u64>| at.zip(trace.vm_created()).map(|(at, created)| (at - created) / 1000);
    eprintln!(
        "first run {:?} us and init {:?} us after the creation of the VM",
        since_creation(trace.first_run()),
        since_creation(trace.guest_init())
    );
    Ok(reason)
}

/// Adds a device that another process serves, which has to see the guest's memory.
fn vhost_user(config: &mut MachineConfig, kind: VhostUserKind, socket: PathBuf) {
    config.memory.backing = MemoryBacking::Shared;
    let id = format!("vhost-user-{}", config.vhost_user.len());
    let patience = Patience::default();
    config.vhost_user.push(VhostUserConfig { id, socket, kind, num_queues: 1, queue_size: 256, patience });
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<MachineConfig, Error> {
    let boot = BootConfig { kernel: PathBuf::new(), initrd: None, cmdline: BASE_CMDLINE.into() };
    let mut config = MachineConfig::new("boot", MemoryConfig::from_mib(256), boot);
    config.serial = SerialConfig::Stdout;
    let mut images = Vec::new();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--vcpus" => config.vcpus = value()?.parse()?,
            "--mib" => config.memory = MemoryConfig::from_mib(value()?.parse()?),
            "--blk" => {
                let path = value()?;
                let file = OpenOptions::new().read(true).write(true).open(&path)?;
                config.blk.push(BlkConfig::new(path, file));
            }
            "--fs" => {
                let (tag, directory) = value()?.split_once('=').map(|(t, d)| (t.into(), d.into())).ok_or("TAG=DIR")?;
                config.fs.push(FsConfig {
                    tag,
                    shared_dir: directory,
                    cache: CachePolicy::default(),
                    num_request_queues: 1,
                    queue_size: 128,
                    writeback: false,
                    workers: 2,
                    xattr: true,
                    posix_locks: false,
                });
            }
            "--vhost-user-blk" => vhost_user(&mut config, VhostUserKind::Blk, value()?.into()),
            "--vhost-user-fs" => {
                let (tag, socket) = value()?.split_once('=').map(|(t, s)| (t.into(), s.into())).ok_or("TAG=SOCKET")?;
                vhost_user(&mut config, VhostUserKind::Fs { tag }, socket);
            }
            "--vsock" => config.vsock = Some(VsockConfig { guest_cid: value()?.parse()?, uds_path: None }),
            "--map-images" => config.images = Placement::Mapped,
            "--rng" => config.rng = Some(RngConfig::default()),
            "--" => {
                for word in arguments.by_ref() {
                    config.boot.cmdline.push(' ');
                    config.boot.cmdline.push_str(&word);
                }
            }
            _ => images.push(PathBuf::from(argument)),
        }
    }
    let mut images = images.into_iter();
    config.boot.kernel = images.next().ok_or("A kernel image is needed")?;
    config.boot.initrd = images.next();
    Ok(config)
}
