//! `regex-lite` in the place of `regex`, whose Unicode tables are 225 KiB of addresses that each process relocates, and so has
//! to itself, before its first instruction. oci-spec and libcontainer match a dozen ASCII characters with it.

pub use regex_lite::*;
