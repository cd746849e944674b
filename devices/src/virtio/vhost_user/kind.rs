//! What a device is to the guest, and what of it the frontend knows by itself.

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_FS, VIRTIO_ID_NET};
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::virtio::fs::MAX_TAG;

/// Bytes of a disk's configuration space that are asked for (virtio 1.2 section 5.2.4, up to write zeroes).
const BLK_CONFIG_SIZE: usize = 60;

/// Where a disk's configuration space has its number of queues.
const BLK_NUM_QUEUES: std::ops::Range<usize> = 34..36;

/// Where it has limits that mean nothing when they are zero, and the features that say there are any. qemu-storage-daemon
/// offers the first without a limit, and Linux takes the smallest for it.
const BLK_LIMITS: [(u32, std::ops::Range<usize>); 2] = [(VIRTIO_BLK_F_SIZE_MAX, 8..12), (VIRTIO_BLK_F_SEG_MAX, 12..16)];

/// Features of the rings, which the backend alone works on.
const RINGS: u64 = bits(&[VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_F_VERSION_1]);

/// Features that a driver may be offered where the backend has them. Not `VIRTIO_BLK_F_CONFIG_WCE`: nothing writes to
/// a configuration space that is kept here.
const BLK: u64 = RINGS
    | bits(&[
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_GEOMETRY,
        VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
    ]);

/// Not what takes a control queue, which the frontend would have to serve.
const NET: u64 = RINGS
    | bits(&[
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_GUEST_UFO,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_ECN,
        VIRTIO_NET_F_HOST_UFO,
        VIRTIO_NET_F_MRG_RXBUF,
    ]);

const fn bits(numbers: &[u32]) -> u64 {
    let mut bits = 0;
    let mut rest = numbers;
    while let [number, tail @ ..] = rest {
        bits |= 1 << *number;
        rest = tail;
    }
    bits
}

/// What a device is to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VhostUserKind {
    /// A disk, of which the backend tells everything.
    Blk,
    /// A shared directory.
    Fs {
        /// Name by which the guest mounts it, 1 to [`MAX_TAG`] bytes.
        tag: String,
    },
    /// A network interface with one pair of queues.
    Net {
        /// Its hardware address; the guest makes one up where there is none.
        mac: Option<[u8; 6]>,
    },
}

impl VhostUserKind {
    pub(super) fn device_type(&self) -> u32 {
        match self {
            Self::Blk => VIRTIO_ID_BLOCK,
            Self::Fs { .. } => VIRTIO_ID_FS,
            Self::Net { .. } => VIRTIO_ID_NET,
        }
    }

    /// All queues of a device with `requests` request queues; `None` where there is no such device.
    pub(super) fn queues(&self, requests: u16) -> Option<u16> {
        let count = match self {
            Self::Blk => requests,
            // One for requests that must not wait comes first (section 5.11.2).
            Self::Fs { .. } => requests.checked_add(1)?,
            Self::Net { .. } => 2,
        };
        (requests > 0 && count <= super::MAX_QUEUES).then_some(count)
    }

    pub(super) fn tag_is_possible(&self) -> bool {
        match self {
            Self::Fs { tag } => (1..=MAX_TAG).contains(&tag.len()) && !tag.as_bytes().contains(&0),
            Self::Blk | Self::Net { .. } => true,
        }
    }

    /// What the driver is offered of what the backend offers with the configuration space `told`.
    pub(super) fn features(&self, offered: u64, told: &[u8]) -> u64 {
        match self {
            Self::Blk => {
                let unlimited = |place| told.get(place).is_none_or(|limit: &[u8]| limit.iter().all(|byte| *byte == 0));
                let without = BLK_LIMITS.into_iter().filter(|(_, place)| unlimited(place.clone()));
                without.fold(offered & BLK, |features, (bit, _)| features & !bits(&[bit]))
            }
            Self::Fs { .. } => offered & RINGS,
            Self::Net { mac } => {
                let own = if mac.is_some() { bits(&[VIRTIO_NET_F_MAC]) } else { 0 };
                offered & NET | own
            }
        }
    }

    /// What the backend must be told of the driver's choice.
    pub(super) fn backend_features(&self, acked: u64) -> u64 {
        match self {
            Self::Net { .. } => acked & !bits(&[VIRTIO_NET_F_MAC]),
            Self::Blk | Self::Fs { .. } => acked,
        }
    }

    /// Extensions of the protocol that are used where the backend has them.
    pub(super) fn protocol(&self) -> VhostUserProtocolFeatures {
        use VhostUserProtocolFeatures as Protocol;
        let common = Protocol::MQ | Protocol::REPLY_ACK | Protocol::INFLIGHT_SHMFD;
        if self.backend_config_size().is_some() { common | Protocol::CONFIG } else { common }
    }

    /// Length of the configuration space that the backend has to tell, if it has to.
    pub(super) fn backend_config_size(&self) -> Option<usize> {
        match self {
            Self::Blk => Some(BLK_CONFIG_SIZE),
            Self::Fs { .. } | Self::Net { .. } => None,
        }
    }

    /// The configuration space, of what the backend told if it had to.
    pub(super) fn config(&self, mut told: Vec<u8>, requests: u16) -> Vec<u8> {
        match self {
            Self::Blk => {
                // As many as there are here, however many the backend could serve.
                if let Some(queues) = told.get_mut(BLK_NUM_QUEUES) {
                    queues.copy_from_slice(&requests.to_le_bytes());
                }
                told
            }
            Self::Fs { tag } => {
                let mut space = tag.clone().into_bytes();
                space.resize(MAX_TAG, 0);
                space.extend(u32::from(requests).to_le_bytes());
                space
            }
            Self::Net { mac } => mac.unwrap_or_default().to_vec(),
        }
    }
}
