//! Runs every measurement and writes docs/performance.md from what they print.
//!
//! VMM start-up is measured on this machine's own /dev/kvm; containers on this machine where it has
//! hardware virtualization, else in the nested host: that takes three hours.
//!
//! ```text
//! report [WORDS_OF_A_TITLE ...]
//! ```
//!
//! With words it measures the sections whose titles have them, and leaves the others as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
    let programs = std::env::current_exe()?;
    let program = |name: &str| programs.with_file_name(name);
    let place = if virtualized()? { "on this machine" } else { "in the nested host" };
    let mut page = Page::open(root.join("docs/performance.md"), std::env::args().skip(1).collect())?;
    page.measure("The machine", machine)?;

    let natively = |name: &str| output(&mut Command::new(program(name)));
    page.measure("VMM start-up, native KVM", || natively("startup"))?;

    if page.wanted.is_empty() {
        eprintln!("What follows takes three hours where the host is emulated");
    }
    let on_a_host = |name: &str, arguments: &[&str]| {
        let mut host = Command::new(root.join("target/debug/nested-host"));
        host.args(["run", "--auto", "--memory", "8G", "--timeout", "10800", "--"]).arg(program(name)).args(arguments);
        output(&mut host)
    };
    let containers = |arguments: &[&str]| on_a_host("containers", arguments);
    page.measure(&format!("Containers, {place}"), || containers(&["runs"]))?;
    page.measure(&format!("A container that does nothing, {place}"), || containers(&["idle"]))?;
    page.measure(&format!("Devices of `inlay vm` with a Linux guest, {place}"), || on_a_host("machines", &[]))?;
    page.measure("Templates: restored machines, native KVM", || natively("restore"))?;
    page.measure("Templates: memory that comes by mapping or page by page, native KVM", || natively("lazy"))?;
    page.measure(&format!("Templates: where guests come from, {place}"), || containers(&["backends"]))?;
    // None of a thousand may fail, and one round says little: a hundred have taken from 130 to 350 s on the same machine.
    let together = || containers(&["together", "--runc", "3", "--booted", "2", "--restored", "10", "1", "10", "100"]);
    page.measure(&format!("Templates: many at once, {place}"), together)?;
    let more = || containers(&["together", "--runc", "1", "--booted", "0", "--restored", "1", "200"]);
    page.measure(&format!("Templates: two hundred at once, {place}"), more)?;
    ensure!(page.measured > 0, "No section's title has any of {:?}", page.wanted);
    print!("{}", page.text());
    Ok(())
}

/// The page, which is written again with each section: a later one may fail.
struct Page {
    path: PathBuf,
    /// Words of the titles of those sections that are measured; all where there are none.
    wanted: Vec<String>,
    /// Titles and tables.
    sections: Vec<(String, String)>,
    /// How many sections were measured.
    measured: usize,
}

const HEAD: &str = "# Performance

Written by `make bench`; do not edit. Compare figures within one section only: ratios carry over to other machines, times do not.
In a nested host each exit of the guest is emulated by software, which stretches a guest's boot more than it does a process that runc starts.
";
const SECTION: &str = "\n## ";

impl Page {
    /// Keeps the sections of the page that are not wanted.
    fn open(path: PathBuf, wanted: Vec<String>) -> Result<Self> {
        let mut page = Self { path, wanted, sections: Vec::new(), measured: 0 };
        if !page.wanted.is_empty() {
            let text =
                fs::read_to_string(&page.path).with_context(|| format!("Cannot read {}", page.path.display()))?;
            let sections =
                text.split(SECTION).skip(1).map(|section| section.split_once("\n\n").unwrap_or((section, "")));
            page.sections = sections.map(|(title, tables)| (title.to_owned(), tables.to_owned())).collect();
        }
        Ok(page)
    }

    fn measure(&mut self, title: &str, tables: impl FnOnce() -> Result<String>) -> Result<()> {
        if !self.wanted.is_empty() && !self.wanted.iter().any(|words| title.contains(words)) {
            return Ok(());
        }
        eprintln!("Measuring: {title}");
        let tables = tables()?;
        self.measured += 1;
        match self.sections.iter_mut().find(|(other, _)| other == title) {
            Some(section) => section.1 = tables,
            None => self.sections.push((title.to_owned(), tables)),
        }
        fs::write(&self.path, self.text()).with_context(|| format!("Cannot write {}", self.path.display()))
    }

    fn text(&self) -> String {
        let sections = self.sections.iter().map(|(title, tables)| format!("{SECTION}{title}\n\n{tables}"));
        HEAD.to_owned() + &sections.collect::<String>()
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
