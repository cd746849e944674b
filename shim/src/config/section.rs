//! One table of the file, read key by key; what is left over is reported.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use super::{ConfigError, Notice};

/// The keys of a table.
#[derive(Clone, Copy)]
pub struct Keys {
    /// Keys that do something.
    pub used: &'static [&'static str],
    /// Keys of kata's files that a machine inside the shim has no use for.
    pub idle: &'static [&'static str],
}

/// `[hypervisor.inlay]` and `[hypervisor.stratovirt]`.
pub const HYPERVISOR: Keys = Keys {
    used: &[
        "kernel",
        "initrd",
        "image",
        "rootfs_type",
        "kernel_params",
        "default_vcpus",
        "default_memory",
        "default_maxmemory",
        "enable_virtio_mem",
        "shared_fs",
        "virtio_fs_cache",
        "factory",
    ],
    idle: &[
        "path",
        "valid_hypervisor_paths",
        "ctlpath",
        "valid_ctlpaths",
        "vm_rootfs_driver",
        "enable_annotations",
        "kernel_verity_params",
        "firmware",
        "machine_type",
        "machine_accelerators",
        "seccompsandbox",
        "cpu_features",
        "overhead_vcpus",
        "default_maxvcpus",
        "default_bridges",
        "reclaim_guest_freed_memory",
        "overhead_memory",
        "memory_slots",
        "memory_offset",
        "block_device_driver",
        "block_device_aio",
        "block_device_cache_set",
        "block_device_cache_direct",
        "block_device_cache_noflush",
        "block_device_queue_size",
        "disable_block_device_use",
        "num_queues",
        "network_queues",
        "enable_iothreads",
        "enable_debug",
        "log_level",
        "disable_nesting_checks",
        "disable_vhost_net",
        "guest_hook_path",
        "virtio_fs_daemon",
        "valid_virtio_fs_daemon_paths",
        "virtio_fs_cache_size",
        "virtio_fs_extra_args",
        "virtio_fs_queue_size",
        "enable_hugepages",
        "disable_seccomp",
        "enable_guest_swap",
        "guest_swap_path",
        "guest_swap_size_percent",
        "guest_swap_create_threshold_secs",
        "enable_mem_prealloc",
        "enable_vhost_user_store",
        "vhost_user_store_path",
        "valid_vhost_user_store_paths",
        "file_mem_backend",
        "valid_file_mem_backends",
        "entropy_source",
        "valid_entropy_sources",
        "msize_9p",
        "hotplug_vfio_on_root_bus",
        "pcie_root_port",
        "rx_rate_limiter_max_rate",
        "tx_rate_limiter_max_rate",
        "disable_image_nvdimm",
        "hotplug_timeout",
        "enable_iommu",
        "enable_iommu_platform",
        "disable_selinux",
        "disable_guest_selinux",
        "use_legacy_serial",
    ],
};

/// `[agent.kata]`.
pub const AGENT: Keys = Keys {
    used: &[
        "dial_timeout",
        "reconnect_timeout_ms",
        "create_container_timeout",
        "enable_debug",
        "debug_console_enabled",
    ],
    idle: &[
        "dial_timeout_ms",
        "container_pipe_size",
        "log_level",
        "enable_tracing",
        "kernel_modules",
        "mem_agent",
        "cdh_api_timeout",
        "launch_process_timeout",
        "policy_file",
        "debug_console_vport",
        "server_port",
        "log_port",
    ],
};

/// `[runtime]`.
pub const RUNTIME: Keys = Keys {
    used: &[
        "enable_debug",
        "log_level",
        "disable_guest_seccomp",
        "disable_seccomp",
        "trace_file",
        "simultaneous_starts",
        "start_queue_deadline_ms",
    ],
    idle: &[
        "name",
        "hypervisor_name",
        "agent_name",
        "keep_abnormal",
        "internetworking_model",
        "enable_tracing",
        "jaeger_endpoint",
        "jaeger_user",
        "jaeger_password",
        "disable_new_netns",
        "sandbox_cgroup_only",
        "emptydir_mode",
        "disable_guest_empty_dir",
        "experimental",
        "enable_pprof",
        "static_sandbox_resource_mgmt",
        "sandbox_bind_mounts",
        "vfio_mode",
        "dan_conf",
        "use_passfd_io",
        "passfd_listener_port",
        "enable_vcpus_pinning",
        "shared_mounts",
        "pod_resource_api_sock",
        "create_container_timeout",
        "guest_selinux_label",
    ],
};

/// `[factory]`, and `[hypervisor.*.factory]` of newer files.
pub const FACTORY: Keys = Keys {
    used: &[
        "enable_template",
        "template_path",
        "wait_for_template",
        "template_memory",
        "chunk_cache_mib",
        "pool_size",
        "vm_cache_number",
    ],
    idle: &["vm_cache_endpoint"],
};

/// Tables that have no section of their own here.
pub const TOP: Keys =
    Keys { used: &["hypervisor", "agent", "runtime", "factory"], idle: &["image", "netmon", "proxy", "shim"] };

/// Names further apart than this are different words, not typing errors.
const MIN_LIKENESS: f64 = 0.75;

/// A table being read.
pub struct Section {
    name: &'static str,
    values: toml::Table,
    keys: Keys,
}

impl Section {
    /// `values` are what the file has under `name`.
    pub fn new(name: &'static str, values: toml::Table, keys: Keys) -> Self {
        Self { name, values, keys }
    }

    /// Takes a text.
    pub fn text(&mut self, key: &'static str) -> Result<Option<String>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(toml::Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(self.full(key), "a text", &other)),
        }
    }

    /// Takes a path into `target`; an empty text is as good as none.
    pub fn path(&mut self, key: &'static str, target: &mut PathBuf) -> Result<(), ConfigError> {
        if let Some(path) = self.text(key)?.filter(|path| !path.is_empty()) {
            *target = path.into();
        }
        Ok(())
    }

    /// Takes a number within `range`. A whole number may be written with a fraction of zero, as kata does for CPUs.
    pub fn integer(
        &mut self,
        key: &'static str,
        range: RangeInclusive<i64>,
        expected: &'static str,
    ) -> Result<Option<i64>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let number = match &value {
            toml::Value::Integer(number) => Some(*number),
            // Rounded up: half a CPU is one.
            toml::Value::Float(number) => format!("{:.0}", number.ceil()).parse().ok(),
            _ => None,
        };
        match number.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(wrong(self.full(key), expected, &value)),
        }
    }

    /// Takes a number; zero is as good as none.
    pub fn positive(&mut self, key: &'static str, expected: &'static str) -> Result<Option<u64>, ConfigError> {
        let number = self.integer(key, 0..=i64::from(u32::MAX), expected)?;
        Ok(number.and_then(|number| u64::try_from(number).ok()).filter(|&number| number > 0))
    }

    /// Takes a boolean into `target`.
    pub fn flag(&mut self, key: &'static str, target: &mut bool) -> Result<(), ConfigError> {
        match self.take(key) {
            None => {}
            Some(toml::Value::Boolean(flag)) => *target = flag,
            Some(other) => return Err(wrong(self.full(key), "true or false", &other)),
        }
        Ok(())
    }

    /// Takes a word that `parse` knows; an empty text is as good as none.
    pub fn choice<T>(
        &mut self,
        key: &'static str,
        expected: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(text) = self.text(key)?.filter(|text| !text.is_empty()) else { return Ok(None) };
        match parse(&text) {
            Some(value) => Ok(Some(value)),
            None => Err(wrong(self.full(key), expected, &toml::Value::String(text))),
        }
    }

    /// What nobody took: known keys without use, and unknown ones.
    pub fn rest(self) -> (Vec<String>, Vec<Notice>) {
        let mut idle = Vec::new();
        let mut unknown = Vec::new();
        for key in self.values.keys() {
            if self.keys.idle.contains(&key.as_str()) {
                idle.push(self.full(key));
            } else {
                unknown.push(Notice::Unknown { key: self.full(key), nearest: self.nearest(key) });
            }
        }
        (idle, unknown)
    }

    fn nearest(&self, key: &str) -> Option<&'static str> {
        let all = self.keys.used.iter().chain(self.keys.idle);
        all.map(|&known| (strsim::jaro_winkler(key, known), known))
            .filter(|(likeness, _)| *likeness >= MIN_LIKENESS)
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .map(|(_, known)| known)
    }

    fn take(&mut self, key: &'static str) -> Option<toml::Value> {
        debug_assert!(self.keys.used.contains(&key), "the key {key} is not among those the table lists");
        self.values.remove(key)
    }

    /// The key with its table, for errors.
    pub fn full(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }
}

/// The error for a value that a key cannot have.
pub fn wrong(key: String, expected: &'static str, found: &toml::Value) -> ConfigError {
    ConfigError::Value { key, expected, found: found.to_string() }
}
