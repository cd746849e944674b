//! The guest's network: links, addresses, routes and neighbours, set from the host by RPC.
//!
//! All of it blocks for the time of a few system calls.

mod interface;
mod neighbor;
mod netlink;
mod route;

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

pub use interface::{list_interfaces, update_interface};
pub use neighbor::add_neighbors;
use netlink::Netlink;
pub use route::{list_routes, update_routes};

/// The loopback interface is the first of every network namespace.
const LOOPBACK_INDEX: u32 = 1;

/// Brings up `lo`; the kernel gives it its addresses.
pub fn bring_up_loopback() -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = LOOPBACK_INDEX;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    Netlink::open()?.change(RouteNetlinkMessage::SetLink(message), 0)
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

fn parse_ip(text: &str) -> io::Result<IpAddr> {
    text.parse().map_err(|_| invalid(format!("{text:?} is not an IP address")))
}

/// Six bytes in hexadecimal, with colons.
fn parse_mac(text: &str) -> io::Result<Vec<u8>> {
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2)).collect();
    bytes.filter(|bytes| bytes.len() == 6).ok_or_else(|| invalid(format!("{text:?} is not a MAC address")))
}

fn mac_text(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

fn family(address: &IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// The slim kernel has no IPv6; a dual-stack pod gets its IPv4 half there, and the log says so.
fn is_served(address: &IpAddr) -> bool {
    let served = address.is_ipv4() || Path::new("/proc/sys/net/ipv6").exists();
    if !served {
        tracing::warn!(%address, "The guest's kernel has no IPv6; this address is left out");
    }
    served
}

/// A prefix length as text, for this kind of address.
fn parse_prefix(text: &str, address: &IpAddr) -> io::Result<u8> {
    let longest = if address.is_ipv4() { 32 } else { 128 };
    text.parse()
        .ok()
        .filter(|&length| length <= longest)
        .ok_or_else(|| invalid(format!("{text:?} is not a prefix length")))
}

fn links(netlink: &mut Netlink) -> io::Result<Vec<LinkMessage>> {
    let answers = netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let link = |answer| if let RouteNetlinkMessage::NewLink(link) = answer { Some(link) } else { None };
    Ok(answers.into_iter().filter_map(link).collect())
}

fn link_name(link: &LinkMessage) -> String {
    let name =
        |attribute: &LinkAttribute| if let LinkAttribute::IfName(name) = attribute { Some(name.clone()) } else { None };
    link.attributes.iter().find_map(name).unwrap_or_default()
}

/// Names of all interfaces by index.
fn names(netlink: &mut Netlink) -> io::Result<HashMap<u32, String>> {
    Ok(links(netlink)?.iter().map(|link| (link.header.index, link_name(link))).collect())
}

/// The index of the interface of this name.
fn index_of(netlink: &mut Netlink, name: &str) -> io::Result<u32> {
    let names = names(netlink)?;
    let found = names.into_iter().find(|(_, candidate)| candidate == name).map(|(index, _)| index);
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("There is no interface {name:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed_strictly() {
        assert_eq!(parse_mac("02:00:00:00:ff:0a").expect("Valid"), [2, 0, 0, 0, 255, 10]);
        assert_eq!(mac_text(&[2, 0, 0, 0, 255, 10]), "02:00:00:00:ff:0a");
        for text in ["", "02:00:00:00:00", "02:00:00:00:00:0", "02:00:00:00:00:00:00", "0x:00:00:00:00:00"] {
            assert!(parse_mac(text).is_err(), "{text}");
        }
        let (v4, v6) = (parse_ip("10.0.0.1").expect("Valid"), parse_ip("fe80::1").expect("Valid"));
        assert_eq!(parse_prefix("32", &v4).expect("Valid"), 32);
        assert!(parse_prefix("33", &v4).is_err());
        assert_eq!(parse_prefix("128", &v6).expect("Valid"), 128);
        assert!(parse_prefix("129", &v6).is_err());
    }
}
