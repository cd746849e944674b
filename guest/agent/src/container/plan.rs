//! What a request asks for, decided and written down as the bundle that the helper reads.
//!
//! All of this looks at file systems that the host serves, so none of it runs on the agent's own thread.

use std::fs;
use std::path::{Path, PathBuf};

use agent_proto::{agent, oci};
use nix::sys::stat::{SFlag, major, minor, stat};

use super::{Error, bundle, cgroup, failed, rootfs, spec};
use crate::helper;

/// What the agent needs to know about a process beside its specification.
#[derive(Debug, Clone, Copy)]
pub struct Traits {
    /// It gets a terminal.
    pub terminal: bool,
    /// Rows and columns of the terminal, if they are given.
    pub size: Option<(u16, u16)>,
    /// Its user's number.
    pub user: u32,
}

/// A container to be made.
#[derive(Debug)]
pub struct Plan {
    /// The bundle; it has been written.
    pub directory: PathBuf,
    /// The root file system.
    pub rootfs: PathBuf,
    /// The cgroup, below the mount.
    pub cgroup: PathBuf,
    /// The first process.
    pub process: Traits,
}

/// Writes the bundle of a container.
pub fn container(request: agent::CreateContainerRequest, pid_namespace_of: Option<i32>) -> Result<Plan, Error> {
    let id = &request.container_id;
    let mut given = request.OCI.into_option().ok_or(spec::Error::Missing("OCI section"))?;
    let root = spec::rootfs(&given)?;
    fs::metadata(&root).map_err(failed(format!("Looking at the root file system {}", root.display())))?;
    resolve_devices(&mut given, &request.devices)?;
    let process = given.Process.as_mut().ok_or(spec::Error::Missing("process"))?;
    let traits = complete_process(process, request.string_user.as_ref(), &root, &given.Mounts)?;

    let cgroups_path = given.Linux.as_ref().map_or("", |linux| &linux.CgroupsPath);
    let cgroup = cgroup::path(cgroups_path, id)?;
    let placement = spec::Placement { rootfs: &root, cgroup: &cgroup, pid_namespace_of };
    let translated = spec::translate(&given, placement)?;
    set_sysctls(&translated.guest_sysctls)?;

    let directory = bundle(id);
    fs::create_dir_all(&directory).map_err(failed("Making the bundle"))?;
    let config = serde_json::to_vec(&translated.spec).map_err(|error| spec::Error::Invalid(error.to_string()))?;
    fs::write(directory.join(helper::CONFIG), config).map_err(failed("Writing the bundle"))?;
    Ok(Plan { directory, rootfs: root, cgroup, process: traits })
}

/// Translates a further process of a container with this root file system.
pub fn process(
    mut given: oci::Process,
    user: Option<&agent::StringUser>,
    root: &Path,
) -> Result<(oci_spec::runtime::Process, Traits), Error> {
    let traits = complete_process(&mut given, user, root, &[])?;
    Ok((spec::process(&given)?, traits))
}

/// Adds what runc adds: HOME from the container's passwd, and the working directory if the image lacks it.
fn complete_process(
    process: &mut oci::Process,
    user: Option<&agent::StringUser>,
    root: &Path,
    mounts: &[oci::Mount],
) -> Result<Traits, Error> {
    if let Some(user) = user {
        apply_string_user(process, user)?;
    }
    let uid = process.User.as_ref().map_or(0, |user| user.UID);
    if !process.Env.iter().any(|entry| entry.starts_with("HOME=") && entry.len() > "HOME=".len()) {
        process.Env.retain(|entry| entry != "HOME=");
        process.Env.push(format!("HOME={}", rootfs::home(root, uid)));
    }
    let cwd = Path::new(&process.Cwd);
    // Below a mount the directory is not the image's.
    let is_mounted = |mount: &oci::Mount| mount.destination != "/" && cwd.starts_with(&mount.destination);
    if cwd.is_absolute()
        && !mounts.iter().any(is_mounted)
        && let Err(error) = rootfs::ensure_directory(root, cwd)
    {
        tracing::debug!(%error, cwd = process.Cwd, "The working directory was not made");
    }
    Ok(Traits { terminal: process.Terminal, size: console_size(process), user: uid })
}

/// A user as the request's text names it: numbers only, since images' names are resolved on the host.
fn apply_string_user(process: &mut oci::Process, user: &agent::StringUser) -> Result<(), Error> {
    let number = |text: &str| -> Result<u32, Error> {
        text.parse().map_err(|_| spec::Error::Refused(format!("A user or group by name ({text:?})")).into())
    };
    let target = process.User.mut_or_insert_default();
    if !user.uid.is_empty() {
        target.UID = number(&user.uid)?;
    }
    if !user.gid.is_empty() {
        target.GID = number(&user.gid)?;
    }
    if !user.additionalGids.is_empty() {
        target.AdditionalGids = user.additionalGids.iter().map(|gid| number(gid)).collect::<Result<_, _>>()?;
    }
    Ok(())
}

/// Rows and columns, if the request gives them.
fn console_size(process: &oci::Process) -> Option<(u16, u16)> {
    let size = process.ConsoleSize.as_ref()?;
    Some((u16::try_from(size.Height).ok()?, u16::try_from(size.Width).ok()?))
}

/// Device numbers in the specification are the host's; those of the guest's device nodes count.
fn resolve_devices(spec: &mut oci::Spec, devices: &[agent::Device]) -> Result<(), Error> {
    for device in devices.iter().filter(|device| !device.vm_path.is_empty()) {
        let path = Path::new(&device.vm_path);
        let status =
            stat(path).map_err(|errno| failed(format!("Looking at device {}", device.vm_path))(errno.into()))?;
        let kind = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT;
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let linux = spec.Linux.mut_or_insert_default();
        for entry in linux.Devices.iter_mut().filter(|entry| entry.Path == device.container_path) {
            entry.Type = if kind == SFlag::S_IFBLK { "b".to_owned() } else { "c".to_owned() };
            entry.Major = number(major(status.st_rdev));
            entry.Minor = number(minor(status.st_rdev));
        }
    }
    Ok(())
}

fn set_sysctls(sysctls: &[(String, String)]) -> Result<(), Error> {
    for (name, value) in sysctls {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        fs::write(path, value).map_err(failed(format!("Setting sysctl {name} to {value:?}")))?;
    }
    Ok(())
}
