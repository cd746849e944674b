//! ReseedRandomDev: fresh entropy from the host, for a guest that was restored from a snapshot.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

// random(4): _IO('R', 0x07), reseed the generator from the pool now.
nix::ioctl_none!(rndreseedcrng, b'R', 0x07);

/// Mixes `data` into the pool and has the generator take it up.
pub fn reseed(data: &[u8]) -> io::Result<()> {
    let mut random = File::options().write(true).open("/dev/random")?;
    random.write_all(data)?;
    // SAFETY: the descriptor is /dev/random and the request takes no argument.
    unsafe { rndreseedcrng(random.as_raw_fd()) }?;
    Ok(())
}
