//! Debian packages: those that are installed on the machine, and those that are only unpacked.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::cache::{self, Key};

/// The project's list, `tests/packages.txt`.
const LIST: &str = include_str!("../packages.txt");

/// A package that only names the newest version's package: what its Depends begins with.
const KERNEL_META: &str = "linux-image-cloud-amd64";

/// The packages of `tests/packages.txt` with the given verb, `install` or `unpack`.
fn listed(verb: &str) -> Vec<&'static str> {
    LIST.lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(first, _)| *first == verb)
        .map(|(_, name)| name.trim())
        .collect()
}

/// Installs what the list says and the machine lacks, after naming it.
pub fn install() -> Result<()> {
    let missing: Vec<&str> = listed("install").into_iter().filter(|name| !installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("setup: installing Debian packages: {}", missing.join(" "));
    let mut apt = Command::new("apt-get");
    apt.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&missing);
    apt.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    if apt.status().context("Cannot run apt-get")?.success() {
        return Ok(());
    }
    // The machine's package lists may be absent or too old for the mirror.
    update()?;
    let status = apt.status().context("Cannot run apt-get")?;
    ensure!(status.success(), "apt-get install of {} failed", missing.join(" "));
    Ok(())
}

/// The directory that holds the list's `unpack` packages, unpacked over each other.
pub fn unpacked() -> Result<PathBuf> {
    unpack(&listed("unpack"))
}

/// Downloads the named packages and unpacks them over each other into one cached directory.
pub fn unpack(names: &[&str]) -> Result<PathBuf> {
    let resolved = match resolve(names) {
        Ok(resolved) => resolved,
        Err(_) => {
            // A fresh machine has no package lists, an old one may have too old ones.
            update()?;
            resolve(names)?
        }
    };
    cache::entry("unpacked", &Key::new().with(&resolved).hex(), |place| {
        let started = Instant::now();
        println!("setup: downloading and unpacking {}", names.join(" "));
        let downloads = place.with_extension("debs");
        fs::create_dir_all(&downloads)?;
        fs::create_dir_all(place)?;
        // A line of what was resolved is NAME_VERSION_ARCHITECTURE.deb SIZE DIGEST.
        let names: Vec<&str> = resolved.lines().filter_map(|line| line.split('_').next()).collect();
        let result = download(&names, &downloads).and_then(|debs| debs.iter().try_for_each(|deb| extract(deb, place)));
        fs::remove_dir_all(&downloads)?;
        println!("setup: unpacked in {:.1} s", started.elapsed().as_secs_f64());
        result
    })
}

/// File names, sizes and digests of the newest versions of packages: what tells one unpacked
/// directory from another. Asking apt takes a second, so the answer is kept for as long as apt's
/// package lists do not change.
fn resolve(names: &[&str]) -> Result<String> {
    let lists = fs::metadata("/var/lib/apt/lists")?;
    let key = Key::new().with(names.join(" ")).with(format!("{}.{}", lists.mtime(), lists.mtime_nsec()));
    let entry = cache::entry("resolved", &key.hex(), |place| {
        let names: Vec<String> = names
            .iter()
            .map(|name| if *name == KERNEL_META { newest_kernel() } else { Ok((*name).to_owned()) })
            .collect::<Result<_>>()?;
        Ok(fs::write(place, uris(&names)?)?)
    })?;
    Ok(fs::read_to_string(entry)?)
}

fn installed(name: &str) -> bool {
    let query = Command::new("dpkg-query").args(["-W", "-f=${Status}", name]).stderr(Stdio::null()).output();
    query.is_ok_and(|output| output.stdout.ends_with(b" installed"))
}

fn update() -> Result<()> {
    println!("setup: apt-get update");
    let status = Command::new("apt-get").args(["update", "-qq"]).stdin(Stdio::null()).status();
    ensure!(status.context("Cannot run apt-get")?.success(), "apt-get update failed");
    Ok(())
}

fn uris(names: &[String]) -> Result<String> {
    let output = Command::new("apt-get").args(["--print-uris", "download"]).args(names).output()?;
    ensure!(output.status.success(), "apt-get knows not all of {}", names.join(" "));
    let text = String::from_utf8(output.stdout)?;
    // 'URI' FILE SIZE DIGEST; the URI is the mirror's business.
    let mut lines: Vec<String> =
        text.lines().map(|line| line.split(' ').skip(1).collect::<Vec<_>>().join(" ")).collect();
    lines.sort();
    ensure!(lines.len() == names.len(), "apt-get found {} of {} packages", lines.len(), names.len());
    Ok(lines.join("\n"))
}

fn newest_kernel() -> Result<String> {
    let output = Command::new("apt-cache").args(["show", "--no-all-versions", KERNEL_META]).output()?;
    ensure!(output.status.success(), "apt-cache does not know {KERNEL_META}");
    let text = String::from_utf8(output.stdout)?;
    let depends = text.lines().find_map(|line| line.strip_prefix("Depends: "));
    let depends = depends.context("The kernel's package names no version")?;
    let name = depends.split([' ', ',']).next().unwrap_or_default();
    Ok(name.to_owned())
}

fn download(names: &[&str], into: &Path) -> Result<Vec<PathBuf>> {
    let mut apt = Command::new("apt-get");
    // apt's own user cannot write into a person's cache directory, and need not.
    apt.args(["-qq", "-o", "APT::Sandbox::User=root", "download"]).args(names).current_dir(into);
    ensure!(apt.status()?.success(), "apt-get download of {} failed", names.join(" "));
    let mut debs: Vec<PathBuf> = fs::read_dir(into)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    debs.sort();
    Ok(debs)
}

/// Unpacks one package file, without running anything of it.
fn extract(deb: &Path, root: &Path) -> Result<()> {
    let status = Command::new("dpkg-deb").arg("-x").arg(deb).arg(root).status().context("Cannot run dpkg-deb")?;
    if !status.success() {
        bail!("Cannot unpack {}", deb.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_names_both_kinds() {
        assert!(listed("install").contains(&"seabios"));
        assert!(listed("unpack").contains(&"containerd"));
        assert!(listed("unpack").contains(&KERNEL_META));
    }
}
