//! The specification's mounts: which the guest makes itself, and which need a file of the host.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use agent_proto::oci;
use oci_spec::runtime::Mount;

use super::ResourceError;
use crate::helper::Place;

/// Device nodes that every guest has.
const GUEST_DEVICES: [&str; 6] = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];
const CGROUP: &str = "/sys/fs/cgroup";
const SHM: &str = "/dev/shm";
/// Shared memory of all containers of a sandbox, in the guest: kata's place, which the agent's `Storage` names.
pub const GUEST_SHM: &str = "/run/kata-containers/sandbox/shm";

/// What becomes of a mount.
#[derive(Debug, PartialEq, Eq)]
enum Treatment {
    /// The guest mounts it as it stands: proc, tmpfs and the like, or a bind of one of the guest's own files.
    Guest,
    /// The guest mounts its own control groups there.
    Cgroup,
    /// The sandbox's shared memory, which is the guest's: the host's cannot be shared with it.
    SharedMemory,
    /// A file or directory of the host.
    Host,
    /// A device of the host.
    Device,
}

/// Translates mounts for the guest and puts the host's files among them into the container's share.
pub fn translate(mounts: &[Mount], share: &mut Place) -> Result<Vec<oci::Mount>, ResourceError> {
    mounts.iter().map(|mount| translate_one(mount, share)).collect()
}

fn translate_one(mount: &Mount, share: &mut Place) -> Result<oci::Mount, ResourceError> {
    let destination = mount.destination().to_string_lossy().into_owned();
    let options = mount.options().clone().unwrap_or_default();
    let guest = |kind: &str, source: &str, options: Vec<String>| oci::Mount {
        destination: destination.clone(),
        source: source.to_owned(),
        type_: kind.to_owned(),
        options,
        ..oci::Mount::default()
    };
    let source = mount.source().as_deref().unwrap_or(Path::new(""));
    let words = |list: &[&str]| list.iter().map(|&word| word.to_owned()).collect();
    match treatment(mount) {
        Treatment::Guest => Ok(guest(mount.typ().as_deref().unwrap_or("bind"), &source.to_string_lossy(), options)),
        Treatment::Cgroup => {
            let access = if options.iter().any(|option| option == "ro") { "ro" } else { "rw" };
            Ok(guest("cgroup", "cgroup", words(&["nosuid", "noexec", "nodev", "relatime", access])))
        }
        Treatment::SharedMemory => Ok(guest("bind", GUEST_SHM, words(&["rbind", "rw"]))),
        Treatment::Device => Err(ResourceError::VolumeDevice { path: source.to_owned(), destination }),
        Treatment::Host => {
            let unusable = |error| ResourceError::VolumeSource {
                path: source.to_owned(),
                destination: destination.clone(),
                source: Box::new(error),
            };
            let read_only = options.iter().any(|option| matches!(option.as_str(), "ro" | "rro"));
            let inside = share.add_volume(source, read_only).map_err(unusable)?;
            Ok(guest("bind", &inside, options))
        }
    }
}

fn treatment(mount: &Mount) -> Treatment {
    let options = mount.options().as_deref().unwrap_or_default();
    let bind = mount.typ().as_deref() == Some("bind")
        || options.iter().any(|option| matches!(option.as_str(), "bind" | "rbind"));
    if !bind {
        return Treatment::Guest;
    }
    let Some(source) = mount.source() else { return Treatment::Guest };
    if source.starts_with(CGROUP) || mount.destination() == Path::new(CGROUP) {
        Treatment::Cgroup
    } else if mount.destination() == Path::new(SHM) {
        Treatment::SharedMemory
    } else if source.starts_with("/proc")
        || source.starts_with("/sys")
        || GUEST_DEVICES.iter().any(|node| source == Path::new(node))
    {
        Treatment::Guest
    } else if is_device(source) {
        Treatment::Device
    } else {
        Treatment::Host
    }
}

fn is_device(path: &Path) -> bool {
    fs::metadata(path)
        .is_ok_and(|metadata| metadata.file_type().is_block_device() || metadata.file_type().is_char_device())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, destination: &str, options: &[&str]) -> Mount {
        serde_json::from_value(serde_json::json!({
            "type": kind, "source": source, "destination": destination, "options": options
        }))
        .unwrap()
    }

    #[test]
    fn kernel_file_systems_are_the_guests() {
        for kind in ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup"] {
            assert_eq!(treatment(&mount(kind, kind, "/x", &[])), Treatment::Guest, "{kind}");
        }
    }

    #[test]
    fn binds_are_sorted_by_what_they_bind() {
        let bind = |source, destination| treatment(&mount("bind", source, destination, &["rbind"]));
        assert_eq!(bind("/etc/hosts", "/etc/hosts"), Treatment::Host);
        assert_eq!(bind("/sys/fs/cgroup", "/sys/fs/cgroup"), Treatment::Cgroup);
        assert_eq!(bind("/sys/fs/cgroup/memory", "/m"), Treatment::Cgroup);
        assert_eq!(bind("/proc/cpuinfo", "/c"), Treatment::Guest);
        assert_eq!(bind("/dev/null", "/etc/secret"), Treatment::Guest);
        assert_eq!(bind("/dev/kmsg", "/dev/kmsg"), Treatment::Device);
        assert_eq!(bind("/run/pod/shm", "/dev/shm"), Treatment::SharedMemory);
        assert_eq!(treatment(&mount("none", "/etc/hosts", "/h", &["bind"])), Treatment::Host);
    }
}
