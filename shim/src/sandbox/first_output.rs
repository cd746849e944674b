//! T6: when a container's first byte of output reached containerd's FIFO.
//!
//! The muxer writes it without the shim's knowledge, so the kernel is asked to tell: once, as a notification for each
//! write would cost more than the write.

use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::trace;
use crate::readiness;

/// A watch on a FIFO that nothing was written to yet.
pub struct FirstOutput {
    inotify: AsyncFd<OwnedFd>,
}

impl FirstOutput {
    /// Watches `fifo`. `None` where it cannot be watched: T6 is a measurement, not a condition of a start.
    pub fn watch(fifo: &Path) -> Option<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).ok()?;
        inotify.add_watch(fifo, AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ONESHOT).ok()?;
        Some(Self { inotify: readiness::watch(inotify.into(), Interest::READABLE).ok()? })
    }

    /// Waits for the first write and returns the time.
    pub async fn seen(self) -> Option<u64> {
        let _ready = self.inotify.readable().await.ok()?;
        Some(trace::now())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    #[tokio::test]
    async fn the_first_write_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut fifo =
            std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let watch = FirstOutput::watch(&path).unwrap();
        let before = trace::now();
        fifo.write_all(b"x").unwrap();
        assert!(watch.seen().await.unwrap() >= before);
    }
}
