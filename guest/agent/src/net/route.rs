//! UpdateRoutes and ListRoutes: the main table.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use agent_proto::types::{IPFamily, Route};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
    RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{LOOPBACK_INDEX, Netlink, family, index_of, invalid, is_served, names, parse_ip, parse_prefix};

/// Replaces the routes that somebody set by those that are wanted; those that the kernel made for addresses stay.
pub fn update_routes(wanted: &[Route]) -> io::Result<Vec<Route>> {
    let mut netlink = Netlink::open()?;
    let mut messages = Vec::new();
    for route in wanted {
        messages.extend(message(&mut netlink, route)?);
    }
    for old in routes(&mut netlink)? {
        let ours = old.header.protocol != RouteProtocol::Kernel && old.header.protocol != RouteProtocol::Ra;
        if ours && device(&old) != Some(LOOPBACK_INDEX) {
            netlink.change(RouteNetlinkMessage::DelRoute(old), 0)?;
        }
    }
    // A gateway must be reachable when its route is set, so the routes without one come first.
    messages.sort_by_key(has_gateway);
    for message in messages {
        netlink.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)?;
    }
    list(&mut netlink)
}

/// All unicast routes of the main table.
pub fn list_routes() -> io::Result<Vec<Route>> {
    list(&mut Netlink::open()?)
}

fn routes(netlink: &mut Netlink) -> io::Result<Vec<RouteMessage>> {
    let answers = netlink.dump(RouteNetlinkMessage::GetRoute(RouteMessage::default()))?;
    let route = |answer| match answer {
        RouteNetlinkMessage::NewRoute(route)
            if route.header.table == RouteHeader::RT_TABLE_MAIN && route.header.kind == RouteType::Unicast =>
        {
            Some(route)
        }
        _ => None,
    };
    Ok(answers.into_iter().filter_map(route).collect())
}

fn has_gateway(message: &RouteMessage) -> bool {
    message.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Gateway(_)))
}

fn device(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

/// `ADDRESS/LENGTH`, an address alone, or nothing: the default route of the family.
fn destination(route: &Route) -> io::Result<(IpAddr, u8)> {
    if route.dest.is_empty() || route.dest == "default" {
        let v6 = route.family.enum_value() == Ok(IPFamily::v6);
        let any = if v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
        return Ok((any, 0));
    }
    match route.dest.split_once('/') {
        Some((address, length)) => {
            let address = parse_ip(address)?;
            Ok((address, parse_prefix(length, &address)?))
        }
        None => {
            let address = parse_ip(&route.dest)?;
            Ok((address, if address.is_ipv4() { 32 } else { 128 }))
        }
    }
}

/// Nothing for a route of a family that the kernel lacks.
fn message(netlink: &mut Netlink, route: &Route) -> io::Result<Option<RouteMessage>> {
    let (address, length) = destination(route)?;
    if !is_served(&address) {
        return Ok(None);
    }
    let scope = u8::try_from(route.scope).map_err(|_| invalid(format!("{} is not a route's scope", route.scope)))?;
    let mut message = RouteMessage::default();
    message.header.address_family = family(&address);
    message.header.destination_prefix_length = length;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::from(scope);
    message.header.kind = RouteType::Unicast;
    message.header.flags = RouteFlags::from_bits_retain(route.flags);
    if length != 0 {
        message.attributes.push(RouteAttribute::Destination(address.into()));
    }
    if !route.device.is_empty() {
        message.attributes.push(RouteAttribute::Oif(index_of(netlink, &route.device)?));
    }
    if !route.gateway.is_empty() {
        message.attributes.push(RouteAttribute::Gateway(parse_ip(&route.gateway)?.into()));
    }
    if !route.source.is_empty() {
        message.attributes.push(RouteAttribute::PrefSource(parse_ip(&route.source)?.into()));
    }
    if route.mtu != 0 {
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    Ok(Some(message))
}

fn list(netlink: &mut Netlink) -> io::Result<Vec<Route>> {
    let names = names(netlink)?;
    let name = |index| names.get(&index).cloned().unwrap_or_default();
    Ok(routes(netlink)?.iter().map(|message| describe(message, name)).collect())
}

fn describe(message: &RouteMessage, name: impl Fn(u32) -> String) -> Route {
    let v6 = message.header.address_family == AddressFamily::Inet6;
    let mut route = Route {
        family: if v6 { IPFamily::v6 } else { IPFamily::v4 }.into(),
        scope: u8::from(message.header.scope).into(),
        flags: message.header.flags.bits(),
        ..Default::default()
    };
    let text = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => address.to_string(),
        RouteAddress::Inet6(address) => address.to_string(),
        _ => String::new(),
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.dest = format!("{}/{}", text(address), message.header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => route.gateway = text(address),
            RouteAttribute::PrefSource(address) => route.source = text(address),
            RouteAttribute::Oif(index) => route.device = name(*index),
            RouteAttribute::Metrics(metrics) => {
                let mtu = |metric: &RouteMetric| if let RouteMetric::Mtu(mtu) = metric { Some(*mtu) } else { None };
                route.mtu = metrics.iter().find_map(mtu).unwrap_or(0);
            }
            _ => {}
        }
    }
    route
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_come_in_several_forms() {
        let parse = |dest: &str, family: IPFamily| {
            destination(&Route { dest: dest.into(), family: family.into(), ..Default::default() })
                .map(|(address, length)| format!("{address}/{length}"))
                .map_err(|error| error.to_string())
        };
        assert_eq!(parse("", IPFamily::v4).as_deref(), Ok("0.0.0.0/0"));
        assert_eq!(parse("default", IPFamily::v6).as_deref(), Ok("::/0"));
        assert_eq!(parse("10.0.0.0/8", IPFamily::v4).as_deref(), Ok("10.0.0.0/8"));
        assert_eq!(parse("10.0.0.7", IPFamily::v4).as_deref(), Ok("10.0.0.7/32"));
        assert!(parse("10.0.0.0/33", IPFamily::v4).is_err());
        assert!(parse("x/8", IPFamily::v4).is_err());
    }
}
