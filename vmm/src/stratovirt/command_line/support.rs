//! What of StratoVirt's command line has no effect here, or is refused, and why; and what is more than StratoVirt has.
//!
//! Parsing goes by this table, and the documentation is made from it. What is not in it and is a field of an option's
//! type is compatible.

/// How an option, kind or property fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// As in StratoVirt.
    Compatible,
    /// More than in StratoVirt.
    Extended(&'static str),
    /// Accepted without effect, because of this.
    Ignored(&'static str),
    /// Accepted without effect where it has one of these values, else refused.
    Only {
        /// The values.
        values: &'static [&'static str],
        /// Why no other.
        why: &'static str,
    },
    /// As in StratoVirt, but for this.
    Partly(&'static str),
    /// Refused, because of this.
    Refused(&'static str),
}

/// What stands after an option that has no field of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operand {
    /// Nothing.
    None,
    /// Anything.
    Any,
    /// A list of which all is in [`PROPERTIES`]; its first property may come without its name.
    List(&'static str),
}

const OFF: &[&str] = &["off", "false", "no"];
const NO_PCI: &str = "a microvm has no PCI bus, its devices are on MMIO";
const NO_FIRMWARE: &str = "a microvm has neither firmware nor ACPI";
const ONE_LOOP: &str = "devices share one thread, and those that wait for the host have their own";
const LIBVIRT: &str = "libvirt gives it to every machine";
const ARM: &str = "it belongs to machines for Arm";

/// Options without a field.
pub const OPTIONS: &[(&str, Operand, Support)] = &[
    ("accel", Operand::List("accel"), Support::Compatible),
    ("battery", Operand::None, Support::Ignored(NO_FIRMWARE)),
    ("boot", Operand::Any, Support::Ignored(LIBVIRT)),
    ("cpu", Operand::List("model"), Support::Compatible),
    ("display", Operand::Any, Support::Ignored(LIBVIRT)),
    ("global", Operand::Any, Support::Ignored("a microvm has none of the devices that it is for")),
    ("hardware-signature", Operand::Any, Support::Ignored(NO_FIRMWARE)),
    ("mod-test", Operand::Any, Support::Refused("a microvm is tested with guests, not from outside")),
    ("msg", Operand::Any, Support::Ignored(LIBVIRT)),
    ("no-shutdown", Operand::None, Support::Ignored(LIBVIRT)),
    ("no-user-config", Operand::None, Support::Ignored(LIBVIRT)),
    ("nodefaults", Operand::None, Support::Ignored(LIBVIRT)),
    ("nographic", Operand::None, Support::Ignored(LIBVIRT)),
    ("overcommit", Operand::Any, Support::Ignored(LIBVIRT)),
    ("realtime", Operand::Any, Support::Ignored(LIBVIRT)),
    ("rtc", Operand::Any, Support::Ignored(LIBVIRT)),
    ("sandbox", Operand::Any, Support::Ignored(LIBVIRT)),
    ("smbios", Operand::Any, Support::Ignored(NO_FIRMWARE)),
    ("trace", Operand::Any, Support::Ignored("there is the log: -D FILE with STRATOVIRT_LOG_LEVEL=trace")),
    ("usb", Operand::None, Support::Ignored(LIBVIRT)),
    ("uuid", Operand::Any, Support::Ignored("a microvm has no firmware to tell it to the guest")),
];

/// Options that have a field, and are not as in StratoVirt.
pub const FIELDS: &[(&str, Support)] =
    &[("incoming", Support::Partly("file:DIR only, with a snapshot of this program"))];

/// Kinds of an option that is a list with kinds.
const KINDS: &[(&str, &str, Support)] = &[
    ("numa", "dist", Support::Refused("a microvm has one NUMA node")),
    ("object", "iothread", Support::Partly(ONE_LOOP)),
    ("chardev", "null", Support::Extended("output goes nowhere")),
    ("serial", "null", Support::Extended("output is only kept for reports of errors")),
    ("object", "throttle-group", Support::Refused("limits are given with each -drive")),
    ("object", "tls-creds-x509", Support::Refused("a microvm has no VNC server")),
    ("object", "authz-simple", Support::Refused("a microvm has no VNC server")),
    (
        "device",
        "virtio-fs-device",
        Support::Extended("a directory that this process serves, without a process beside it"),
    ),
    ("device", "virtio-input-device", Support::Refused("a microvm has no display and no input devices")),
    ("device", "virtio-multitouch-device", Support::Refused("a microvm has no display and no input devices")),
    ("device", "virtio-gpu-device", Support::Refused("a microvm has no display and no input devices")),
    ("device", "virtio-blk-pci", Support::Refused(NO_PCI)),
    ("device", "virtio-net-pci", Support::Refused(NO_PCI)),
    ("device", "virtio-serial-pci", Support::Refused(NO_PCI)),
    ("device", "virtio-balloon-pci", Support::Refused(NO_PCI)),
    ("device", "virtio-rng-pci", Support::Refused(NO_PCI)),
    ("device", "virtio-scsi-pci", Support::Refused(NO_PCI)),
    ("device", "vhost-vsock-pci", Support::Refused(NO_PCI)),
    ("device", "vhost-user-fs-pci", Support::Refused(NO_PCI)),
    ("device", "vhost-user-blk-pci", Support::Refused(NO_PCI)),
    ("device", "vfio-pci", Support::Refused(NO_PCI)),
    ("device", "pcie-root-port", Support::Refused(NO_PCI)),
];

/// Properties: option, kind (`*` for all of them, empty where there are none), property.
const PROPERTIES: &[(&str, &str, &str, Support)] = &[
    ("device", "virtio-mem-device", "memaddr", Support::Ignored("the machine places it above its other memory")),
    ("device", "virtio-mem-device", "memdev", Support::Partly("a memory-backend-ram only")),
    ("drive", "", "aio", Support::Partly("native is done by threads, past the page cache")),
    ("drive", "", "discard", Support::Ignored("a guest that may write is always offered discard and write zeroes")),
    ("drive", "", "throttling.bps-total", Support::Extended("bytes of a second")),
    ("netdev", "vhost-user", "queues", Support::Partly("1 only")),
    ("device", "virtio-net-device", "queue-size", Support::Partly("256 only, but for vhost-user")),
    ("device", "virtio-net-device", "mq", Support::Ignored("an interface has as many pairs of queues as its -netdev")),
    ("object", "rng-random", "filename", Support::Partly("/dev/urandom and /dev/random only")),
    (
        "machine",
        "",
        "type",
        Support::Only { values: &["microvm"], why: "every other machine has a PCI bus and firmware" },
    ),
    ("machine", "", "accel", Support::Only { values: &["kvm"], why: "guests run on KVM" }),
    ("machine", "", "usb", Support::Only { values: OFF, why: "a microvm has no USB" }),
    ("accel", "", "accel", Support::Only { values: &["kvm"], why: "guests run on KVM" }),
    ("cpu", "", "model", Support::Only { values: &["host"], why: "guests see the host's processor" }),
    ("cpu", "", "pmu", Support::Only { values: OFF, why: ARM }),
    ("cpu", "", "sve", Support::Only { values: OFF, why: ARM }),
    ("cpu", "", "kvm-steal-time", Support::Ignored("guests always see how long they waited for a processor")),
    ("incoming", "", "mapped", Support::Ignored("memory is always mapped")),
    ("m", "", "maxmem", Support::Ignored("memory grows by virtio-mem, which has its own limit")),
    ("qmp", "", "iothread", Support::Ignored("QMP has a thread of its own")),
    ("mon", "", "id", Support::Ignored("nothing refers to it")),
    ("mon", "", "mode", Support::Only { values: &["control"], why: "there is QMP and no monitor for people" }),
    ("numa", "node", "nodeid", Support::Only { values: &["0"], why: "a microvm has one NUMA node" }),
    ("numa", "node", "cpus", Support::Ignored("all processors are in the one node")),
    ("object", "*", "host-nodes", Support::Ignored("memory comes from where the process may take it: numactl(8)")),
    ("object", "*", "policy", Support::Ignored("memory comes from where the process may take it: numactl(8)")),
    (
        "drive",
        "",
        "format",
        Support::Only { values: &["raw"], why: "the format of an image is never guessed, and this one is raw" },
    ),
    ("drive", "", "if", Support::Only { values: &["none"], why: "a -device names its -drive" }),
    ("drive", "", "media", Support::Only { values: &["disk"], why: "a virtio drive is a disk" }),
    (
        "drive",
        "",
        "detect-zeroes",
        Support::Ignored(
            "zeroes are written as zeroes; a guest that means to free space says so: discard and write zeroes",
        ),
    ),
    ("netdev", "tap", "script", Support::Only { values: &["no"], why: "no program is started for an interface" }),
    ("netdev", "tap", "downscript", Support::Only { values: &["no"], why: "no program is started for an interface" }),
    ("device", "*", "bus", Support::Refused(NO_PCI)),
    ("device", "*", "addr", Support::Refused(NO_PCI)),
    ("device", "*", "multifunction", Support::Refused(NO_PCI)),
    ("device", "*", "iothread", Support::Ignored(ONE_LOOP)),
    ("device", "virtio-net-device", "rx-iothread", Support::Ignored(ONE_LOOP)),
    ("device", "virtio-net-device", "tx-iothread", Support::Ignored(ONE_LOOP)),
    ("device", "virtio-blk-device", "bootindex", Support::Ignored(NO_FIRMWARE)),
    ("device", "vhost-user-blk-device", "bootindex", Support::Ignored(NO_FIRMWARE)),
    ("device", "virtconsole", "nr", Support::Only { values: &["0"], why: "a microvm has one port" }),
    ("device", "virtserialport", "nr", Support::Only { values: &["0"], why: "a microvm has one port" }),
    ("device", "virtio-mem-device", "node", Support::Only { values: &["0"], why: "a microvm has one NUMA node" }),
    (
        "device",
        "virtio-balloon-device",
        "auto-balloon",
        Support::Partly("free pages come back by free-page-reporting, as soon as the guest has them"),
    ),
    ("device", "virtio-balloon-device", "membuf-percent", Support::Ignored("it belongs to auto-balloon")),
    ("device", "virtio-balloon-device", "monitor-interval", Support::Ignored("it belongs to auto-balloon")),
];

/// How a kind fares.
pub fn of_kind(option: &str, kind: &str) -> Support {
    let entry = KINDS.iter().find(|entry| entry.0 == option && entry.1 == kind);
    entry.map_or(Support::Compatible, |entry| entry.2)
}

/// How a property fares.
pub fn of_property(option: &str, kind: Option<&str>, property: &str) -> Support {
    let kind = kind.unwrap_or_default();
    let entry =
        PROPERTIES.iter().find(|entry| entry.0 == option && (entry.1 == kind || entry.1 == "*") && entry.2 == property);
    entry.map_or(Support::Compatible, |entry| entry.3)
}

/// The kinds of `option` that are in the table.
pub fn kinds(option: &str) -> impl Iterator<Item = (&'static str, Support)> {
    KINDS.iter().filter(move |entry| entry.0 == option).map(|entry| (entry.1, entry.2))
}

/// The properties of `option` that are in the table: kind, property.
pub fn properties(option: &str) -> impl Iterator<Item = (&'static str, &'static str, Support)> {
    PROPERTIES.iter().filter(move |entry| entry.0 == option).map(|entry| (entry.1, entry.2, entry.3))
}
