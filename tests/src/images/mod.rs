//! The images that the tests run: made from Debian's packages, kept in the cache.

mod layout;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::cache::{self, Key};
use crate::packages;
use layout::Layer;

/// The name of the image of Debian's static busybox.
pub const BUSYBOX: &str = "inlay.test/busybox:1";

/// The same with a user, a working directory and an environment of its own.
pub const BUSYBOX_AS_APP: &str = "inlay.test/busybox-as-app:1";

/// The same with a user that its `/etc/passwd` does not have.
pub const BUSYBOX_AS_NOBODY: &str = "inlay.test/busybox-as-nobody:1";

/// The name of the image of several layers of Debian's packages.
pub const DEBIAN: &str = "inlay.test/debian:1";

/// A file of a lower layer of [`DEBIAN`] that a higher one removes.
pub const REMOVED: &str = "/etc/removed-by-a-higher-layer";

/// A file of a lower layer of [`DEBIAN`] that a higher one replaces with the text `higher`.
pub const REPLACED: &str = "/etc/replaced-by-a-higher-layer";

/// Changes with the way the images are made, so that the cache does not answer with older ones.
const REVISION: &str = "2";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n";
const GROUP: &str = "root:x:0:\nwheel:x:10:app\napp:x:1000:\n";

/// Packages of the layers of [`DEBIAN`] between its first and its last.
const DEBIAN_LAYERS: &[&[&str]] = &[
    &["libc6", "libgcc-s1"],
    &["dash", "coreutils", "libselinux1", "libpcre2-8-0", "libacl1", "libattr1", "libgmp10"],
    &["libpython3.11-minimal", "python3.11-minimal", "zlib1g", "libexpat1", "libssl3"],
];

/// The archive of [`BUSYBOX`] and its variants: one layer, every applet a link, a user `app`.
pub fn busybox() -> Result<PathBuf> {
    let program = fs::read("/bin/busybox").context("Cannot read Debian's busybox (package busybox-static)")?;
    let key = Key::new().with(REVISION).with(&program).hex();
    cache::entry("images", &format!("busybox-{key}.tar"), |place| {
        let mut layer = Layer::default();
        bare(&mut layer)?;
        layer.directory("bin", 0o755)?;
        layer.file("bin/busybox", 0o755, &program)?;
        for applet in applets()?.lines().filter(|applet| *applet != "busybox") {
            layer.symlink(&format!("bin/{applet}"), "busybox")?;
        }
        let config = |user: &str, dir: &str, greeting: &str| {
            let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
            json!({ "Env": [path, greeting], "Cmd": ["sh"], "WorkingDir": dir, "User": user })
        };
        let images = [
            (BUSYBOX, config("", "/", "GREETING=")),
            (BUSYBOX_AS_APP, config("app", "/home/app", "GREETING=good day")),
            (BUSYBOX_AS_NOBODY, config("nobody-of-that-name", "/", "GREETING=")),
        ];
        layout::write(place, vec![layer], &images)
    })
}

/// The archive of [`DEBIAN`]: five layers, the last one with a whiteout.
pub fn debian() -> Result<PathBuf> {
    let mut roots = Vec::new();
    for names in DEBIAN_LAYERS {
        roots.push(packages::unpack(names)?);
    }
    let mut key = Key::new().with(REVISION);
    for root in &roots {
        key = key.with(root.as_os_str().as_encoded_bytes());
    }
    cache::entry("images", &format!("debian-{}.tar", key.hex()), |place| {
        let mut first = Layer::default();
        bare(&mut first)?;
        for (link, target) in [("bin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64"), ("sbin", "usr/sbin")] {
            first.directory(target, 0o755)?;
            first.symlink(link, target)?;
        }
        first.file(&REMOVED[1..], 0o644, b"lower\n")?;
        first.file(&REPLACED[1..], 0o644, b"lower\n")?;
        first.symlink("usr/bin/sh", "dash")?;
        first.symlink("usr/bin/python3", "python3.11")?;

        let mut last = Layer::default();
        last.whiteout(&REMOVED[1..])?;
        last.file(&REPLACED[1..], 0o644, b"higher\n")?;

        let mut layers = vec![first];
        for root in &roots {
            let mut layer = Layer::default();
            layer.tree(root, &|path| merged(path))?;
            layers.push(layer);
        }
        layers.push(last);
        let config = json!({
            "Env": ["PATH=/usr/sbin:/usr/bin", "PYTHONDONTWRITEBYTECODE=1"],
            "Cmd": ["sh"],
            "WorkingDir": "/",
        });
        layout::write(place, layers, &[(DEBIAN, config)])
    })
}

/// What every image has: the users and the directories that a runtime mounts on.
fn bare(layer: &mut Layer) -> Result<()> {
    for dir in ["dev", "etc", "home", "proc", "sys", "usr"] {
        layer.directory(dir, 0o755)?;
    }
    layer.directory("root", 0o700)?;
    layer.directory("tmp", 0o1777)?;
    layer.owned_directory("home/app", 0o755, (1000, 1000))?;
    layer.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
    layer.file("etc/group", 0o644, GROUP.as_bytes())
}

fn applets() -> Result<String> {
    let output = Command::new("/bin/busybox").arg("--list").output().context("Cannot run busybox")?;
    ensure!(output.status.success(), "busybox does not list its applets");
    Ok(String::from_utf8(output.stdout)?)
}

/// Where a package's file goes on a system with merged /usr; documentation is left out, and so are
/// the character sets, which nothing here uses.
fn merged(path: &str) -> Option<String> {
    let (first, rest) = path.split_once('/').unwrap_or((path, ""));
    let path = match first {
        "bin" | "lib" | "lib64" | "sbin" if rest.is_empty() => return None,
        "bin" | "lib" | "lib64" | "sbin" => format!("usr/{path}"),
        _ => path.to_owned(),
    };
    let unused = ["usr/share/doc", "usr/share/man", "usr/share/lintian", "usr/share/locale"];
    let unused = unused.iter().any(|prefix| path.starts_with(prefix)) || path.contains("/gconv");
    (!unused).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_usr() {
        assert_eq!(merged("bin/dash").as_deref(), Some("usr/bin/dash"));
        assert_eq!(merged("bin"), None);
        assert_eq!(merged("usr/share/doc/libc6/copyright"), None);
        assert_eq!(merged("etc/passwd").as_deref(), Some("etc/passwd"));
    }
}
