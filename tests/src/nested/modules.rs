//! The kernel modules of an unpacked kernel package, in the order in which they can be inserted.
//!
//! `modules.dep` is made when a kernel is installed, which ours never is; so the dependencies are
//! read from where `depmod` reads them, the `depends=` entry of each module's `.modinfo` section.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The modules of one kernel version.
pub struct Modules {
    dir: PathBuf,
    paths: HashMap<String, PathBuf>,
    builtin: Vec<String>,
}

impl Modules {
    /// Reads the list of modules below `lib/modules/<version>`.
    pub fn open(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))
        };
        let paths = read("modules.order")?.lines().map(|line| (name_of(line), PathBuf::from(line))).collect();
        let builtin = read("modules.builtin")?.lines().map(name_of).collect();
        Ok(Self { dir: dir.to_owned(), paths, builtin })
    }

    /// File contents of the wanted modules and of all that they need, dependencies first.
    pub fn closure(&self, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut ordered = Vec::new();
        for name in wanted {
            self.visit(&name.replace('-', "_"), &mut ordered)?;
        }
        Ok(ordered)
    }

    fn visit(&self, name: &str, ordered: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        let known = ordered.iter().any(|(present, _)| present == name);
        if known || self.builtin.iter().any(|builtin| builtin == name) {
            return Ok(());
        }
        let path = self.paths.get(name).with_context(|| format!("The kernel has no module {name}"))?;
        let path = self.dir.join(path);
        let content = fs::read(&path).with_context(|| format!("Cannot read {}", path.display()))?;
        for needed in depends(&content) {
            self.visit(&needed, ordered)?;
        }
        ordered.push((name.to_owned(), content));
        Ok(())
    }
}

/// A module's name from its path: no folder, no `.ko`, and `_` for `-` as the kernel has it.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// The `.modinfo` section is a run of NUL-terminated `key=value` strings.
fn depends(module: &[u8]) -> Vec<String> {
    let value = module.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(b"depends="));
    let value = String::from_utf8_lossy(value.unwrap_or_default()).into_owned();
    value.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_dependencies() {
        assert_eq!(name_of("kernel/arch/x86/kvm/kvm-amd.ko"), "kvm_amd");
        assert_eq!(depends(b"\x7fELF\0license=GPL\0depends=kvm,ccp-x\0intree=Y\0"), ["kvm", "ccp_x"]);
        assert!(depends(b"\0depends=\0").is_empty());
    }
}
