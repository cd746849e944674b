//! The configuration file: TOML with kata's key names.
//!
//! A `configuration-stratovirt.toml` of kata loads as it is. Keys that a machine inlaid in the shim has no use for are
//! accepted with one notice; a key that nobody knows is reported with the known key nearest to it.

mod memory;
pub mod root;
mod section;
#[cfg(test)]
mod tests;

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing_subscriber::filter::LevelFilter;
use vmm::Confinement;

pub use root::GuestRoot;
use section::Section;

/// Where the file is looked for when nothing names one.
pub const DEFAULT_PATH: &str = "/etc/inlay/configuration.toml";

const DEFAULT_KERNEL: &str = "/usr/share/inlay/vmlinux";
const DEFAULT_MEMORY_MIB: u64 = 256;
/// Below this the guest's kernel and agent leave no room for a container.
const MIN_MEMORY_MIB: u64 = 64;
/// Boot is 2 s at the worst seen in a nested host with one machine at a time; many at once take their turns.
const DEFAULT_BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// kata's default for `create_container_timeout`.
const DEFAULT_CREATE_DEADLINE: Duration = Duration::from_secs(60);
/// Most sandboxes that wait to be asked for: each is a process, a KVM machine, and some 8 MiB of memory.
const MAX_POOL: u32 = 64;
/// Twice the memory of a sandbox, of which most is zeros: chunks of several templates find room in it.
const DEFAULT_CHUNK_CACHE_MIB: u64 = 512;
/// A TiB: more than any node has templates for.
const MAX_CHUNK_CACHE_MIB: i64 = 1 << 20;
/// Longer than any client waits that gives up: then containerd ends the start, whose turn is the next one's.
const DEFAULT_QUEUE_DEADLINE: Duration = Duration::from_secs(600);
/// A start keeps a processor busy, and waits now and then: two for each leave none idle, and none of them slow.
const DEFAULT_STARTS_PER_CPU: NonZeroU32 = NonZeroU32::new(2).unwrap();
/// The start that is next watches a descriptor for each that is under way; a process has 1024 where nobody says more.
const MAX_SIMULTANEOUS_STARTS: i64 = 512;

/// Everything the shim takes from outside about how sandboxes are to be run.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The machine of a sandbox: `[hypervisor.inlay]`.
    pub hypervisor: Hypervisor,
    /// The agent in the guest: `[agent.kata]`.
    pub agent: Agent,
    /// The shim itself: `[runtime]`.
    pub runtime: Runtime,
    /// Templates: `[factory]`.
    pub factory: Factory,
}

/// What the machine is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypervisor {
    /// Guest kernel: `kernel`.
    pub kernel: PathBuf,
    /// What the guest's first programs come from, the agent among them.
    pub root: GuestRoot,
    /// What is appended to the kernel's command line: `kernel_params`.
    pub kernel_params: String,
    /// vCPUs of a sandbox: `default_vcpus`.
    pub vcpus: NonZeroU32,
    /// Guest memory in MiB: `default_memory`.
    pub memory_mib: u64,
    /// MiB that containers with a memory limit can add to that: up to `default_maxmemory` where `enable_virtio_mem` is set,
    /// else 0.
    pub more_memory_mib: u64,
    /// How long the guest may keep what it learned from the shared file system: `virtio_fs_cache`.
    pub fs_cache: FsCache,
}

/// Cache policy of the shared file system, with virtiofsd's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FsCache {
    /// Nothing is kept: `never` (also `none`).
    Never,
    /// Attributes and entries live for a second, pages until the file is opened again: `auto` (also `metadata`).
    Auto,
    /// Everything is kept, as only the guest changes it: `always`.
    Always,
}

/// How the agent is dealt with.
#[derive(Debug, Clone, PartialEq)]
pub struct Agent {
    /// Longest time from the first instruction of the guest to the agent's answer: `reconnect_timeout_ms`, or
    /// `dial_timeout` in seconds.
    pub boot_deadline: Duration,
    /// Longest time that the agent may take to make a container: `create_container_timeout`, in seconds.
    pub create_deadline: Duration,
    /// The agent logs what it does in detail: `enable_debug`.
    pub debug: bool,
    /// A shell on vsock port 1026 of the guest: `debug_console_enabled`.
    pub debug_console: bool,
}

/// How the shim behaves.
#[derive(Debug, Clone, PartialEq)]
pub struct Runtime {
    /// Which records go to the log: `enable_debug`, `log_level`.
    pub log_level: LevelFilter,
    /// The OCI seccomp profile is not applied in the guest: `disable_guest_seccomp`.
    pub disable_guest_seccomp: bool,
    /// Whether the shim's process and the machine's threads are confined; off with `disable_seccomp`.
    pub confinement: Confinement,
    /// File to which each start appends its times T0..T6 as one JSON line: `trace_file`.
    pub trace_file: Option<PathBuf>,
    /// How many sandboxes of the node may be starting at a time, `None` for any number: `simultaneous_starts`.
    pub simultaneous_starts: Option<NonZeroU32>,
    /// Longest time that a start waits for its turn: `start_queue_deadline_ms`.
    pub queue_deadline: Duration,
}

/// Sandboxes that are restored from a template instead of being booted.
#[derive(Debug, Clone, PartialEq)]
pub struct Factory {
    /// Whether they are: `enable_template`.
    pub enabled: bool,
    /// The directory of templates, where it is not the usual one: `template_path`.
    pub path: Option<PathBuf>,
    /// A start that finds no template waits for one, instead of booting while it is made: `wait_for_template`.
    pub wait: bool,
    /// Restored sandboxes that wait to be asked for: `pool_size`, or kata's `vm_cache_number`.
    pub pool_size: u32,
    /// How the memory of a template comes into a sandbox: `template_memory`.
    pub memory: TemplateMemory,
    /// Most of the node's room, in MiB, for memory that has come from elsewhere, 0 for none: `chunk_cache_mib`.
    pub chunk_cache_mib: u64,
}

/// How the memory of a template comes into a sandbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TemplateMemory {
    /// As a private mapping of the template's file: `mapped`.
    #[default]
    Mapped,
    /// Page by page, by userfaultfd(2), and what a start needs ahead of the rest: `lazy`.
    Lazy,
}

/// Something in the file that its author should know. It does not stop anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// Keys that are known and have no effect here.
    WithoutUse(Vec<String>),
    /// A key that is not known, and the one that may have been meant.
    Unknown {
        /// The key with its table.
        key: String,
        /// The nearest known key of that table.
        nearest: Option<&'static str>,
    },
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("Cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("The configuration {} is not TOML", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line and reason.
        source: Box<toml::de::Error>,
    },
    /// A value that a key cannot have.
    #[error("The configuration key {key} must be {expected}, not {found}")]
    Value {
        /// The key with its table.
        key: String,
        /// What would do.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// Several hypervisor tables and none of them ours.
    #[error("The configuration has no table [hypervisor.inlay] or [hypervisor.stratovirt], only {found}")]
    Hypervisor {
        /// The tables that are there.
        found: String,
    },
}

impl Default for Config {
    fn default() -> Self {
        Self {
            hypervisor: Hypervisor {
                kernel: DEFAULT_KERNEL.into(),
                root: GuestRoot::default(),
                kernel_params: String::new(),
                vcpus: NonZeroU32::MIN,
                memory_mib: DEFAULT_MEMORY_MIB,
                more_memory_mib: 0,
                fs_cache: FsCache::Auto,
            },
            agent: Agent {
                boot_deadline: DEFAULT_BOOT_DEADLINE,
                create_deadline: DEFAULT_CREATE_DEADLINE,
                debug: false,
                debug_console: false,
            },
            runtime: Runtime {
                log_level: LevelFilter::INFO,
                disable_guest_seccomp: false,
                confinement: Confinement::On,
                trace_file: None,
                simultaneous_starts: Some(default_simultaneous_starts()),
                queue_deadline: DEFAULT_QUEUE_DEADLINE,
            },
            factory: Factory::default(),
        }
    }
}

impl Config {
    /// Reads `path`, or the default file, which alone may be missing: then every default applies.
    pub fn load(path: Option<&Path>) -> Result<(Self, Vec<Notice>), ConfigError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(ConfigError::Read { path: file.into(), source }),
        };
        Self::parse(&text, file)
    }

    /// Parses a file's text; `path` names it in errors.
    pub fn parse(text: &str, path: &Path) -> Result<(Self, Vec<Notice>), ConfigError> {
        let syntax = |source| ConfigError::Syntax { path: path.into(), source: Box::new(source) };
        let mut document: toml::Table = text.parse().map_err(syntax)?;
        let mut config = Self::default();
        let mut notices = Vec::new();
        let mut without_use = Vec::new();
        let mut finish = |section: Section| {
            let (idle, unknown) = section.rest();
            without_use.extend(idle);
            notices.extend(unknown);
        };

        let (mut hypervisor, name) = hypervisor_table(&mut document)?;
        // The older place first: what is said in both counts as the newer says.
        let tables =
            [("factory", table(&mut document, "factory")?), ("hypervisor.factory", table(&mut hypervisor, "factory")?)];
        for (name, values) in tables {
            let mut section = Section::new(name, values, section::FACTORY);
            config.factory.read(&mut section)?;
            finish(section);
        }
        let mut section = Section::new(name, hypervisor, section::HYPERVISOR);
        config.hypervisor.read(&mut section)?;
        finish(section);

        let mut section = Section::new("agent.kata", nested(&mut document, "agent", "kata")?, section::AGENT);
        config.agent.read(&mut section)?;
        finish(section);

        let mut section = Section::new("runtime", table(&mut document, "runtime")?, section::RUNTIME);
        config.runtime.read(&mut section)?;
        finish(section);

        finish(Section::new("", document, section::TOP));
        if !without_use.is_empty() {
            notices.insert(0, Notice::WithoutUse(without_use));
        }
        Ok((config, notices))
    }
}

impl Hypervisor {
    fn read(&mut self, section: &mut Section) -> Result<(), ConfigError> {
        section.path("kernel", &mut self.kernel)?;
        self.root = root::read(section)?;
        if let Some(parameters) = section.text("kernel_params")? {
            self.kernel_params = parameters;
        }
        if let Some(count) = section.integer("default_vcpus", i64::MIN..=255, "a number of vCPUs up to 255")? {
            // kata: 0 is one, a negative number is as many as the host has.
            self.vcpus =
                u32::try_from(count).map_or_else(|_| host_cpus(), |n| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN));
        }
        let memory = section.integer("default_memory", MIN_MEMORY_MIB as i64..=512 << 10, "64 to 524288, in MiB")?;
        if let Some(mib) = memory.and_then(|mib| u64::try_from(mib).ok()) {
            self.memory_mib = mib;
        }
        self.more_memory_mib = memory::more(section, self.memory_mib)?;
        section.choice("shared_fs", "\"virtio-fs\" or \"inline-virtio-fs\"", |text| {
            matches!(text, "virtio-fs" | "inline-virtio-fs").then_some(())
        })?;
        let cache =
            section.choice(
                "virtio_fs_cache",
                "\"never\", \"metadata\", \"auto\" or \"always\"",
                |text| match text {
                    "never" | "none" => Some(FsCache::Never),
                    "auto" | "metadata" => Some(FsCache::Auto),
                    "always" => Some(FsCache::Always),
                    _ => None,
                },
            )?;
        self.fs_cache = cache.unwrap_or(self.fs_cache);
        Ok(())
    }
}

impl Agent {
    fn read(&mut self, section: &mut Section) -> Result<(), ConfigError> {
        if let Some(seconds) = section.positive("dial_timeout", "a number of seconds")? {
            self.boot_deadline = Duration::from_secs(seconds);
        }
        if let Some(milliseconds) = section.positive("reconnect_timeout_ms", "a number of milliseconds")? {
            self.boot_deadline = Duration::from_millis(milliseconds);
        }
        if let Some(seconds) = section.positive("create_container_timeout", "a number of seconds")? {
            self.create_deadline = Duration::from_secs(seconds);
        }
        section.flag("enable_debug", &mut self.debug)?;
        section.flag("debug_console_enabled", &mut self.debug_console)
    }
}

impl Runtime {
    fn read(&mut self, section: &mut Section) -> Result<(), ConfigError> {
        let level = section.choice("log_level", "\"error\", \"warn\", \"info\", \"debug\" or \"trace\"", |text| {
            text.parse::<LevelFilter>().ok()
        })?;
        self.log_level = level.unwrap_or(self.log_level);
        let mut debug = false;
        section.flag("enable_debug", &mut debug)?;
        if debug {
            self.log_level = self.log_level.max(LevelFilter::DEBUG);
        }
        section.flag("disable_guest_seccomp", &mut self.disable_guest_seccomp)?;
        let mut unconfined = self.confinement == Confinement::Off;
        section.flag("disable_seccomp", &mut unconfined)?;
        self.confinement = if unconfined { Confinement::Off } else { Confinement::On };
        if let Some(path) = section.text("trace_file")?.filter(|path| !path.is_empty()) {
            self.trace_file = Some(path.into());
        }
        let starts =
            section.integer("simultaneous_starts", 0..=MAX_SIMULTANEOUS_STARTS, "0, for any number, to 512")?;
        if let Some(starts) = starts {
            self.simultaneous_starts = u32::try_from(starts).ok().and_then(NonZeroU32::new);
        }
        if let Some(milliseconds) = section.positive("start_queue_deadline_ms", "a number of milliseconds")? {
            self.queue_deadline = Duration::from_millis(milliseconds);
        }
        Ok(())
    }
}

impl Factory {
    fn read(&mut self, section: &mut Section) -> Result<(), ConfigError> {
        section.flag("enable_template", &mut self.enabled)?;
        section.flag("wait_for_template", &mut self.wait)?;
        if let Some(path) = section.text("template_path")?.filter(|path| !path.is_empty()) {
            self.path = Some(path.into());
        }
        // kata's name first: what is said with both counts as ours says.
        for key in ["vm_cache_number", "pool_size"] {
            if let Some(size) = section.integer(key, 0..=MAX_POOL.into(), "a number of sandboxes up to 64")? {
                self.pool_size = u32::try_from(size).unwrap_or_default();
            }
        }
        let memory = section.choice("template_memory", "\"mapped\" or \"lazy\"", |text| match text {
            "mapped" => Some(TemplateMemory::Mapped),
            "lazy" => Some(TemplateMemory::Lazy),
            _ => None,
        })?;
        self.memory = memory.unwrap_or(self.memory);
        let cache = section.integer("chunk_cache_mib", 0..=MAX_CHUNK_CACHE_MIB, "0, for none, to 1048576, in MiB")?;
        self.chunk_cache_mib = cache.and_then(|mib| u64::try_from(mib).ok()).unwrap_or(self.chunk_cache_mib);
        Ok(())
    }
}

impl Default for Factory {
    fn default() -> Self {
        Self {
            enabled: false,
            path: None,
            wait: false,
            pool_size: 0,
            memory: TemplateMemory::default(),
            chunk_cache_mib: DEFAULT_CHUNK_CACHE_MIB,
        }
    }
}

fn host_cpus() -> NonZeroU32 {
    std::thread::available_parallelism()
        .ok()
        .and_then(|count| NonZeroU32::try_from(count).ok())
        .unwrap_or(NonZeroU32::MIN)
}

fn default_simultaneous_starts() -> NonZeroU32 {
    let wanted = host_cpus().saturating_mul(DEFAULT_STARTS_PER_CPU);
    let most = u32::try_from(MAX_SIMULTANEOUS_STARTS).ok().and_then(NonZeroU32::new);
    most.map_or(wanted, |most| wanted.min(most))
}

/// The machine's table: ours, or StratoVirt's where a file made for kata is used.
fn hypervisor_table(document: &mut toml::Table) -> Result<(toml::Table, &'static str), ConfigError> {
    let mut tables = table(document, "hypervisor")?;
    for name in ["hypervisor.inlay", "hypervisor.stratovirt"] {
        let key = name.trim_start_matches("hypervisor.");
        if tables.contains_key(key) {
            return Ok((table(&mut tables, key)?, name));
        }
    }
    if tables.is_empty() {
        return Ok((toml::Table::new(), "hypervisor.inlay"));
    }
    let found: Vec<String> = tables.keys().map(|key| format!("[hypervisor.{key}]")).collect();
    Err(ConfigError::Hypervisor { found: found.join(", ") })
}

fn nested(document: &mut toml::Table, outer: &str, inner: &str) -> Result<toml::Table, ConfigError> {
    table(&mut table(document, outer)?, inner)
}

fn table(parent: &mut toml::Table, key: &str) -> Result<toml::Table, ConfigError> {
    match parent.remove(key) {
        None => Ok(toml::Table::new()),
        Some(toml::Value::Table(table)) => Ok(table),
        Some(other) => Err(section::wrong(key.to_owned(), "a table", &other)),
    }
}

impl std::fmt::Display for Notice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::WithoutUse(keys) => {
                write!(
                    f,
                    "These configuration keys have no effect, as the machine runs inside the shim: {}",
                    keys.join(", ")
                )
            }
            Self::Unknown { key, nearest: Some(nearest) } => {
                write!(f, "The configuration key {key} is not known; did you mean {nearest}?")
            }
            Self::Unknown { key, nearest: None } => write!(f, "The configuration key {key} is not known"),
        }
    }
}
