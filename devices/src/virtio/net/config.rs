//! The network device as its transport sees it.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;

use super::control::Control;
use super::engine::{ControlQueue, Engine, Limiters, Pair};
use super::kernel::KernelEngine;
use super::rx::Receiver;
use super::shared::{Mac, NetControl, Shared, is_station};
use super::tap::Tap;
use super::tx::Transmitter;
use super::{ETHERNET_SIZE, HEADER_SIZE, MAX_OFFLOADED_FRAME};
use crate::Subscriber;
use crate::virtio::kernel_vhost::{KernelVhost, VhostError};
use crate::virtio::queue::{RING_FEATURES, VirtQueue};
use crate::virtio::rate_limiter::{Budget, RateLimiter, RateLimits};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceState, RestoreError, SaveError, VirtioDevice, config_space,
};

/// Most queue pairs of a device. Each takes two notification descriptors; a machine of this kind
/// has no use for more than a few.
pub const MAX_QUEUE_PAIRS: u16 = 16;

/// Least MTU that a guest may be told: what IPv4 asks of every link (virtio 1.2 section 5.1.4.1).
pub const MIN_MTU: u16 = 68;

/// Largest MTU that a guest may be told: what an Ethernet interface of Linux takes.
pub const MAX_MTU: u16 = 65535 - 14;

/// MTU of plain Ethernet, which is expected when nothing is said.
const USUAL_MTU: u16 = 1500;

const QUEUE_SIZE: u16 = 256;

/// Guest features that the host must know of, and the `TUN_F_*` bit that says so. All but the
/// first build on it (section 5.1.3.1).
const OFFLOADS: [(u32, libc::c_uint); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
];

/// What the device offers in any configuration.
const FEATURES: [u32; 15] = [
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO,
];

/// A network interface for the guest.
#[derive(Debug)]
pub struct NetConfig {
    /// The interface's name in the configuration, for messages.
    pub id: String,
    /// The host's end: a queue of one tap interface for each queue pair of the guest.
    pub taps: Vec<Tap>,
    /// The guest's address.
    pub mac: [u8; 6],
    /// What the guest is told to use as MTU; the host's interface has its own.
    pub mtu: Option<u16>,
    /// Drops frames whose source address is not [`mac`](Self::mac), which the driver then cannot
    /// change either.
    pub anti_spoof: bool,
    /// Limits on frames to the guest.
    pub rx_limits: RateLimits,
    /// Limits on frames from the guest.
    pub tx_limits: RateLimits,
    /// Moves the frames in the host's kernel instead of this process: a vhost-net for each pair,
    /// or none.
    pub vhost: Vec<KernelVhost>,
}

impl NetConfig {
    /// An interface without limits, served by this process.
    pub fn new(id: impl Into<String>, taps: Vec<Tap>, mac: [u8; 6]) -> Self {
        let limits = RateLimits::default();
        Self {
            id: id.into(),
            taps,
            mac,
            mtu: None,
            anti_spoof: false,
            rx_limits: limits,
            tx_limits: limits,
            vhost: Vec::new(),
        }
    }
}

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Too few or too many queues.
    #[error("Network interface {id} has {count} queue pairs, not 1 to {MAX_QUEUE_PAIRS}")]
    Pairs {
        /// The interface's name in the configuration.
        id: String,
        /// How many were given.
        count: usize,
    },
    /// Several descriptors of an interface that has one queue.
    #[error("The tap interface of network interface {id} was not made for several queues")]
    SingleQueue {
        /// The interface's name in the configuration.
        id: String,
    },
    /// An MTU that no guest can use.
    #[error("The MTU of network interface {id} is {mtu}, not {MIN_MTU} to {MAX_MTU}")]
    Mtu {
        /// The interface's name in the configuration.
        id: String,
        /// What was asked for.
        mtu: u16,
    },
    /// The address is a group's or nobody's.
    #[error("The address of network interface {id} is not one that a station can have")]
    Mac {
        /// The interface's name in the configuration.
        id: String,
    },
    /// Not one vhost-net for each tap queue.
    #[error("Network interface {id} has {taps} queue pairs but {vhosts} vhost-net descriptors")]
    VhostCount {
        /// The interface's name in the configuration.
        id: String,
        /// How many queue pairs it has.
        taps: usize,
        /// How many descriptors were given.
        vhosts: usize,
    },
    /// What needs to see each frame cannot be had when the kernel moves them.
    #[error("Network interface {id} uses vhost-net, which can neither limit rates nor check source addresses")]
    VhostUnseen {
        /// The interface's name in the configuration.
        id: String,
    },
    /// The vhost-net does not work.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// No event descriptor.
    #[error("Cannot make an event descriptor")]
    EventFd(#[source] io::Error),
}

/// The configuration half of a network device.
pub struct Net {
    id: String,
    taps: Vec<Arc<Tap>>,
    mtu: Option<u16>,
    anti_spoof: bool,
    /// What is left of the limits; a reset does not fill it.
    budgets: [Option<Arc<Mutex<Budget>>>; 2],
    vhost: Vec<Arc<KernelVhost>>,
    shared: Arc<Shared>,
    /// The configured address.
    mac: Mac,
    queue_sizes: Vec<u16>,
    features: u64,
}

impl Net {
    /// Makes the device.
    pub fn new(config: NetConfig) -> Result<Self, NetError> {
        let NetConfig { id, taps, mac, mtu, anti_spoof, rx_limits, tx_limits, vhost } = config;
        let pairs = u16::try_from(taps.len()).ok().filter(|pairs| (1..=MAX_QUEUE_PAIRS).contains(pairs));
        let Some(pairs) = pairs else { return Err(NetError::Pairs { id, count: taps.len() }) };
        if pairs > 1 && !taps.iter().all(Tap::is_multi_queue) {
            return Err(NetError::SingleQueue { id });
        }
        if let Some(mtu) = mtu.filter(|mtu| !(MIN_MTU..=MAX_MTU).contains(mtu)) {
            return Err(NetError::Mtu { id, mtu });
        }
        if !is_station(&mac) {
            return Err(NetError::Mac { id });
        }
        if !vhost.is_empty() {
            if vhost.len() != taps.len() {
                return Err(NetError::VhostCount { id, taps: taps.len(), vhosts: vhost.len() });
            }
            if anti_spoof || !rx_limits.is_unlimited() || !tx_limits.is_unlimited() {
                return Err(NetError::VhostUnseen { id });
            }
        }
        let mut features = FEATURES.into_iter().fold(RING_FEATURES, |features, bit| features | 1 << bit);
        for (bit, offered) in
            [(VIRTIO_NET_F_MQ, pairs > 1), (VIRTIO_NET_F_MTU, mtu.is_some()), (VIRTIO_NET_F_CTRL_MAC_ADDR, !anti_spoof)]
        {
            features |= u64::from(offered) << bit;
        }
        for vhost in &vhost {
            features &= vhost.supported(RING_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF);
        }
        let now = Instant::now();
        let budget =
            |limits: RateLimits| (!limits.is_unlimited()).then(|| Arc::new(Mutex::new(Budget::new(limits, now))));
        Ok(Self {
            id,
            taps: taps.into_iter().map(Arc::new).collect(),
            mtu,
            anti_spoof,
            budgets: [rx_limits, tx_limits].map(budget),
            vhost: vhost.into_iter().map(Arc::new).collect(),
            shared: Arc::new(Shared::new(mac).map_err(NetError::EventFd)?),
            mac,
            // A receive and a transmit queue for each pair, and the control queue (section 5.1.2).
            queue_sizes: vec![QUEUE_SIZE; usize::from(pairs).saturating_mul(2).saturating_add(1)],
            features,
        })
    }

    /// The interface's name in the configuration.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How the device is reached when it is behind its transport.
    pub fn control(&self) -> NetControl {
        NetControl::new(Arc::clone(&self.shared))
    }

    fn max_pairs(&self) -> u16 {
        u16::try_from(self.taps.len()).unwrap_or(MAX_QUEUE_PAIRS)
    }

    /// Largest frame that the host hands over, with its header.
    fn max_frame(&self, offloads: libc::c_uint) -> u32 {
        if offloads != 0 {
            return MAX_OFFLOADED_FRAME;
        }
        let mtu = self.mtu.unwrap_or(USUAL_MTU).max(USUAL_MTU);
        HEADER_SIZE.saturating_add(ETHERNET_SIZE).saturating_add(mtu.into())
    }

    fn limiters(&self) -> io::Result<Limiters> {
        let [rx, tx] = &self.budgets;
        let limiter = |budget: &Option<Arc<Mutex<Budget>>>| budget.clone().map(RateLimiter::new).transpose();
        Ok(Limiters { rx: limiter(rx)?, tx: limiter(tx)? })
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    /// `virtio_net_config` (section 5.1.4) up to `mtu`.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mac = self.shared.mac();
        let space = [
            mac.as_slice(),
            &self.shared.status().to_le_bytes(),
            &self.max_pairs().to_le_bytes(),
            &self.mtu.unwrap_or_default().to_le_bytes(),
        ];
        config_space::read(&space.concat(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        let Activation { memory, queues, acked_features, interrupt } = activation;
        let acked = |feature: u32| acked_features & (1 << feature) != 0;
        let max_pairs = if acked(VIRTIO_NET_F_MQ) { self.max_pairs() } else { 1 };
        let mut queues = queues.into_iter();
        let pairs = take_pairs(&mut queues, max_pairs)?;
        let control = queues.next().flatten().filter(|_| acked(VIRTIO_NET_F_CTRL_VQ)).map(|queue| ControlQueue {
            queue: VirtQueue::new(queue, &memory, acked_features),
            commands: Control::new(acked_features, max_pairs),
        });

        let offloads = offloads(acked_features);
        for tap in &self.taps {
            // Settings are the whole interface's, and are made through a queue that is on.
            tap.set_attached(true).map_err(ActivateError::Setup)?;
            tap.set_offloads(offloads).map_err(ActivateError::Setup)?;
        }
        self.shared.set_interrupt(Some(interrupt.clone()));
        let taps = self.taps.clone();
        if !self.vhost.is_empty() {
            let engine = KernelEngine::new(
                taps,
                &self.vhost,
                pairs,
                control,
                Arc::clone(&self.shared),
                &memory,
                acked_features,
                interrupt,
            );
            return Ok(Box::new(engine?));
        }
        let merge = acked(VIRTIO_NET_F_MRG_RXBUF);
        let max_frame = self.max_frame(offloads);
        let only_source = self.anti_spoof.then(|| self.shared.mac());
        let make = |(tap, [rx, tx]): (&Arc<Tap>, [ActiveQueue; 2])| {
            let queue = |active| VirtQueue::new(active, &memory, acked_features);
            let shared = || Arc::clone(&self.shared);
            Pair::new(
                Receiver::new(queue(rx), Arc::clone(tap), shared(), merge, max_frame),
                Transmitter::new(queue(tx), Arc::clone(tap), shared(), only_source),
                Arc::clone(tap),
            )
        };
        let pairs = self.taps.iter().zip(pairs).map(make).collect();
        let limiters = self.limiters().map_err(ActivateError::Setup)?;
        Ok(Box::new(Engine::new(taps, pairs, control, Arc::clone(&self.shared), limiters, interrupt)))
    }

    fn reset(&mut self) {
        self.shared.set_interrupt(None);
        self.shared.set_pairs(1);
        self.shared.set_mac(self.mac);
    }

    fn writes_are_known(&self) -> bool {
        self.vhost.is_empty()
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let mac = self.shared.mac();
        let state = NetState { mac: (mac != self.mac).then_some(mac), pairs: self.shared.pairs() };
        DeviceState::encode(VIRTIO_ID_NET, &state)
    }

    /// An address that the driver has chosen comes back; else the one configured here counts. The
    /// driver is asked to announce itself: it is behind another port of its switch.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let NetState { mac, pairs } = state.decode(VIRTIO_ID_NET)?;
        let mac = mac.filter(|mac| !self.anti_spoof && is_station(mac));
        self.shared.set_mac(mac.unwrap_or(self.mac));
        self.shared.set_pairs(pairs.clamp(1, self.max_pairs()));
        self.control().announce();
        Ok(())
    }
}

/// What a network device remembers beside its queues.
#[derive(Serialize, Deserialize)]
struct NetState {
    /// The address, when the driver has changed it.
    mac: Option<Mac>,
    /// Queue pairs that the driver uses.
    pairs: u16,
}

/// The receive and transmit queues, which come first. A driver that uses fewer pairs than there
/// are need not enable the others.
fn take_pairs(
    queues: &mut impl Iterator<Item = Option<ActiveQueue>>,
    max_pairs: u16,
) -> Result<Vec<[ActiveQueue; 2]>, ActivateError> {
    let mut pairs = Vec::new();
    for index in 0..usize::from(max_pairs) {
        match (queues.next().flatten(), queues.next().flatten()) {
            (Some(rx), Some(tx)) => pairs.push([rx, tx]),
            (None, _) => return Err(ActivateError::QueueMissing(index.saturating_mul(2))),
            (_, None) => return Err(ActivateError::QueueMissing(index.saturating_mul(2).saturating_add(1))),
        }
    }
    Ok(pairs)
}

fn offloads(acked_features: u64) -> libc::c_uint {
    if acked_features & (1 << VIRTIO_NET_F_GUEST_CSUM) == 0 {
        return 0;
    }
    OFFLOADS
        .into_iter()
        .filter(|(feature, _)| acked_features & (1 << feature) != 0)
        .fold(0, |bits, (_, bit)| bits | bit)
}
