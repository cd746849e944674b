//! UpdateInterface and ListInterfaces.

use std::io;
use std::net::IpAddr;

use agent_proto::types::{IPAddress, IPFamily, Interface};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

use super::{Netlink, family, invalid, is_served, link_name, links, mac_text, parse_ip, parse_mac, parse_prefix};

/// IFNAMSIZ with its NUL (linux/if.h).
const MAX_NAME: usize = 15;

/// Gives the interface that has this MAC address its name, MTU and addresses, and brings it up.
pub fn update_interface(wanted: &Interface) -> io::Result<Interface> {
    let mac = parse_mac(&wanted.hwAddr)?;
    if wanted.name.len() > MAX_NAME {
        return Err(invalid(format!("{:?} is too long for an interface's name", wanted.name)));
    }
    let addresses = wanted.IPAddresses.iter().map(parse_address).collect::<io::Result<Vec<_>>>()?;
    let mut netlink = Netlink::open()?;
    let all = links(&mut netlink)?;
    let link = all.iter().find(|link| hardware_address(link) == Some(mac.as_slice()));
    let unknown = || io::Error::new(io::ErrorKind::NotFound, format!("No interface has the address {}", wanted.hwAddr));
    let link = link.ok_or_else(unknown)?;
    let index = link.header.index;

    let renamed = !wanted.name.is_empty() && wanted.name != link_name(link);
    if renamed {
        // The kernel named interfaces in the order in which it found them. One that has this name gives it up; the host
        // will say what its own is.
        if let Some(other) = all.iter().find(|other| link_name(other) == wanted.name) {
            let spare = LinkAttribute::IfName(format!("spare{}", other.header.index));
            set_link(&mut netlink, other.header.index, LinkFlags::empty(), LinkFlags::Up, vec![])?;
            set_link(&mut netlink, other.header.index, LinkFlags::empty(), LinkFlags::empty(), vec![spare])?;
        }
        // The kernel renames only what is down.
        set_link(&mut netlink, index, LinkFlags::empty(), LinkFlags::Up, vec![])?;
    }
    let mut attributes = Vec::new();
    if renamed {
        attributes.push(LinkAttribute::IfName(wanted.name.clone()));
    }
    if wanted.mtu != 0 {
        let mtu = u32::try_from(wanted.mtu).map_err(|_| invalid(format!("{} is not an MTU", wanted.mtu)))?;
        attributes.push(LinkAttribute::Mtu(mtu));
    }
    // Of the raw flags, only "no ARP" is the host's to say.
    let no_arp = LinkFlags::from_bits_retain(wanted.raw_flags) & LinkFlags::Noarp;
    set_link(&mut netlink, index, LinkFlags::Up | no_arp, LinkFlags::Up | no_arp, attributes)?;
    replace_addresses(&mut netlink, index, &addresses)?;
    Ok(wanted.clone())
}

fn set_link(
    netlink: &mut Netlink,
    index: u32,
    flags: LinkFlags,
    change: LinkFlags,
    attributes: Vec<LinkAttribute>,
) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = flags;
    message.header.change_mask = change;
    message.attributes = attributes;
    netlink.change(RouteNetlinkMessage::SetLink(message), 0)
}

fn hardware_address(link: &LinkMessage) -> Option<&[u8]> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => Some(bytes.as_slice()),
        _ => None,
    })
}

fn parse_address(address: &IPAddress) -> io::Result<(IpAddr, u8)> {
    let ip = parse_ip(&address.address)?;
    Ok((ip, parse_prefix(&address.mask, &ip)?))
}

/// What is there and not wanted goes first: two networks on one interface would route to each other.
fn replace_addresses(netlink: &mut Netlink, index: u32, wanted: &[(IpAddr, u8)]) -> io::Result<()> {
    for message in addresses(netlink)? {
        let (Some(address), false) = (local(&message), message.header.index != index) else { continue };
        let link_local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
        if !link_local && !wanted.contains(&(address, message.header.prefix_len)) {
            netlink.change(RouteNetlinkMessage::DelAddress(message), 0)?;
        }
    }
    for (address, prefix) in wanted.iter().filter(|(address, _)| is_served(address)) {
        let mut message = AddressMessage::default();
        message.header.family = family(address);
        message.header.prefix_len = *prefix;
        message.header.index = index;
        message.attributes = vec![AddressAttribute::Local(*address), AddressAttribute::Address(*address)];
        if let IpAddr::V4(v4) = address
            && *prefix < 31
        {
            let host_part = u32::MAX.checked_shr(u32::from(*prefix)).unwrap_or(0);
            message.attributes.push(AddressAttribute::Broadcast((u32::from(*v4) | host_part).into()));
        }
        netlink.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)?;
    }
    Ok(())
}

fn addresses(netlink: &mut Netlink) -> io::Result<Vec<AddressMessage>> {
    let answers = netlink.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let address = |answer| if let RouteNetlinkMessage::NewAddress(address) = answer { Some(address) } else { None };
    Ok(answers.into_iter().filter_map(address).collect())
}

/// IPv4 says the address as IFA_LOCAL, and the peer as IFA_ADDRESS; IPv6 has only the latter.
fn local(message: &AddressMessage) -> Option<IpAddr> {
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    find(|attribute| if let AddressAttribute::Local(address) = attribute { Some(*address) } else { None }).or_else(
        || find(|attribute| if let AddressAttribute::Address(address) = attribute { Some(*address) } else { None }),
    )
}

/// All interfaces with their addresses.
pub fn list_interfaces() -> io::Result<Vec<Interface>> {
    let mut netlink = Netlink::open()?;
    let addresses = addresses(&mut netlink)?;
    Ok(links(&mut netlink)?.iter().map(|link| describe(link, &addresses)).collect())
}

fn describe(link: &LinkMessage, addresses: &[AddressMessage]) -> Interface {
    let own = addresses.iter().filter(|message| message.header.index == link.header.index);
    let address = |message: &AddressMessage| {
        let ip = local(message)?;
        let family = if ip.is_ipv4() { IPFamily::v4 } else { IPFamily::v6 };
        Some(IPAddress {
            family: family.into(),
            address: ip.to_string(),
            mask: message.header.prefix_len.to_string(),
            ..Default::default()
        })
    };
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(u64::from(*mtu)),
        _ => None,
    });
    let name = link_name(link);
    Interface {
        device: name.clone(),
        name,
        IPAddresses: own.filter_map(address).collect(),
        mtu: mtu.unwrap_or(0),
        hwAddr: hardware_address(link).map(mac_text).unwrap_or_default(),
        raw_flags: link.header.flags.bits(),
        ..Default::default()
    }
}
