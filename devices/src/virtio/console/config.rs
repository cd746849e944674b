//! The configuration half.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::control::Sayings;
use super::engine::Engine;
use super::host::{Host, PortEnd};
use crate::Subscriber;
use crate::virtio::queue::RING_FEATURES;
use crate::virtio::{ActivateError, Activation, DeviceState, RestoreError, SaveError, VirtioDevice, config_space};

/// Feature bits (section 5.3.3). `SIZE` is not offered: Linux and the specification disagree about
/// the order of columns and rows.
pub const F_MULTIPORT: u64 = 1;
const F_EMERG_WRITE: u64 = 2;

/// Most ports. Each takes two queues, so two event descriptors.
pub const MAX_PORTS: u32 = 16;

/// Linux fills a receive queue with pages.
const QUEUE_SIZE: u16 = 64;

/// Offset of `emerg_wr` in the configuration space (section 5.3.4).
const EMERGENCY_WRITE: u64 = 8;

/// How a console device is made.
#[derive(Debug, Default)]
pub struct ConsoleConfig {
    /// Its ports.
    pub ports: Vec<PortConfig>,
}

/// A port.
#[derive(Debug)]
pub struct PortConfig {
    /// Its number, below [`MAX_PORTS`]. A driver that knows no control messages finds port 0 only.
    pub number: u32,
    /// Whether it is a console (`hvc0`) rather than a port for a program (`vport0p1`).
    pub console: bool,
    /// The name that the guest's `/dev/virtio-ports` has for it.
    pub name: Option<String>,
    /// The host's end.
    pub host: PortEnd,
}

/// Why a console device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The number is too large.
    #[error("Port {0} is not possible: the last one is {last}", last = MAX_PORTS - 1)]
    Number(u32),
    /// Two ports with one number.
    #[error("There is more than one port {0}")]
    Twice(u32),
    /// The host's end cannot be used.
    #[error("The host's end of port {number} cannot be used")]
    Host {
        /// The port.
        number: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What both halves know about a port.
#[derive(Debug)]
pub(super) struct PortInfo {
    pub(super) number: u32,
    pub(super) console: bool,
    pub(super) name: Option<String>,
    pub(super) host: Host,
    /// How far the driver has come. The active half has the valid one while there is one.
    state: Mutex<PortState>,
}

/// What a driver that does not know that its machine was stopped expects of a port.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct PortState {
    /// It knows the port.
    pub(super) ready: bool,
    /// Somebody in the guest takes input.
    pub(super) guest_open: bool,
    /// Bytes that the host has taken of the output that is next in the queue.
    pub(super) taken: u32,
    /// Messages that no buffer was there for.
    pub(super) sayings: Sayings,
}

impl PortInfo {
    pub(super) fn state(&self) -> MutexGuard<'_, PortState> {
        // Replaced as a whole: a panic elsewhere leaves it as good as it was.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The configuration half of a console device.
pub struct Console {
    ports: Vec<Arc<PortInfo>>,
    queue_sizes: Vec<u16>,
}

impl Console {
    /// Makes the device.
    pub fn new(config: ConsoleConfig) -> Result<Self, ConsoleError> {
        let mut ports: Vec<Arc<PortInfo>> = Vec::new();
        for PortConfig { number, console, name, host } in config.ports {
            if number >= MAX_PORTS {
                return Err(ConsoleError::Number(number));
            }
            if ports.iter().any(|port| port.number == number) {
                return Err(ConsoleError::Twice(number));
            }
            let host = Host::new(host).map_err(|source| ConsoleError::Host { number, source })?;
            ports.push(Arc::new(PortInfo { number, console, name, host, state: Mutex::default() }));
        }
        let max_ports = ports.iter().map(|port| port.number).max().map_or(1, |last| last.saturating_add(1));
        // Two for each port and two for control messages.
        let queues = (max_ports as usize).saturating_add(1).saturating_mul(2);
        Ok(Self { ports, queue_sizes: vec![QUEUE_SIZE; queues] })
    }

    /// `cols`, `rows` (not valid), `max_nr_ports`, `emerg_wr` (reads as zero).
    fn config_space(&self) -> Vec<u8> {
        let max_ports = self.queue_sizes.len().div_euclid(2).saturating_sub(1);
        [0, u32::try_from(max_ports).unwrap_or(MAX_PORTS), 0].into_iter().flat_map(u32::to_le_bytes).collect()
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        RING_FEATURES | 1 << F_MULTIPORT | 1 << F_EMERG_WRITE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.config_space(), offset, data);
    }

    /// `emerg_wr` puts a character on the first console without a queue (section 5.3.5.1).
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let port = self.ports.iter().find(|port| port.number == 0 && port.console);
        if let (EMERGENCY_WRITE, Some(port), Some(byte)) = (offset, port, data.first()) {
            port.host.write_byte(*byte);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        Ok(Box::new(Engine::new(activation, &self.ports)?))
    }

    fn reset(&mut self) {
        for port in &self.ports {
            *port.state() = PortState::default();
        }
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let states: Vec<_> = self.ports.iter().map(|port| (port.number, port.state().clone())).collect();
        DeviceState::encode(VIRTIO_ID_CONSOLE, &states)
    }

    /// A port that the snapshot does not know starts as after a reset.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        for (number, state) in state.decode::<Vec<(u32, PortState)>>(VIRTIO_ID_CONSOLE)? {
            if let Some(port) = self.ports.iter().find(|port| port.number == number) {
                *port.state() = state;
            }
        }
        Ok(())
    }
}
