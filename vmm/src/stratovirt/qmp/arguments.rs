//! The arguments of commands, as QMP names them. Unknown ones are refused, as StratoVirt does.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::path::PathBuf;

use serde::Deserialize;

use crate::stratovirt::command_line::backend::{Aio, Drive};

/// For commands that take none.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// `getfd`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GetFd {
    /// The name that the descriptor gets.
    pub fdname: String,
}

/// `blockdev-add`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BlockdevAdd {
    /// The identifier that `device_add` names.
    pub node_name: String,
    /// The format: nothing looks at the disk's bytes to find out.
    pub driver: Option<String>,
    /// Where the data is.
    pub file: BlockdevFile,
    /// Whether the host's page cache is left out.
    #[serde(default)]
    pub cache: BlockdevCache,
    /// Whether the guest may only read.
    #[serde(default)]
    pub read_only: bool,
    /// Requests per second.
    #[serde(rename = "throttling.iops-total", alias = "iops")]
    pub iops: Option<u64>,
    /// Bytes per second.
    #[serde(rename = "throttling.bps-total", alias = "bps")]
    pub bps: Option<u64>,
    /// An image behind this one, which a raw one cannot have.
    pub backing: Option<String>,
}

impl BlockdevAdd {
    /// What clients may say that changes nothing: a guest may always discard, zeroes are written as zeroes, and caches of other
    /// formats are not there.
    pub const WITHOUT_EFFECT: &[&str] =
        &["id", "options", "discard", "detect-zeroes", "l2-cache-size", "refcount-cache-size", "auto-read-only"];

    /// As the command line would have said it.
    pub fn into_drive(self) -> Drive {
        let Self { node_name: id, file, cache, read_only: readonly, iops, bps, .. } = self;
        Drive { id, file: file.filename, readonly, direct: cache.direct, aio: file.aio, iops, bps }
    }
}

/// The file of a block device.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockdevFile {
    /// What kind of file it is; each is opened in the same way.
    #[serde(rename = "driver")]
    _driver: BlockdevFileDriver,
    /// Its path.
    pub filename: PathBuf,
    /// How requests are carried out.
    pub aio: Option<Aio>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum BlockdevFileDriver {
    File,
    HostDevice,
}

/// The host's cache of a block device.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockdevCache {
    /// Whether it is left out.
    pub direct: Option<bool>,
    /// That flushes may be left out, which they never are.
    #[serde(rename = "no-flush")]
    _no_flush: Option<bool>,
}

/// `blockdev-del`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BlockdevDel {
    /// The identifier of `blockdev-add`.
    pub node_name: String,
}

/// `netdev_add`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetdevAdd {
    /// The identifier that `device_add` names.
    pub id: String,
    /// `tap`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Name of a tap interface.
    pub ifname: Option<String>,
    /// Name of a descriptor that came by `getfd`, or the number of one that the process inherited.
    pub fd: Option<String>,
    /// Such descriptors with colons between them.
    pub fds: Option<String>,
    /// Name of a descriptor of `/dev/vhost-net`.
    pub vhostfd: Option<String>,
    /// Names of such descriptors.
    pub vhostfds: Option<String>,
    /// Pairs of queues.
    pub queues: Option<u16>,
    /// A vhost-user backend's character device.
    pub chardev: Option<String>,
}

impl NetdevAdd {
    /// What clients may say that changes nothing. StratoVirt's replaceable interfaces are not served by vhost either.
    pub const WITHOUT_EFFECT: &[&str] = &["vhost", "dnssearch", "script", "downscript"];
}

/// `device_add`, for any driver.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceAdd {
    /// The device's identifier.
    pub id: String,
    /// The kind of device.
    pub driver: String,
    /// The slot.
    pub addr: Option<Address>,
    /// The slot is the next one.
    pub lun: Option<usize>,
    /// The node of a block device; `id` where it is left out.
    pub drive: Option<String>,
    /// The backend of a network device; `chardev` or `id` where it is left out.
    pub netdev: Option<String>,
    /// StratoVirt 2.5 reads the backend of a network device from here.
    pub chardev: Option<String>,
    /// What the guest reads as the serial number of a block device.
    pub serial: Option<String>,
    /// The address of a network device.
    pub mac: Option<Mac>,
}

impl DeviceAdd {
    /// What clients may say that changes nothing: they speak to QEMU too, and queues and block size of a slot are those that the
    /// guest's driver has found when it started.
    pub const WITHOUT_EFFECT: &[&str] = &[
        "bus",
        "multifunction",
        "romfile",
        "share-rw",
        "iothread",
        "bootindex",
        "boot_index",
        "disable-modern",
        "disable-legacy",
        "mq",
        "vectors",
        "host",
        "scsi",
        "write-cache",
        "num-queues",
        "queue-size",
        "logical_block_size",
        "physical_block_size",
    ];
}

/// The number of a slot, decimal or after `0x`; as text, or as JSON has numbers.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Address {
    /// A number.
    Number(usize),
    /// As StratoVirt wants it.
    Text(String),
}

/// `device_del`, `chardev-remove`, `netdev_del`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ById {
    /// The identifier.
    pub id: String,
}

/// `balloon`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Bytes of memory that the guest is left with.
    pub value: u64,
}

/// `set-viomem`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetViomem {
    /// Name of the device, of which there is one.
    pub id: Option<String>,
    /// Bytes that the guest is to have of it.
    #[serde(rename = "requested-size", alias = "size", alias = "value")]
    pub requested_size: u64,
}

/// `get-viomem`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GetViomem {
    /// Name of the device, of which there is one.
    pub id: Option<String>,
}

/// `query-mem-gpa`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryMemGpa {
    /// A guest physical address in hexadecimal digits.
    pub gpa: String,
}

/// `query-command-line-options`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryCommandLineOptions {
    /// The one option that is asked for.
    pub option: Option<String>,
}

/// `device-list-properties`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceListProperties {
    /// The kind of device.
    #[serde(default)]
    pub typename: String,
}

/// `migrate`. There is nothing that `detach` could change: the reply comes when the snapshot is written, or begun where it is one in the
/// background.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// `file:` and a directory.
    pub uri: String,
    #[serde(rename = "detach")]
    _detach: Option<bool>,
}

/// `migrate-set-capabilities`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateSetCapabilities {
    /// Those that change.
    pub capabilities: Vec<MigrationCapability>,
}

/// A way to migrate, and whether it is wanted.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationCapability {
    /// QEMU's name for it.
    pub capability: String,
    /// Whether it is.
    pub state: bool,
}

/// An Ethernet address as QEMU writes it, `52:54:00:12:34:56`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Some address that no hardware has, of QEMU's range.
    pub fn random() -> Self {
        let [a, b, c, ..] = RandomState::new().build_hasher().finish().to_le_bytes();
        Self([0x52, 0x54, 0, a, b, c])
    }
}

impl TryFrom<String> for Mac {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        const REFUSED: &str = "a MAC address is six pairs of hexadecimal digits with colons between them";
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair =
                pairs.next().filter(|pair| pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit()));
            *byte = pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).ok_or(REFUSED)?;
        }
        if pairs.next().is_some() { Err(REFUSED) } else { Ok(Self(bytes)) }
    }
}

/// A number as slots and addresses are written: decimal, or hexadecimal after `0x`.
pub fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) if digits.bytes().all(|digit| digit.is_ascii_hexdigit()) => u64::from_str_radix(digits, 16).ok(),
        Some(_) => None,
        None if text.bytes().all(|digit| digit.is_ascii_digit()) => text.parse().ok(),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        for (text, expected) in [
            ("0", Some(0)),
            ("0x1", Some(1)),
            ("0X1f", Some(31)),
            ("17", Some(17)),
            ("", None),
            ("0x", None),
            ("+1", None),
            ("0x+1", None),
            ("1f", None),
            ("18446744073709551616", None),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
    }

    #[test]
    fn mac_addresses_have_six_bytes() {
        let read = |text: &str| Mac::try_from(text.to_owned());
        assert_eq!(read("52:54:00:aB:0c:ff"), Ok(Mac([0x52, 0x54, 0, 0xab, 0xc, 0xff])));
        for text in
            ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:0:12:34:56", "52:54:00:12:34:+6", "525400123456"]
        {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn katas_block_device_is_understood() {
        let text = r#"{"driver":"raw","read-only":false,"file":{"driver":"host_device","filename":"/dev/x","aio":"native"},
            "node-name":"drive-1"}"#;
        let arguments: BlockdevAdd = serde_json::from_str(text).expect("arguments");
        let drive = arguments.into_drive();
        assert_eq!((drive.id.as_str(), drive.file.to_str()), ("drive-1", Some("/dev/x")));
        assert_eq!((drive.direct, drive.aio, drive.readonly), (None, Some(Aio::Native), false));
    }
}
