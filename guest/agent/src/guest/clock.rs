//! SetGuestDateTime.

use std::io;

use nix::errno::Errno;

/// Sets the wall clock: seconds and microseconds since the epoch.
pub fn set_time(seconds: i64, microseconds: i64) -> io::Result<()> {
    let time = libc::timeval { tv_sec: seconds, tv_usec: microseconds };
    // SAFETY: settimeofday reads one timeval, a live local; a null timezone leaves it as it is.
    Errno::result(unsafe { libc::settimeofday(&raw const time, std::ptr::null()) })?;
    Ok(())
}
