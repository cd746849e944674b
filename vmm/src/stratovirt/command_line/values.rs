//! Values of properties that are more than a word or a number.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

/// An amount of memory in bytes: `512`, `512m`, `2G`. A number alone counts MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Size(pub u64);

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (digits, shift) = match text.as_bytes() {
            [.., b'k' | b'K'] => (text.get(..text.len() - 1), 10),
            [.., b'm' | b'M'] => (text.get(..text.len() - 1), 20),
            [.., b'g' | b'G'] => (text.get(..text.len() - 1), 30),
            [.., b't' | b'T'] => (text.get(..text.len() - 1), 40),
            _ => (Some(text.as_str()), 20),
        };
        let number: u64 = digits.unwrap_or_default().parse().map_err(|_| "it is a number and then K, M, G or T")?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| "it is more than 64 bits of bytes".into())
    }
}

/// An Ethernet address, `52:54:00:12:34:56`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Mac(pub [u8; 6]);

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let refused = || "it is six pairs of hexadecimal digits with colons between them".to_owned();
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair =
                pairs.next().filter(|pair| pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(pair.ok_or_else(refused)?, 16).map_err(|_| refused())?;
        }
        if pairs.next().is_some() {
            return Err(refused());
        }
        if bytes.first().is_some_and(|first| first & 1 == 1) {
            return Err("it is a multicast address".into());
        }
        Ok(Self(bytes))
    }
}

/// Where a stream is: `unix:PATH`, `tcp:IP:PORT`, or for a snapshot `file:DIR`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Place {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A socket of the network.
    Tcp(SocketAddr),
    /// A directory.
    File(PathBuf),
}

impl TryFrom<String> for Place {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let refused = || "it is unix:PATH, tcp:IP:PORT or file:DIR".to_owned();
        match text.split_once(':').ok_or_else(refused)? {
            (_, "") => Err(refused()),
            ("unix", path) => Ok(Self::Unix(path.into())),
            ("file", path) => Ok(Self::File(path.into())),
            ("tcp", address) => SocketAddr::from_str(address).map(Self::Tcp).map_err(|_| refused()),
            _ => Err(refused()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_a_limit() {
        let size = |text: &str| Size::try_from(text.to_owned()).map(|size| size.0);
        assert_eq!(size("256"), Ok(256 << 20));
        assert_eq!(size("64k"), Ok(64 << 10));
        assert_eq!((size("256m"), size("256M")), (Ok(256 << 20), Ok(256 << 20)));
        assert_eq!((size("2g"), size("2G"), size("1T")), (Ok(2 << 30), Ok(2 << 30), Ok(1 << 40)));
        assert_eq!(size("17592186044415"), Ok(u64::MAX - (1 << 20) + 1));
        for nonsense in ["", "M", "-1", "1.5G", "1GG", "17592186044416", "99999999999999999999", "0x10", "é"] {
            assert!(size(nonsense).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn addresses_of_interfaces_are_six_pairs_and_unicast() {
        let mac = |text: &str| Mac::try_from(text.to_owned()).map(|mac| mac.0);
        assert_eq!(mac("52:54:00:aB:Cd:ef"), Ok([0x52, 0x54, 0, 0xab, 0xcd, 0xef]));
        for nonsense in
            ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "5:54:00:12:34:56", "+1:54:00:12:34:56", "01:00:5e:00:00:01"]
        {
            assert!(mac(nonsense).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn places_have_a_scheme() {
        let place = |text: &str| Place::try_from(text.to_owned());
        assert_eq!(place("unix:/a:b"), Ok(Place::Unix("/a:b".into())));
        assert_eq!(place("tcp:127.0.0.1:4444"), Ok(Place::Tcp(([127, 0, 0, 1], 4444).into())));
        assert_eq!(place("tcp:[::1]:1"), Ok(Place::Tcp("[::1]:1".parse().expect("an address"))));
        assert_eq!(place("file:d"), Ok(Place::File("d".into())));
        for nonsense in ["", "unix:", "/path", "tcp:localhost:1", "tcp:1.2.3.4", "tcp:1.2.3.4:65536", "exec:cat"] {
            assert!(place(nonsense).is_err(), "{nonsense}");
        }
    }
}
