//! OCI images as tar archives of an image layout, the form that `ctr image import` takes.
//!
//! Written by hand from the image specification 1.0: `image-layout.md`, `manifest.md`, `config.md`.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::cache::hex;

/// What a layer's name ends with for a path to vanish from the layers below (`layer.md`, whiteouts).
const WHITEOUT: &str = ".wh.";

/// One layer: a tar archive whose entries are owned by root and bear no time.
pub struct Layer {
    tar: Builder<Vec<u8>>,
}

impl Default for Layer {
    fn default() -> Self {
        Self { tar: Builder::new(Vec::new()) }
    }
}

impl Layer {
    /// Adds a directory.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        self.entry(EntryType::Directory, path, mode, (0, 0), &[])
    }

    /// Adds a directory that belongs to another user than root.
    pub fn owned_directory(&mut self, path: &str, mode: u32, owner: (u64, u64)) -> Result<()> {
        self.entry(EntryType::Directory, path, mode, owner, &[])
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(EntryType::Regular, path, mode, (0, 0), content)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        let mut header = header(EntryType::Symlink, 0o777, (0, 0), 0);
        self.tar.append_link(&mut header, path, target).with_context(|| format!("Cannot add {path}"))
    }

    /// Makes a path of a lower layer vanish.
    pub fn whiteout(&mut self, path: &str) -> Result<()> {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.file(&format!("{dir}/{WHITEOUT}{name}"), 0o644, &[])
    }

    /// Adds what lies below a directory on disk, each path first changed by `place`, or left out.
    pub fn tree(&mut self, root: &Path, place: &dyn Fn(&str) -> Option<String>) -> Result<()> {
        self.subtree(root, root, place)
    }

    fn subtree(&mut self, root: &Path, dir: &Path, place: &dyn Fn(&str) -> Option<String>) -> Result<()> {
        let entries = fs::read_dir(dir).with_context(|| format!("Cannot read {}", dir.display()))?;
        let mut paths = entries.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>()?;
        paths.sort();
        for path in paths {
            let relative = path.strip_prefix(root)?.to_str().context("A path is not UTF-8")?;
            let data = path.symlink_metadata()?;
            let mode = data.permissions().mode() & 0o7777;
            if let Some(relative) = place(relative) {
                if data.is_symlink() {
                    let target = fs::read_link(&path)?;
                    self.symlink(&relative, target.to_str().context("A link is not UTF-8")?)?;
                } else if data.is_dir() {
                    self.directory(&relative, mode)?;
                } else {
                    self.file(&relative, mode, &fs::read(&path)?)?;
                }
            }
            if data.is_dir() {
                self.subtree(root, &path, place)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, kind: EntryType, path: &str, mode: u32, owner: (u64, u64), content: &[u8]) -> Result<()> {
        let mut header = header(kind, mode, owner, content.len() as u64);
        self.tar.append_data(&mut header, path, content).with_context(|| format!("Cannot add {path}"))
    }
}

fn header(kind: EntryType, mode: u32, (uid, gid): (u64, u64), size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(uid);
    header.set_gid(gid);
    header.set_mtime(0);
    header.set_size(size);
    header
}

/// Writes images of the given names and configurations, all of the same layers, to the file `to`.
///
/// A configuration here is the image configuration's own `config` member: command, environment and
/// so on.
pub fn write(to: &Path, layers: Vec<Layer>, images: &[(&str, Value)]) -> Result<()> {
    let mut blobs = Blobs::default();
    let mut described = Vec::new();
    for layer in layers {
        described.push(blobs.add("application/vnd.oci.image.layer.v1.tar", layer.tar.into_inner()?));
    }
    let diff_ids: Vec<&Value> = described.iter().map(|layer| &layer["digest"]).collect();
    let mut manifests = Vec::new();
    for (name, config) in images {
        let image = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let image = blobs.add("application/vnd.oci.image.config.v1+json", serde_json::to_vec(&image)?);
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({ "schemaVersion": 2, "mediaType": kind, "config": image, "layers": described });
        let mut manifest = blobs.add(kind, serde_json::to_vec(&manifest)?);
        // The name under which containerd's importer files the image.
        manifest["annotations"] = json!({ "io.containerd.image.name": name });
        manifests.push(manifest);
    }
    let index = json!({ "schemaVersion": 2, "manifests": manifests });

    let mut layout = Layer::default();
    layout.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    layout.file("index.json", 0o644, &serde_json::to_vec(&index)?)?;
    layout.directory("blobs", 0o755)?;
    layout.directory("blobs/sha256", 0o755)?;
    for (digest, content) in &blobs.0 {
        layout.file(&format!("blobs/sha256/{digest}"), 0o644, content)?;
    }
    fs::write(to, layout.tar.into_inner()?).with_context(|| format!("Cannot write {}", to.display()))
}

/// Contents by digest.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    /// Adds a blob and returns its descriptor.
    fn add(&mut self, media_type: &str, content: Vec<u8>) -> Value {
        let digest = hex(&Sha256::digest(&content));
        let descriptor =
            json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len() });
        self.0.insert(digest, content);
        descriptor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_layers_are_equal_bytes() {
        let build = || {
            let mut layer = Layer::default();
            layer.directory("etc", 0o755).unwrap();
            layer.file("etc/motd", 0o644, b"hello\n").unwrap();
            layer.symlink("etc/m", "motd").unwrap();
            layer.whiteout("etc/gone").unwrap();
            layer.tar.into_inner().unwrap()
        };
        assert_eq!(build(), build());
    }
}
