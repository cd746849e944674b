//! Machine monitors as whole programs, started with the same guest: ours, and those that the environment names.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::guest::Images;

/// Memory of each machine, in MiB.
pub const MEMORY_MIB: u64 = 128;

/// A program that runs one machine, and ends with it.
#[derive(Debug, Clone)]
pub struct Monitor {
    /// What the tables call it.
    pub name: &'static str,
    /// The program.
    pub program: PathBuf,
    /// What it is told.
    pub arguments: Vec<OsString>,
}

impl Monitor {
    /// `inlay` by its StratoVirt command line, and the monitors named by `STRATOVIRT`, `FIRECRACKER` and `QEMU`.
    /// `directory` is for what they have to be given as files.
    pub fn all(inlay: &Path, images: &Images, directory: &Path) -> Result<Vec<Self>> {
        let mut monitors = vec![Self::stratovirt("inlay vm, confined", inlay, &["vm"], images, directory)];
        if let Some(program) = named("STRATOVIRT") {
            monitors.push(Self::stratovirt("StratoVirt", &program, &[], images, directory));
        }
        if let Some(program) = named("FIRECRACKER") {
            monitors.push(Self::firecracker(program, images, directory)?);
        }
        if let Some(program) = named("QEMU") {
            monitors.push(Self::qemu(program, images));
        }
        Ok(monitors)
    }

    fn stratovirt(name: &'static str, program: &Path, verb: &[&str], images: &Images, directory: &Path) -> Self {
        let memory = MEMORY_MIB.to_string();
        let qmp = format!("unix:{},server,nowait", directory.join("qmp.sock").display());
        let words = ["-machine", "microvm,dump-guest-core=off", "-smp", "1", "-m", &memory, "-qmp", &qmp, "-kernel"];
        let mut arguments: Vec<OsString> = verb.iter().chain(&words).map(OsString::from).collect();
        // StratoVirt wants a root; any file will do as an initrd, and this guest does not look.
        let flat = images.flat.path();
        arguments.extend([flat.into(), "-initrd".into(), flat.into()]);
        Self { name, program: program.to_owned(), arguments }
    }

    /// Firecracker's configuration file: `docs/getting-started.md` of its sources.
    fn firecracker(program: PathBuf, images: &Images, directory: &Path) -> Result<Self> {
        let configuration = serde_json::json!({
            "boot-source": { "kernel_image_path": images.elf.path(), "boot_args": "" },
            "drives": [],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
        });
        let path = directory.join("firecracker.json");
        fs::write(&path, configuration.to_string()).with_context(|| format!("Cannot write {}", path.display()))?;
        let arguments = vec!["--no-api".into(), "--config-file".into(), path.into()];
        Ok(Self { name: "Firecracker", program, arguments })
    }

    fn qemu(program: PathBuf, images: &Images) -> Self {
        let memory = MEMORY_MIB.to_string();
        let machine = "microvm,x-option-roms=off,pit=off,pic=off,isa-serial=off,rtc=off";
        let words = ["-M", machine, "-accel", "kvm", "-cpu", "host", "-nodefaults", "-no-user-config", "-no-reboot"];
        let more = ["-display", "none", "-smp", "1", "-m", &memory, "-kernel"];
        let mut arguments: Vec<OsString> = words.iter().chain(&more).map(OsString::from).collect();
        arguments.push(images.pvh.path().into());
        Self { name: "QEMU microvm", program, arguments }
    }
}

fn named(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from)
}
