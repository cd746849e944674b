//! Debian packages, downloaded once and unpacked beside each other; nothing is installed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// Packages unpacked in the cache, by name.
pub struct Pool {
    roots: BTreeMap<String, PathBuf>,
}

impl Pool {
    /// Makes sure that the candidate version of every package in `names` is unpacked below `cache`.
    pub fn fetch(cache: &Path, names: &[&str], progress: impl Fn(&str)) -> Result<Self> {
        fs::create_dir_all(cache).with_context(|| format!("Cannot create {}", cache.display()))?;
        let mut roots = BTreeMap::new();
        for &name in names {
            progress(name);
            let version = candidate_version(name)?;
            let root = cache.join(format!("{name}_{}", version.replace([':', '/'], "-")));
            if !root.exists() {
                unpack(cache, name, &version, &root)?;
            }
            roots.insert(name.to_owned(), root);
        }
        Ok(Self { roots })
    }

    /// The directory that `package` was unpacked in.
    pub fn root(&self, package: &str) -> Result<&Path> {
        self.roots
            .get(package)
            .map(PathBuf::as_path)
            .with_context(|| format!("Package {package} is not in the manifest"))
    }

    /// Every package's name and directory.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.roots.iter().map(|(name, root)| (name.as_str(), root.as_path()))
    }
}

fn candidate_version(package: &str) -> Result<String> {
    let policy = run(Command::new("apt-cache").args(["policy", package]))?;
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
    match version {
        Some(version) if version != "(none)" => Ok(version.to_owned()),
        _ => bail!("Debian has no package {package}; run `apt-get update` if its lists are old"),
    }
}

/// Downloads into a scratch directory and renames it into place, so that a killed run leaves no half package.
fn unpack(cache: &Path, name: &str, version: &str, root: &Path) -> Result<()> {
    let scratch = cache.join(format!(".{name}.{}", std::process::id()));
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir(&scratch)?;
    run(Command::new("apt-get").args(["-q", "download", &format!("{name}={version}")]).current_dir(&scratch))?;
    let deb = fs::read_dir(&scratch)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|ext| ext == "deb"))
        .with_context(|| format!("apt-get downloaded no file for {name} {version}"))?;
    run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(scratch.join("root")))?;
    // Another builder may have been faster; its copy is as good.
    if fs::rename(scratch.join("root"), root).is_err() {
        ensure!(root.exists(), "Cannot move {name} into {}", root.display());
    }
    fs::remove_dir_all(&scratch)?;
    Ok(())
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("Cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
