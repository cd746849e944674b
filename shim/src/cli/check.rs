//! `inlay check`: what the host has and lacks.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::bootstrap::with_causes;
use crate::config::{Config, ConfigError};
use crate::run_dir::RunDir;
use crate::template::create::fitting;
use crate::template::{self, Store, Template, TemplateError};

/// Subject of the finding that decides where demonstrations and tests run.
const VIRTUALIZATION: &str = "virtualization";
const KVM: &str = "/dev/kvm";
const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
const SHIM: &str = "containerd-shim-inlay-v2";
/// `KVM_GET_API_VERSION`, `_IO(KVMIO, 0x00)`, and the only answer since Linux 2.6.22 (KVM API documentation, 4.1).
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_API_VERSION: libc::c_int = 12;

/// One line of the report.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    subject: &'static str,
    verdict: Verdict,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It is there.
    Good(String),
    /// It could be better, but sandboxes run.
    Note(String),
    /// Sandboxes do not run: what is missing, and what to do.
    Bad { lack: String, remedy: String },
}

/// Prints the report. Fails when something is missing that sandboxes need.
pub fn run(config: Option<&Path>) -> ExitCode {
    let mut findings =
        vec![virtualization(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()), kvm(Path::new(KVM))];
    findings.extend(configuration(config));
    findings.extend([userfaults(), file_systems(), cgroups(), shim_binary(), containerd()]);
    for finding in &findings {
        println!("{finding}");
    }
    if findings.iter().any(Finding::is_bad) {
        println!("\nSandboxes cannot run on this host as it is.");
        if findings.iter().any(|finding| finding.subject == VIRTUALIZATION && finding.is_bad()) {
            println!(
                "`make demo` and `make test` use a nested host, which QEMU emulates with all that this one lacks."
            );
        }
        return ExitCode::FAILURE;
    }
    println!("\nSandboxes can run on this host, on its own KVM.");
    ExitCode::SUCCESS
}

impl Finding {
    fn is_bad(&self) -> bool {
        matches!(self.verdict, Verdict::Bad { .. })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Verdict::Good(text) => write!(f, "ok    {:<16}{text}", self.subject),
            Verdict::Note(text) => write!(f, "note  {:<16}{text}", self.subject),
            Verdict::Bad { lack, remedy } => write!(f, "FAIL  {:<16}{lack}\n{:>22}{remedy}", self.subject, "-> "),
        }
    }
}

fn good(subject: &'static str, text: impl Into<String>) -> Finding {
    Finding { subject, verdict: Verdict::Good(text.into()) }
}

fn note(subject: &'static str, text: impl Into<String>) -> Finding {
    Finding { subject, verdict: Verdict::Note(text.into()) }
}

fn bad(subject: &'static str, lack: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { subject, verdict: Verdict::Bad { lack: lack.into(), remedy: remedy.into() } }
}

/// Whether the CPU says that it virtualizes. A `/dev/kvm` may be there without: then it runs a guest's kernel by
/// emulation, which an unmodified Linux does not survive.
fn virtualization(cpuinfo: &str) -> Finding {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_ascii_whitespace().any(|word| word == flag);
    let kind = if has("vmx") {
        "Intel VT-x"
    } else if has("svm") {
        "AMD-V"
    } else {
        let remedy = if has("hypervisor") {
            "This is a virtual machine: let its host pass virtualization on (nested=1, CPU model host-passthrough)"
        } else {
            "Switch VT-x or AMD-V on in the firmware's settings"
        };
        return bad(VIRTUALIZATION, "The CPU has neither vmx nor svm", remedy);
    };
    if has("hypervisor") {
        return note(VIRTUALIZATION, format!("{kind}, nested: this is a virtual machine, and starts are slower in it"));
    }
    good(VIRTUALIZATION, kind)
}

fn kvm(device: &Path) -> Finding {
    let name = device.display();
    let file = match OpenOptions::new().read(true).write(true).open(device) {
        Ok(file) => file,
        Err(error) => {
            let remedy = match error.kind() {
                io::ErrorKind::NotFound => "Load the module: modprobe kvm_intel, or modprobe kvm_amd",
                io::ErrorKind::PermissionDenied => {
                    "containerd runs as root and may; to try as a user: usermod -aG kvm <user>"
                }
                _ => "Look at the kernel's log: dmesg | grep -i kvm",
            };
            return bad("kvm", format!("{name} cannot be opened: {error}"), remedy);
        }
    };
    match kvm_api_version(&file) {
        KVM_API_VERSION => good("kvm", format!("{name}, API version {KVM_API_VERSION}")),
        version => bad(
            "kvm",
            format!("{name} has API version {version}, not {KVM_API_VERSION}"),
            "Use a kernel of this century",
        ),
    }
}

fn kvm_api_version(file: &File) -> libc::c_int {
    // SAFETY: the request takes no argument and touches no memory of this process.
    unsafe { libc::ioctl(file.as_raw_fd(), KVM_GET_API_VERSION, 0) }
}

fn configuration(path: Option<&Path>) -> Vec<Finding> {
    let named = path.unwrap_or(Path::new(crate::config::DEFAULT_PATH));
    let (config, notices) = match Config::load(path) {
        Ok(loaded) => loaded,
        Err(error) => {
            let remedy = match error {
                ConfigError::Read { .. } => "Make the file readable for root, or remove it: every key has a default",
                _ => "Correct the file; the documentation lists every key",
            };
            return vec![bad("configuration", with_causes(&error), remedy)];
        }
    };
    let text =
        if named.exists() { named.display().to_string() } else { format!("defaults: there is no {}", named.display()) };
    let mut findings = vec![good("configuration", text)];
    findings.extend(notices.iter().map(|notice| note("configuration", notice.to_string())));
    findings.push(artefact("kernel", &config.hypervisor.kernel));
    findings.push(artefact(config.hypervisor.root.name(), config.hypervisor.root.path()));
    findings.push(templates(&config, path));
    findings.extend(more_memory(&config));
    findings
}

/// What containers can have beyond what a sandbox starts with, where that is anything.
fn more_memory(config: &Config) -> Option<Finding> {
    let (memory, more) = (config.hypervisor.memory_mib, config.hypervisor.more_memory_mib);
    (more > 0)
        .then(|| good("memory", format!("{memory} MiB for a sandbox, up to {more} MiB more by its containers' limits")))
}

/// Whether starts are restored, and from what. No start fails for lack of a template, so nothing here is missing.
fn templates(config: &Config, path: Option<&Path>) -> Finding {
    const SUBJECT: &str = "templates";
    if !config.factory.enabled {
        return good(SUBJECT, "not used: sandboxes boot ([factory] enable_template is false)");
    }
    let (store, name) = (Store::new(config, &RunDir::from_environment()), template::name_for(path));
    match fitting(&store, &name, config) {
        Ok(template) => match reach(&template) {
            Ok(from) => good(SUBJECT, format!("sandboxes are restored from {}{from}", store.path(&name).display())),
            Err(error) => note(
                SUBJECT,
                format!("{}; sandboxes boot, or have its memory from this node's cache", with_causes(&error)),
            ),
        },
        Err(TemplateError::Missing(_)) => note(
            SUBJECT,
            format!("{} is made at the first start, or by `inlay template create {name}`", store.path(&name).display()),
        ),
        Err(error) => note(SUBJECT, format!("{}; the next start has it made anew", with_causes(&error))),
    }
}

/// Where a template's memory comes from, if that is another node, which must answer.
fn reach(template: &Template) -> Result<String, TemplateError> {
    let Some(elsewhere) = &template.record().elsewhere else { return Ok(String::new()) };
    elsewhere.memory(template)?;
    Ok(format!(", its memory from {}", elsewhere.chunks))
}

/// By what a shim may serve the page faults of a guest's memory; templates are mapped without. The system call alone
/// takes a capability that a shim has given up.
fn userfaults() -> Finding {
    const SUBJECT: &str = "userfaultfd";
    let opens = |path: &str| OpenOptions::new().read(true).write(true).open(path).is_ok();
    if opens("/dev/userfaultfd") {
        return good(SUBJECT, "/dev/userfaultfd");
    }
    match fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd") {
        Ok(text) if text.trim() == "1" => good(SUBJECT, "the system call, for everyone"),
        Ok(_) => note(
            SUBJECT,
            "There is no /dev/userfaultfd (Linux 6.1), and vm.unprivileged_userfaultfd is 0: memory of templates is mapped",
        ),
        Err(_) => note(SUBJECT, "The kernel has none: memory of templates is mapped"),
    }
}

fn artefact(subject: &'static str, path: &Path) -> Finding {
    match fs::metadata(path).and_then(|metadata| File::open(path).map(|_| metadata.len())) {
        Ok(bytes) => good(subject, format!("{}, {} KiB", path.display(), bytes >> 10)),
        Err(error) => bad(
            subject,
            format!("{} cannot be read: {error}", path.display()),
            format!(
                "Build it with `make guest`, install it with `make install`, or set `{subject}` in the configuration"
            ),
        ),
    }
}

fn file_systems() -> Finding {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.ends_with("\toverlay")) {
        good("file systems", "overlay")
    } else {
        note("file systems", "The kernel has no overlay yet; modprobe overlay, unless the snapshotter is another one")
    }
}

fn cgroups() -> Finding {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        good("control groups", "version 2")
    } else if fs::read_dir(root).is_ok_and(|mut entries| entries.next().is_some()) {
        good("control groups", "version 1")
    } else {
        bad("control groups", "Nothing is mounted on /sys/fs/cgroup", "mount -t cgroup2 none /sys/fs/cgroup")
    }
}

fn shim_binary() -> Finding {
    match in_path(SHIM) {
        Some(path) => good("shim", path.display().to_string()),
        None => bad(
            "shim",
            format!("{SHIM} is not in PATH"),
            "`make install` puts it into /usr/local/bin, where containerd finds it",
        ),
    }
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|file| file.is_file())
}

fn containerd() -> Finding {
    match UnixStream::connect(CONTAINERD_SOCKET) {
        Ok(_) => good("containerd", format!("answers on {CONTAINERD_SOCKET}")),
        Err(error) => note(
            "containerd",
            format!("{CONTAINERD_SOCKET}: {error}; install and start it (apt-get install containerd)"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualization_is_read_from_the_cpus_flags() {
        let verdict = |flags: &str| virtualization(&format!("processor\t: 0\nflags\t\t: {flags}\n")).verdict;
        assert_eq!(verdict("fpu vmx"), Verdict::Good("Intel VT-x".into()));
        assert_eq!(verdict("fpu svm"), Verdict::Good("AMD-V".into()));
        assert!(matches!(verdict("svm hypervisor"), Verdict::Note(text) if text.contains("nested")));
        assert!(
            matches!(verdict("fpu vmxx hypervisor"), Verdict::Bad { remedy, .. } if remedy.contains("pass virtualization on"))
        );
        assert!(matches!(verdict("fpu"), Verdict::Bad { remedy, .. } if remedy.contains("firmware")));
    }

    #[test]
    fn a_missing_device_has_a_remedy() {
        let Verdict::Bad { lack, remedy } = kvm(Path::new("/nonexistent/kvm")).verdict else { panic!() };
        assert!(lack.contains("/nonexistent/kvm") && remedy.contains("modprobe"));
        let Verdict::Bad { lack, .. } = kvm(Path::new("/dev/null")).verdict else { panic!() };
        assert!(lack.contains("API version -1"));
    }

    #[test]
    fn artefacts_that_are_missing_fail_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        fs::write(&file, "[hypervisor.inlay]\nkernel = \"/nonexistent/k\"\ninitrd = \"/proc/version\"\nkernle = 1\n")
            .unwrap();
        let findings = configuration(Some(&file));
        let [config, unknown, kernel, initrd, templates] = findings.as_slice() else { panic!("{findings:?}") };
        assert!(matches!(&templates.verdict, Verdict::Good(text) if text.starts_with("not used")));
        assert!(matches!(config.verdict, Verdict::Good(_)) && matches!(unknown.verdict, Verdict::Note(_)));
        assert!(matches!(&kernel.verdict, Verdict::Bad { lack, .. } if lack.contains("/nonexistent/k")));
        assert!(matches!(initrd.verdict, Verdict::Good(_)));
        let [broken] = configuration(Some(Path::new("/nonexistent"))).try_into().unwrap();
        assert!(matches!(broken, Finding { subject: "configuration", verdict: Verdict::Bad { .. } }));
    }
}
