//! The arguments of commands, as QMP names them. Unknown ones are refused, as StratoVirt does.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use serde::Deserialize;

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
    /// How the host caches it: a hint.
    #[serde(rename = "cache")]
    _cache: Option<BlockdevCache>,
    /// Whether the guest may only read.
    #[serde(default)]
    pub read_only: bool,
    /// Requests per second.
    pub iops: Option<u64>,
    /// A hint.
    #[serde(rename = "discard")]
    _discard: Option<String>,
    /// A hint.
    #[serde(rename = "detect-zeroes")]
    _detect_zeroes: Option<String>,
}

/// The file of a block device.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockdevFile {
    /// What kind of file it is; each is opened in the same way.
    #[serde(rename = "driver")]
    _driver: BlockdevFileDriver,
    /// Its path.
    pub filename: String,
    /// How requests are carried out: a hint.
    #[serde(rename = "aio")]
    _aio: Option<Aio>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum BlockdevFileDriver {
    File,
    HostDevice,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Aio {
    Off,
    Native,
    IoUring,
    Threads,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct BlockdevCache {
    #[serde(rename = "direct")]
    _direct: Option<bool>,
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
    /// Name of a descriptor that came by `getfd`.
    pub fd: Option<String>,
    /// Names of descriptors that came by `getfd`, with colons between, one for each pair of queues.
    pub fds: Option<String>,
    /// Whether the kernel moves the frames.
    #[serde(default)]
    pub vhost: bool,
    /// Name of a descriptor of `/dev/vhost-net`.
    pub vhostfd: Option<String>,
    /// Names of such descriptors.
    pub vhostfds: Option<String>,
    /// Pairs of queues.
    pub queues: Option<u16>,
    /// A vhost-user backend's character device.
    pub chardev: Option<String>,
}

/// `device_add`, for any driver. What says nothing here is accepted from clients that speak to QEMU too.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceAdd {
    /// The device's identifier.
    pub id: String,
    /// The kind of device.
    pub driver: String,
    /// The slot: a number, decimal or after `0x`.
    pub addr: Option<String>,
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
    /// Queues of a block device. A slot has the queues that it had when the machine started.
    #[serde(rename = "num-queues")]
    pub num_queues: Option<u16>,
    #[serde(rename = "bus")]
    _bus: Option<String>,
    #[serde(rename = "romfile")]
    _romfile: Option<String>,
    #[serde(rename = "share-rw")]
    _share_rw: Option<bool>,
    #[serde(rename = "iothread")]
    _iothread: Option<String>,
    #[serde(rename = "bootindex")]
    _bootindex: Option<u32>,
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

/// `migrate`. There is nothing that `detach` could change: the reply comes when the snapshot is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// `file:` and a directory.
    pub uri: String,
    #[serde(rename = "detach")]
    _detach: Option<bool>,
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
        assert_eq!(arguments.node_name, "drive-1");
        assert_eq!(arguments.file.filename, "/dev/x");
        let text = r#"{"id":"drive-1","driver":"virtio-blk-mmio","drive":"drive-1","addr":"1","romfile":""}"#;
        let arguments: DeviceAdd = serde_json::from_str(text).expect("arguments");
        assert_eq!(arguments.addr.as_deref().and_then(number), Some(1));
    }
}
