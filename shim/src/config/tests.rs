use super::root::ImageType;
use super::*;

fn parse(text: &str) -> (Config, Vec<Notice>) {
    Config::parse(text, Path::new("test.toml")).unwrap()
}

fn refuse(text: &str) -> String {
    Config::parse(text, Path::new("test.toml")).unwrap_err().to_string()
}

#[test]
fn an_empty_file_gives_the_defaults() {
    assert_eq!(parse(""), (Config::default(), Vec::new()));
}

#[test]
fn the_file_that_is_installed_shows_the_defaults() {
    assert_eq!(parse(include_str!("../../../deploy/configuration.toml")), (Config::default(), Vec::new()));
}

#[test]
fn only_the_default_file_may_be_missing() {
    let missing = Path::new("/nonexistent/configuration.toml");
    assert!(matches!(Config::load(Some(missing)), Err(ConfigError::Read { .. })));
}

#[test]
fn a_file_of_our_own_sets_everything() {
    let (config, notices) = parse(
        r#"
        [hypervisor.inlay]
        kernel = "/k"
        initrd = "/i"
        kernel_params = "quiet"
        default_vcpus = 2
        default_memory = 512
        shared_fs = "virtio-fs"
        virtio_fs_cache = "always"
        [agent.kata]
        reconnect_timeout_ms = 4000
        create_container_timeout = 9
        enable_debug = true
        debug_console_enabled = true
        [runtime]
        log_level = "warn"
        disable_guest_seccomp = true
        disable_seccomp = true
        trace_file = "/run/inlay/trace.jsonl"
        simultaneous_starts = 8
        start_queue_deadline_ms = 5000
        [factory]
        enable_template = true
        template_path = "/t"
        wait_for_template = true
        template_memory = "lazy"
        chunk_cache_mib = 0
        "#,
    );
    assert_eq!(notices, Vec::new());
    assert_eq!(config.hypervisor.kernel, Path::new("/k"));
    assert_eq!(config.hypervisor.root, GuestRoot::Initrd("/i".into()));
    assert_eq!(config.hypervisor.kernel_params, "quiet");
    assert_eq!(config.hypervisor.vcpus.get(), 2);
    assert_eq!(config.hypervisor.memory_mib, 512);
    assert_eq!(config.hypervisor.fs_cache, FsCache::Always);
    assert_eq!(config.agent.boot_deadline, Duration::from_secs(4));
    assert_eq!(config.agent.create_deadline, Duration::from_secs(9));
    assert!(config.agent.debug && config.agent.debug_console && config.runtime.disable_guest_seccomp);
    assert_eq!(config.runtime.confinement, vmm::Confinement::Off);
    assert_eq!(config.runtime.log_level, LevelFilter::WARN);
    assert_eq!(config.runtime.trace_file.as_deref(), Some(Path::new("/run/inlay/trace.jsonl")));
    assert_eq!(
        config.factory,
        Factory {
            enabled: true,
            path: Some("/t".into()),
            wait: true,
            memory: TemplateMemory::Lazy,
            pool_size: 0,
            chunk_cache_mib: 0
        }
    );
    assert_eq!(config.runtime.simultaneous_starts, NonZeroU32::new(8));
    assert_eq!(config.runtime.queue_deadline, Duration::from_secs(5));
}

#[test]
fn a_file_made_for_stratovirt_loads_with_one_notice() {
    let (config, notices) = parse(
        r#"
        [hypervisor.stratovirt]
        path = "/usr/bin/stratovirt"
        kernel = "/k"
        initrd = "/i"
        machine_type = "microvm"
        default_vcpus = 1.0
        default_bridges = 1
        block_device_driver = "virtio-mmio"
        virtio_fs_daemon = "/usr/libexec/virtiofsd"
        [factory]
        enable_template = false
        [agent.kata]
        dial_timeout = 45
        [runtime]
        internetworking_model = "tcfilter"
        sandbox_cgroup_only = true
        "#,
    );
    assert_eq!(config.hypervisor.kernel, Path::new("/k"));
    assert_eq!(config.agent.boot_deadline, Duration::from_secs(45));
    let [Notice::WithoutUse(keys)] = notices.as_slice() else { panic!("{notices:?}") };
    assert_eq!(keys.len(), 7, "{keys:?}");
    assert!(keys.contains(&"hypervisor.stratovirt.path".to_owned()));
}

#[test]
fn the_factory_may_be_inside_the_hypervisor() {
    let (config, notices) = parse(
        "[hypervisor.stratovirt.factory]\nenable_template = true\n[factory]\nenable_template = false\ntemplate_path = \"\"\nvm_cache_number = 3\nvm_cache_endpoint = \"\"\n",
    );
    assert_eq!(config.factory, Factory { enabled: true, pool_size: 3, ..Factory::default() });
    assert_eq!(notices, [Notice::WithoutUse(vec!["factory.vm_cache_endpoint".to_owned()])]);
}

#[test]
fn an_unknown_key_is_named_with_its_nearest() {
    let (_, notices) = parse("[hypervisor.inlay]\ndefault_memroy = 1\nxyzzy = 1\n[runtme]\n");
    let texts: Vec<String> = notices.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "The configuration key hypervisor.inlay.default_memroy is not known; did you mean default_memory?",
            "The configuration key hypervisor.inlay.xyzzy is not known",
            "The configuration key runtme is not known; did you mean runtime?",
        ]
    );
}

#[test]
fn a_wrong_value_is_refused_by_name() {
    assert_eq!(
        refuse("[hypervisor.inlay]\ndefault_memory = 63"),
        "The configuration key hypervisor.inlay.default_memory must be 64 to 524288, in MiB, not 63"
    );
    assert_eq!(
        refuse("[hypervisor.inlay]\nkernel = 5"),
        "The configuration key hypervisor.inlay.kernel must be a text, not 5"
    );
    assert!(refuse("[hypervisor.inlay]\nshared_fs = \"9p\"").contains("shared_fs must be \"virtio-fs\""));
    assert!(refuse("runtime = 1").contains("runtime must be a table"));
    assert!(refuse("[hypervisor.qemu]").contains("only [hypervisor.qemu]"));
    assert!(refuse("a = ").contains("is not TOML"));
    assert!(refuse("[factory]\ntemplate_memory = \"cow\"").contains("must be \"mapped\" or \"lazy\", not"));
    assert!(refuse("[agent.kata]\nenable_debug = 1").contains("agent.kata.enable_debug must be true or false"));
}

#[test]
fn a_guest_has_an_initrd_or_an_image() {
    let root = |text: &str| {
        let (config, notices) = parse(&format!("[hypervisor.stratovirt]\n{text}"));
        assert_eq!(notices, Vec::new());
        config.hypervisor.root
    };
    let image = |kind| GuestRoot::Image { path: "/m".into(), kind };
    assert_eq!(root("initrd = \"\"\nimage = \"\""), GuestRoot::default());
    assert_eq!(root("image = \"/m\"\ninitrd = \"\""), image(None));
    assert_eq!(root("image = \"/m\"\nrootfs_type = \"erofs\""), image(Some(ImageType::Erofs)));
    // kata's files have the type in any case.
    assert_eq!(root("initrd = \"/i\"\nrootfs_type = \"xfs\""), GuestRoot::Initrd("/i".into()));
    let both = refuse("[hypervisor.inlay]\ninitrd = \"/i\"\nimage = \"/m\"");
    assert!(both.contains("hypervisor.inlay.image must be empty where initrd is not, as a guest has one"), "{both}");
    assert!(
        refuse("[hypervisor.inlay]\nimage = \"/m\"\nrootfs_type = \"xfs\"")
            .contains("must be \"ext4\" or \"erofs\", not")
    );
}

#[test]
fn more_memory_is_there_where_it_is_asked_for() {
    let more = |text: &str| {
        let (config, notices) = parse(&format!("[hypervisor.stratovirt]\n{text}"));
        assert_eq!(notices, Vec::new());
        config.hypervisor.more_memory_mib
    };
    assert_eq!(more("default_maxmemory = 512"), 0);
    assert_eq!(more("enable_virtio_mem = false\ndefault_maxmemory = 1"), 0);
    assert_eq!(more("enable_virtio_mem = true\ndefault_memory = 64\ndefault_maxmemory = 100"), 36);
    assert_eq!(more("enable_virtio_mem = true\ndefault_memory = 64\ndefault_maxmemory = 64"), 0);
    let all = more("enable_virtio_mem = true\ndefault_memory = 64");
    assert_eq!(more("enable_virtio_mem = true\ndefault_memory = 64\ndefault_maxmemory = 0"), all);
    assert_eq!(more("enable_virtio_mem = true\ndefault_memory = 65\ndefault_maxmemory = 9999999999"), all - 1);
    let less = refuse("[hypervisor.inlay]\nenable_virtio_mem = true\ndefault_maxmemory = 255");
    assert!(less.contains("hypervisor.inlay.default_maxmemory must be at least default_memory, or 0"), "{less}");
    assert!(less.ends_with(", not 255"), "{less}");
    assert!(refuse("[hypervisor.inlay]\ndefault_maxmemory = -1").contains("must be a number of MiB, or 0"));
}

#[test]
fn limits_of_memory_and_cpus_hold() {
    let memory =
        |mib: i64| Config::parse(&format!("[hypervisor.inlay]\ndefault_memory = {mib}"), Path::new("t")).is_ok();
    assert!(!memory(63) && memory(64) && memory(512 << 10) && !memory((512 << 10) + 1));
    let vcpus = |count: i64| {
        let text = format!("[hypervisor.inlay]\ndefault_vcpus = {count}");
        Config::parse(&text, Path::new("t")).map(|(config, _)| config.hypervisor.vcpus.get())
    };
    assert_eq!(vcpus(0).unwrap(), 1);
    assert_eq!(vcpus(255).unwrap(), 255);
    let starts = |count: i64| {
        let text = format!("[runtime]\nsimultaneous_starts = {count}");
        Config::parse(&text, Path::new("t")).map(|(config, _)| config.runtime.simultaneous_starts)
    };
    assert_eq!(starts(0).unwrap(), None);
    assert_eq!(Config::default().runtime.simultaneous_starts.unwrap().get(), (2 * host_cpus().get()).min(512));
    assert_eq!(starts(MAX_SIMULTANEOUS_STARTS).unwrap(), NonZeroU32::new(512));
    assert!(starts(-1).is_err() && starts(MAX_SIMULTANEOUS_STARTS + 1).is_err());
    assert!(vcpus(256).is_err());
    assert_eq!(vcpus(-1).unwrap(), host_cpus().get());
}
