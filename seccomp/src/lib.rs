//! What each thread may do, and nothing beyond it.
//!
//! A thread that works for a guest is made by [`spawn`], which names its [`Role`]. Before the thread's first own
//! instruction it can gain no privilege any more, has lost the capabilities that its role does not need, sees no file
//! system where it needs none, and is under the role's system call filter. [`confine_process`] puts the ceiling over
//! everything else. The filters are the files in `filters/`, compiled when the crate is built.
//!
//! A call that no file allows ends the process. Standard error, or the descriptor given to [`report_to`], has the
//! reason: the role, the call's name and its first arguments.

mod error;
mod filter;
mod privileges;
mod process;
mod thread;
mod trap;

pub use error::ConfineError;
pub use process::{
    confine_helper, confine_machine, confine_process, drop_capabilities, drop_privileges, is_confined, take_role,
};
pub use thread::{Entering, Post, spawn, start};
pub use trap::{EXIT_CODE, report_to, set_role};

/// What a thread is for. Each has a file in `filters/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A thread that talks to the outside and builds no machine.
    Api,
    /// An event loop of devices.
    Io,
    /// A processor.
    Vcpu,
    /// A file system server.
    Fs,
    /// What brings guest memory page by page.
    Uffd,
}

impl Role {
    /// Its name, which is its file's.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Io => "io",
            Self::Vcpu => "vcpu",
            Self::Fs => "fs",
            Self::Uffd => "uffd",
        }
    }
}

/// Whether threads and the process are confined.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Confinement {
    /// As their roles say.
    #[default]
    On,
    /// Not at all: whoever breaks out of the guest has everything that the process has.
    Off,
}

impl Confinement {
    /// Says loudly in the log that there is no confinement, where there is none.
    pub fn announce(self) {
        if self == Self::Off {
            tracing::warn!(
                "SECCOMP IS DISABLED: threads have no filters and keep their capabilities. Not for guests that are not trusted"
            );
        }
    }
}
