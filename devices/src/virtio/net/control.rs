//! The control queue (virtio 1.2 section 5.1.6.5).

use virtio_bindings::virtio_net::*;

use super::shared::{Mac, Shared, is_station};
use crate::GuestMemory;
use crate::virtio::queue::{Chain, QueueError, Segments};

/// Class and command.
const HEADER_LEN: u32 = 2;
const MAC_LEN: u32 = 6;

/// Answers commands. Most of them are about what the guest would rather not see: filtering is a
/// favour of the device (section 5.1.6.5.1), and Linux filters again, so they are checked and
/// accepted, and nothing is kept of them that a guest could make grow.
pub struct Control {
    acked_features: u64,
    /// Most queue pairs that the device has.
    max_pairs: u16,
}

/// A command that was understood.
enum Command {
    /// Accepted, and that is all.
    Accepted,
    Announced,
    Mac(Mac),
    Pairs(u16),
}

impl Control {
    /// Answers for a device with `max_pairs` queue pairs.
    pub fn new(acked_features: u64, max_pairs: u16) -> Self {
        Self { acked_features, max_pairs }
    }

    /// Serves one command and returns how many bytes it wrote to the chain.
    pub fn handle(&self, memory: &GuestMemory, chain: &Chain, shared: &Shared) -> Result<u32, QueueError> {
        let (ack, _) = chain.writable().split_at(1).ok_or_else(|| chain.malformed())?;
        let status = match self.understand(memory, chain.readable())? {
            Some(command) => {
                match command {
                    Command::Accepted => {}
                    Command::Announced => shared.announced(),
                    Command::Mac(mac) => shared.set_mac(mac),
                    Command::Pairs(pairs) => shared.set_pairs(pairs),
                }
                VIRTIO_NET_OK
            }
            None => VIRTIO_NET_ERR,
        };
        ack.write(memory, &[u8::try_from(status).unwrap_or(u8::MAX)])?;
        Ok(1)
    }

    /// `None` is a command that the device does not know, was not offered or makes no sense.
    fn understand(&self, memory: &GuestMemory, command: Segments<'_>) -> Result<Option<Command>, QueueError> {
        let Some((header, data)) = command.split_at(HEADER_LEN) else { return Ok(None) };
        let mut kind = [0; HEADER_LEN as usize];
        header.read(memory, &mut kind)?;
        let [class, command] = kind.map(u32::from);
        Ok(match (class, command) {
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI)
                if self.acked(VIRTIO_NET_F_CTRL_RX) =>
            {
                switch(memory, data)?
            }
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLUNI..=VIRTIO_NET_CTRL_RX_NOBCAST)
                if self.acked(VIRTIO_NET_F_CTRL_RX_EXTRA) =>
            {
                switch(memory, data)?
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) if self.acked(VIRTIO_NET_F_CTRL_RX) => {
                tables(memory, data)?.then_some(Command::Accepted)
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) if self.acked(VIRTIO_NET_F_CTRL_MAC_ADDR) => {
                let mac = exactly::<{ MAC_LEN as usize }>(memory, data)?;
                mac.filter(is_station).map(Command::Mac)
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) if self.acked(VIRTIO_NET_F_GUEST_ANNOUNCE) => {
                data.is_empty().then_some(Command::Announced)
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if self.acked(VIRTIO_NET_F_MQ) => {
                let pairs = exactly(memory, data)?.map(u16::from_le_bytes);
                pairs.filter(|pairs| (1..=self.max_pairs).contains(pairs)).map(Command::Pairs)
            }
            _ => None,
        })
    }

    fn acked(&self, feature: u32) -> bool {
        self.acked_features & (1 << feature) != 0
    }
}

/// A byte that is 0 or 1.
fn switch(memory: &GuestMemory, data: Segments<'_>) -> Result<Option<Command>, QueueError> {
    let value = exactly::<1>(memory, data)?;
    Ok(value.filter(|[value]| *value <= 1).map(|_| Command::Accepted))
}

/// Whether `data` is a table of unicast addresses and one of group addresses, each a count and as
/// many addresses, and nothing more.
fn tables(memory: &GuestMemory, data: Segments<'_>) -> Result<bool, QueueError> {
    let mut rest = data;
    for _ in 0..2 {
        let Some((count, table)) = rest.split_at(4) else { return Ok(false) };
        let Some(count) = exactly(memory, count)?.map(u32::from_le_bytes) else { return Ok(false) };
        let after = count.checked_mul(MAC_LEN).and_then(|len| table.split_at(len));
        let Some((_, after)) = after else { return Ok(false) };
        rest = after;
    }
    Ok(rest.is_empty())
}

/// The bytes of `data` when there are `N`.
fn exactly<const N: usize>(memory: &GuestMemory, data: Segments<'_>) -> Result<Option<[u8; N]>, QueueError> {
    let mut bytes = [0; N];
    if data.len() as usize != N {
        return Ok(None);
    }
    data.read(memory, &mut bytes)?;
    Ok(Some(bytes))
}
