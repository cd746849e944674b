//! What the nested host boots: Debian's cloud kernel and an initrd of busybox and modules.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use guest_image::archive;
use guest_image::manifest::Compression;
use guest_image::tree::{Node, Tree};

use super::modules::Modules;
use crate::cache::{self, Key};
use crate::packages;

/// PID 1 of the initrd: inserts the modules, mounts the machine's root and goes there.
const INIT: &str = include_str!("../../nested/init.sh");

/// The modules that containers and microVMs need, wherever the kernel does not have them built in.
const MODULES: &[&str] = &[
    // The way to the machine: the root file system and the channel.
    "virtio_pci",
    "virtiofs",
    "virtio_console",
    "overlay",
    // Virtual machines.
    "kvm_amd",
    "vhost_vsock",
    "vhost_net",
    "tun",
    // Disks that are read and written past the page cache, which no other file system here allows.
    "ext4",
    // Containers.
    "loop",
    "veth",
    "bridge",
    "br_netfilter",
    "nf_tables",
];

/// Debian's static busybox, from the package busybox-static.
const BUSYBOX: &str = "/bin/busybox";

/// Files to boot from, and the directory with containerd and runc.
pub struct Image {
    /// The kernel, as a bzImage.
    pub kernel: PathBuf,
    /// The initrd, an uncompressed cpio archive.
    pub initrd: PathBuf,
    /// The root of the unpacked packages.
    pub packages: PathBuf,
}

impl Image {
    /// Finds the image in the cache, or makes it.
    pub fn prepare() -> Result<Self> {
        let packages = packages::unpacked()?;
        let modules = only_child(&packages.join("lib/modules"))?;
        let version = modules.file_name().context("The kernel has no version")?.to_string_lossy().into_owned();
        let kernel = packages.join("boot").join(format!("vmlinuz-{version}"));
        let busybox = fs::read(BUSYBOX).context("Cannot read Debian's busybox (package busybox-static)")?;
        let key =
            Key::new().with(packages.as_os_str().as_encoded_bytes()).with(&busybox).with(INIT).with(MODULES.join(" "));
        let initrd = cache::entry("nested", &format!("initrd-{}", key.hex()), |place| {
            let archive = build(&busybox, &Modules::open(&modules)?)?;
            fs::write(place, archive).context("Cannot write the initrd")
        })?;
        Ok(Self { kernel, initrd, packages })
    }
}

fn build(busybox: &[u8], modules: &Modules) -> Result<Vec<u8>> {
    let mut tree = Tree::default();
    let mut put = |path: &str, node| tree.insert(Path::new(path), node, "nested");
    for dir in ["/dev", "/lower", "/proc", "/root", "/sys", "/upper"] {
        put(dir, Node::Directory)?;
    }
    put("/bin/busybox", Node::File { mode: 0o755, contents: busybox.to_vec() })?;
    put("/init", Node::File { mode: 0o755, contents: INIT.into() })?;
    let mut order = String::new();
    for (name, contents) in modules.closure(MODULES)? {
        put(&format!("/modules/{name}.ko"), Node::File { mode: 0o644, contents })?;
        order.push_str(&name);
        order.push('\n');
    }
    put("/modules/order", Node::File { mode: 0o644, contents: order.into() })?;
    archive::build(&tree, Compression::None)
}

fn only_child(dir: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(dir).with_context(|| format!("Cannot read {}", dir.display()))?;
    let entry = entries.next().with_context(|| format!("Nothing is in {}", dir.display()))??;
    Ok(entry.path())
}
