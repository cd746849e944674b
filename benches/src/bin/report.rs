//! Runs every measurement and writes docs/performance.md from what they print.
//!
//! VMM start-up is measured on this machine's own /dev/kvm; containers on this machine where it has
//! hardware virtualization, else in the nested host.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
    let programs = std::env::current_exe()?;
    let program = |name: &str| programs.with_file_name(name);
    let place = if virtualized()? { "on this machine" } else { "in the nested host" };
    let mut page = Page::new(root.join("docs/performance.md"));
    page.add("The machine", &machine()?)?;

    let natively = |name: &str| output(&mut Command::new(program(name)));
    page.add("VMM start-up, native KVM", &natively("startup")?)?;
    page.add("Restored machines, native KVM", &natively("restore")?)?;
    page.add("Memory that comes by mapping or page by page, native KVM", &natively("lazy")?)?;

    eprintln!("What follows takes an hour and a half where the host is emulated");
    let on_a_host = |name: &str, arguments: &[&str]| {
        let mut host = Command::new(root.join("target/debug/nested-host"));
        host.args(["run", "--auto", "--memory", "8G", "--timeout", "3600", "--"]).arg(program(name)).args(arguments);
        output(&mut host)
    };
    page.add(&format!("Containers, {place}"), &on_a_host("containers", &[])?)?;
    page.add(&format!("Where their guests come from, {place}"), &on_a_host("containers", &["backends"])?)?;
    page.add(&format!("Devices of `inlay vm` with a Linux guest, {place}"), &on_a_host("machines", &[])?)?;
    let together = on_a_host("containers", &["together", "--rounds", "1"])?;
    page.add(&format!("Many containers at once, {place}"), &together)?;
    // None of a thousand may fail.
    let again = on_a_host("containers", &["together", "--rounds", "10", "--only", "restored", "100"])?;
    page.add(&format!("A hundred at once, again and again, {place}"), &again)?;
    print!("{}", page.text);
    Ok(())
}

/// The page, which is written again with each section: a later one may fail.
struct Page {
    path: PathBuf,
    text: String,
}

impl Page {
    fn new(path: PathBuf) -> Self {
        let text = "# Performance\n\nWritten by `make bench`; do not edit. Compare figures within one run only: ratios carry over to other \
                    machines, times do not.\nIn a nested host each exit of the guest is emulated by software, which stretches a guest's boot \
                    more than it does a process that runc starts.\n";
        Self { path, text: text.to_owned() }
    }

    fn add(&mut self, title: &str, tables: &str) -> Result<()> {
        eprintln!("Measured: {title}");
        write!(self.text, "\n## {title}\n\n{tables}")?;
        fs::write(&self.path, &self.text).with_context(|| format!("Cannot write {}", self.path.display()))
    }
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
