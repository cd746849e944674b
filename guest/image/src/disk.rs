//! A tree as a file system on a drive: EROFS, which is read and never written.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::tree::{Node, Tree};

/// Of Debian's `erofs-utils`.
const PROGRAM: &str = "mkfs.erofs";
/// The same for every image, so that equal trees give equal bytes; nothing looks for one by it.
const UUID: &str = "00000000-0000-0000-0000-000000000000";
/// What the kernel starts from a drive, where it starts `/init` from an initrd.
const INIT: (&str, &str) = ("/sbin/init", "/init");
/// What the agent writes outside of the file systems that it mounts.
const RESOLV_CONF: (&str, &str) = ("/etc/resolv.conf", "/run/resolv.conf");

/// Adds the links by which the tree of an initrd is one of a drive that nobody writes to.
pub fn adapt(tree: &mut Tree) -> Result<()> {
    for (path, target) in [INIT, RESOLV_CONF] {
        tree.insert(Path::new(path), Node::Link(target.into()), "image")?;
    }
    Ok(())
}

/// Writes the image to `out`. Owners are root and times are zero. Devices are left out: the kernel mounts its own before
/// it starts anything.
pub fn build(tree: &Tree, out: &Path) -> Result<()> {
    let beside = out.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = tempfile::tempdir_in(beside).context("Cannot make a directory for the image's files")?;
    lay_out(tree, dir.path())?;
    let output = Command::new(PROGRAM)
        .args(["--quiet", "--all-root", "-T0", "-x-1", "-U", UUID])
        .args([out, dir.path()])
        .output()
        .with_context(|| format!("Cannot run {PROGRAM} (apt-get install erofs-utils)"))?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{PROGRAM} ended with {}: {}", output.status, told.trim());
    Ok(())
}

fn lay_out(tree: &Tree, root: &Path) -> Result<()> {
    fs::set_permissions(root, Permissions::from_mode(0o755))?;
    for (path, node, _) in tree.iter() {
        let place = root.join(path.strip_prefix("/")?);
        let made = match node {
            Node::Directory => DirBuilder::new().mode(0o755).create(&place),
            Node::Device(..) => Ok(()),
            Node::File { mode, contents } => {
                fs::write(&place, contents).and_then(|()| fs::set_permissions(&place, Permissions::from_mode(*mode)))
            }
            Node::Link(target) => symlink(target, &place),
        };
        made.with_context(|| format!("Cannot lay out {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the magic number of EROFS is, and what it is (linux/magic.h).
    const MAGIC: (usize, u32) = (1024, 0xe0f5_e1e2);

    fn sample() -> Tree {
        let mut tree = Tree::skeleton().unwrap();
        let init = Node::File { mode: 0o755, contents: b"\x7fELF".to_vec() };
        tree.insert(Path::new("/init"), init, "agent").unwrap();
        adapt(&mut tree).unwrap();
        tree
    }

    #[test]
    fn equal_trees_give_equal_images() {
        let dir = tempfile::tempdir().unwrap();
        let build = |name| {
            let out = dir.path().join(name);
            build(&sample(), &out).unwrap();
            fs::read(out).unwrap()
        };
        let image = build("one");
        assert_eq!(image, build("two"));
        assert_eq!(image[MAGIC.0..MAGIC.0 + 4], MAGIC.1.to_le_bytes());
        // What it was laid out in is gone.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_tree_with_an_init_of_its_own_is_refused() {
        let mut tree = Tree::default();
        tree.insert(Path::new("/sbin/init"), Node::Link("/other".into()), "package").unwrap();
        adapt(&mut tree).unwrap_err();
    }
}
