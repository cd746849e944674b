//! Initrds from Debian packages and files, without installing anything and the same bytes each
//! time: a [`pool::Pool`] of unpacked packages, a [`tree::Tree`] of what the guest gets, and
//! [`archive::build`] which makes the archive.

pub mod archive;
pub mod libraries;
pub mod manifest;
pub mod pool;
pub mod tree;
