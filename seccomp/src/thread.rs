//! Threads of a role.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Once;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, JoinHandle};

use crate::{ConfineError, Confinement, Role, filter, privileges, trap};

/// Arenas of the allocator. The C library counts the processors when there are more, by a file, and may do so in a thread
/// that is confined; it does not where it has been told. So many it makes before it counts (malloc.c, `arena_test`).
const ARENAS: libc::c_int = 8;
/// How much free memory at an arena's end is given back. Before the first time the C library reads how the host overcommits,
/// from a file, in whatever thread it is (`check_may_shrink_heap`): never. Blocks from 128 KiB on are mapped, and unmapped,
/// by themselves.
const TRIM_THRESHOLD: libc::c_int = libc::c_int::MAX;

/// What a thread is for, and where.
#[derive(Debug)]
pub struct Post {
    role: Role,
    /// The directory below which it may open, make and remove files, where its role may at all.
    pub(crate) ground: Option<OwnedFd>,
}

impl Post {
    /// A file system server's, for the directory `ground` and what is below it.
    pub fn serving(ground: OwnedFd) -> Self {
        Self { role: Role::Fs, ground: Some(ground) }
    }

    /// What the thread is for.
    pub fn role(&self) -> Role {
        self.role
    }
}

impl From<Role> for Post {
    /// Without any directory.
    fn from(role: Role) -> Self {
        Self { role, ground: None }
    }
}

/// A thread on its way into its role.
#[must_use = "whether it has got there is to be asked"]
pub struct Entering {
    thread: JoinHandle<()>,
    /// What it says when it is confined; nothing where it is not to be.
    report: Option<Receiver<Result<(), ConfineError>>>,
}

impl Entering {
    /// Waits until the thread is confined. When it cannot be, it does not do its work, and ends.
    pub fn confined(self) -> io::Result<JoinHandle<()>> {
        let Self { thread, report } = self;
        let entered = match report {
            Some(report) => {
                report.recv().map_err(io::Error::other).and_then(|entered| entered.map_err(io::Error::other))
            }
            None => Ok(()),
        };
        match entered {
            Ok(()) => Ok(thread),
            Err(error) => {
                // A panic has told its own message.
                let _ = thread.join();
                Err(error)
            }
        }
    }
}

/// Starts a thread that does `body` at its post, and returns when it is confined. When it cannot be, there is no thread.
pub fn spawn<F>(confinement: Confinement, post: impl Into<Post>, name: String, body: F) -> io::Result<JoinHandle<()>>
where
    F: FnOnce() + Send + 'static,
{
    start(confinement, post, name, body)?.confined()
}

/// As [`spawn`], and returns at once: the thread confines itself while the caller does something else. It does `body` as soon
/// as it is confined, so a guest must not reach it before the caller has asked.
pub fn start<F>(confinement: Confinement, post: impl Into<Post>, name: String, body: F) -> io::Result<Entering>
where
    F: FnOnce() + Send + 'static,
{
    let builder = Builder::new().name(name);
    if confinement == Confinement::Off {
        return Ok(Entering { thread: builder.spawn(body)?, report: None });
    }
    settle_allocator();
    let post = post.into();
    let (report, confined) = sync_channel(1);
    let thread = builder.spawn(move || {
        let entered = enter(post);
        let go_on = entered.is_ok();
        // Nobody may wait for it any more.
        let _ = report.send(entered);
        drop(report);
        if go_on {
            body();
        }
    })?;
    Ok(Entering { thread, report: Some(confined) })
}

/// Sees to it that the allocator opens no files.
fn settle_allocator() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for (parameter, value) in [(libc::M_ARENA_MAX, ARENAS), (libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD)] {
            // SAFETY: sets a number, and reads no memory of this program's.
            unsafe { libc::mallopt(parameter, value) };
        }
    });
}

/// The order matters: the filter comes last, as it forbids the other steps.
pub(crate) fn enter(post: Post) -> Result<(), ConfineError> {
    let role = post.role();
    trap::install_handler()?;
    trap::set_role(role);
    privileges::give_up(post)?;
    filter::install(role)
}
