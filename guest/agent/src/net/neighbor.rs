//! AddARPNeighbors.

use std::io;

use agent_proto::types::ARPNeighbor;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState};

use super::{Netlink, family, index_of, invalid, is_served, parse_ip, parse_mac};

/// Enters neighbours into the table. A state of 0 is "permanent": what the host knows does not age in the guest.
pub fn add_neighbors(neighbors: &[ARPNeighbor]) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    for neighbor in neighbors {
        let address = parse_ip(&neighbor.toIPAddress.address)?;
        if !is_served(&address) {
            continue;
        }
        let state = match u16::try_from(neighbor.state).map_err(|_| invalid(format!("State {}", neighbor.state)))? {
            0 => NeighbourState::Permanent,
            state => NeighbourState::from(state),
        };
        let flags = u8::try_from(neighbor.flags).map_err(|_| invalid(format!("Flags {:#x}", neighbor.flags)))?;
        let mut message = NeighbourMessage::default();
        message.header.family = family(&address);
        message.header.ifindex = index_of(&mut netlink, &neighbor.device)?;
        message.header.state = state;
        message.header.flags = NeighbourFlags::from_bits_retain(flags);
        message.attributes.push(NeighbourAttribute::Destination(address.into()));
        if !neighbor.lladdr.is_empty() {
            message.attributes.push(NeighbourAttribute::LinkLayerAddress(parse_mac(&neighbor.lladdr)?));
        }
        netlink.change(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)?;
    }
    Ok(())
}
