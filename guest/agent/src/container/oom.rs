//! OOM kills: the kernel counts them in each cgroup's `memory.events` and wakes whoever watches the file.

use std::collections::HashMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};

use super::cgroup::Cgroup;

/// Events that nobody has asked for yet. One a container and kill; what does not fit is logged and dropped.
const QUEUE: usize = 128;

struct Watched {
    id: String,
    events: PathBuf,
    kills: u64,
}

struct Inner {
    inotify: Option<Inotify>,
    watched: Mutex<HashMap<WatchDescriptor, Watched>>,
    sender: mpsc::Sender<String>,
    receiver: tokio::sync::Mutex<mpsc::Receiver<String>>,
    closed: watch::Sender<bool>,
}

/// Watches the cgroups of containers. Cheap to clone.
#[derive(Clone)]
pub struct OomWatch(Arc<Inner>);

impl OomWatch {
    /// Nothing is watched yet. Without inotify no event ever comes, and the log says so.
    pub fn new() -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .inspect_err(|errno| tracing::warn!(%errno, "OOM kills cannot be watched"))
            .ok();
        let receiver = tokio::sync::Mutex::new(receiver);
        let closed = watch::Sender::new(false);
        Self(Arc::new(Inner { inotify, watched: Mutex::default(), sender, receiver, closed }))
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, Watched>> {
        self.0.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to watch a container. A kernel without the memory controller has nothing to watch.
    pub fn watch(&self, id: &str, cgroup: &Cgroup) {
        let events = cgroup.directory().join("memory.events");
        let Some(inotify) = self.0.inotify.as_ref().filter(|_| events.exists()) else { return };
        match inotify.add_watch(&events, AddWatchFlags::IN_MODIFY) {
            Ok(descriptor) => {
                let kills = kills(&events);
                self.watched().insert(descriptor, Watched { id: id.to_owned(), events, kills });
            }
            Err(errno) => tracing::warn!(container = id, %errno, "OOM kills of this container cannot be watched"),
        }
    }

    /// Ends the watch; the kernel has ended its part with the cgroup.
    pub fn forget(&self, id: &str) {
        self.watched().retain(|_, watched| watched.id != id);
    }

    /// The next container in which a process was killed; none once the watch is closed.
    pub async fn next(&self) -> Option<String> {
        let mut closed = self.0.closed.subscribe();
        tokio::select! {
            event = async { self.0.receiver.lock().await.recv().await } => event,
            _ = closed.wait_for(|&closed| closed) => None,
        }
    }

    /// Lets everybody who waits for an event go, at the end of the sandbox.
    pub fn close(&self) {
        self.0.closed.send_replace(true);
    }

    /// Turns the kernel's wake-ups into events for as long as the agent runs.
    pub async fn run(self) -> std::io::Result<()> {
        let Some(inotify) = &self.0.inotify else { return Ok(()) };
        // SAFETY: the borrowed descriptor is that of an Inotify which lives in the same Arc as long as this future.
        let readable = unsafe { AsyncFd::register_with_interest(inotify.as_fd(), Interest::READABLE) }?;
        loop {
            let mut ready = readable.readable().await?;
            let Ok(events) = ready.try_io(|_| inotify.read_events().map_err(std::io::Error::from)) else { continue };
            for event in events? {
                if let Some(watched) = self.watched().get_mut(&event.wd) {
                    report(watched, &self.0.sender);
                }
            }
        }
    }
}

fn report(watched: &mut Watched, sender: &mpsc::Sender<String>) {
    let kills = kills(&watched.events);
    if kills > watched.kills {
        tracing::warn!(container = watched.id, kills, "A process was killed for want of memory");
        if sender.try_send(watched.id.clone()).is_err() {
            tracing::warn!(container = watched.id, "Nobody asks for OOM events; this one is dropped");
        }
    }
    watched.kills = kills;
}

fn kills(events: &Path) -> u64 {
    parse_kills(&fs::read_to_string(events).unwrap_or_default())
}

fn parse_kills(text: &str) -> u64 {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_counted_apart_from_their_neighbours() {
        assert_eq!(parse_kills("low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 7\n"), 3);
        assert_eq!(parse_kills(""), 0);
    }

    #[tokio::test]
    async fn whoever_waits_is_let_go_at_the_end() {
        let watch = OomWatch::new();
        let waiting = tokio::spawn({
            let watch = watch.clone();
            async move { watch.next().await }
        });
        tokio::task::yield_now().await;
        watch.close();
        assert_eq!(waiting.await.expect("No panic"), None);
        assert_eq!(watch.next().await, None);
    }

    #[test]
    fn only_an_increase_is_an_event() {
        let file = tempfile::NamedTempFile::new().expect("A file");
        let (sender, mut receiver) = mpsc::channel(1);
        let mut watched = Watched { id: "c1".into(), events: file.path().to_owned(), kills: 0 };
        for (count, expected) in [(0, None), (1, Some("c1")), (1, None), (3, Some("c1"))] {
            fs::write(file.path(), format!("oom_kill {count}\n")).expect("Writable");
            report(&mut watched, &sender);
            assert_eq!(receiver.try_recv().ok().as_deref(), expected);
        }
    }
}
