use std::io;

/// Why a thread or the process is not confined. It must not go on then.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// A filter was not installed.
    #[error("Cannot install the system call filter {filter}")]
    Filter {
        /// Its file's name.
        filter: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another thread has a filter that the process's cannot be put under.
    #[error("The ceiling cannot be put over thread {0}, which has a filter of its own already")]
    Diverged(i64),
    /// `PR_SET_NO_NEW_PRIVS` failed.
    #[error("Cannot give up gaining privileges")]
    NoNewPrivileges(#[source] io::Error),
    /// Capabilities stay.
    #[error("Cannot drop capabilities")]
    Capabilities(#[from] caps::errors::CapsError),
    /// Landlock failed on a kernel that has it.
    #[error("Cannot close the file system to the thread")]
    Landlock(#[from] landlock::RulesetError),
    /// The root directory, for a rule on all that is below it.
    #[error("Cannot open the root directory")]
    Root(#[from] landlock::PathFdError),
    /// The handler of trapped calls was not installed.
    #[error("Cannot handle SIGSYS")]
    Handler(#[source] io::Error),
}
