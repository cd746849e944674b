//! Runs every measurement and writes docs/performance.md from what they print.
//!
//! VMM start-up is measured on this machine's own /dev/kvm; containers on this machine where it has
//! hardware virtualization, else in the nested host.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
    let programs = std::env::current_exe()?;
    let program = |name: &str| programs.with_file_name(name);

    eprintln!("Measuring VMM start-up on this machine's /dev/kvm");
    let startup = output(&mut Command::new(program("startup")))?;
    eprintln!("Measuring restored machines there");
    let restored = output(&mut Command::new(program("restore")))?;
    let lazy = output(&mut Command::new(program("lazy")))?;
    let on_a_host = |what: &str, name: &str, arguments: &[&str]| {
        eprintln!("Measuring {what}");
        let mut host = Command::new(root.join("target/debug/nested-host"));
        host.args(["run", "--auto", "--memory", "8G", "--timeout", "3600", "--"]).arg(program(name)).args(arguments);
        output(&mut host)
    };
    eprintln!("What follows takes three quarters of an hour where the host is emulated");
    let containers = on_a_host("containers, one at a time", "containers", &[])?;
    let backends = on_a_host("where their guests come from", "containers", &["backends"])?;
    let together = on_a_host("up to a hundred at once", "containers", &["together", "--rounds", "1"])?;
    let machines = on_a_host("devices", "machines", &[])?;

    let mut page = String::from(
        "# Performance\n\nWritten by `make bench`; do not edit. Compare figures within one run only: ratios carry over to other machines, \
         times do not.\nIn a nested host each exit of the guest is emulated by software, which stretches a guest's boot more than it does a process that runc starts.\n",
    );
    write!(page, "\n## The machine\n\n{}", machine()?)?;
    write!(page, "\n## VMM start-up, native KVM\n\n{startup}")?;
    write!(page, "\n## Restored machines, native KVM\n\n{restored}")?;
    write!(page, "\n## Memory that comes by mapping or page by page, native KVM\n\n{lazy}")?;
    let place = if virtualized()? { "on this machine" } else { "in the nested host" };
    write!(page, "\n## Containers, {place}\n\n{containers}\n{backends}{together}")?;
    write!(page, "\n## Devices of `inlay vm` with a Linux guest, {place}\n\n{machines}")?;
    let path = root.join("docs/performance.md");
    fs::write(&path, &page).with_context(|| format!("Cannot write {}", path.display()))?;
    print!("{page}");
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("Cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?} ended with {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// What a reader needs to place the figures.
fn machine() -> Result<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("?");
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let cores = std::thread::available_parallelism()?;
    let qemu = if virtualized()? {
        "none".to_owned()
    } else {
        let built = output(&mut Command::new("tests/nested/qemu/build"))?;
        let version = output(Command::new(built.trim_end()).arg("--version"))?;
        version.lines().next().unwrap_or("unknown").to_owned()
    };
    Ok(format!(
        "{} cores of {}, Linux {}, hardware virtualization: {}, QEMU: {qemu}.\n",
        cores,
        model.trim_start_matches([' ', '\t', ':']),
        kernel.trim(),
        if virtualized()? { "yes" } else { "no" },
    ))
}

fn virtualized() -> Result<bool> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    Ok(cpuinfo.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}
