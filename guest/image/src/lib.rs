//! Initrds and images from Debian packages and files, without installing anything and the same
//! bytes each time: a [`pool::Pool`] of unpacked packages, a [`tree::Tree`] of what the guest gets,
//! [`archive::build`] which makes the archive, and [`disk::build`] which makes a file system.

pub mod archive;
pub mod disk;
pub mod libraries;
pub mod manifest;
pub mod pool;
pub mod tree;
