//! The serving process: containerd's Task service on the socket that `start` made.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::Builder;

use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::LevelFilter;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use super::flags::Flags;
use crate::events::{self, Publisher};
use crate::helper::{self, Grounds};
use crate::ids::{Id, IdError};
use crate::pool::{self, Spare};
use crate::run_dir::RunDir;
use crate::sandbox::Host;
use crate::service::TaskService;
use crate::{log, main_thread};

/// Descriptor on which `start` hands the listening socket over.
pub const LISTENER_FD: RawFd = 3;
/// Blocking calls are rare: to the helper, and into log files.
const BLOCKING_THREADS: usize = 8;
/// The thread that serves containerd. It waits for nothing but events, so one is enough.
const THREAD: &str = "api";
/// Deepest seen is the parsing of a large `config.json`.
const STACK_SIZE: usize = 1 << 20;

/// Why the service ended or did not begin.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The identifier of the container that the shim was started for.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The socket was not handed over.
    #[error("Descriptor {LISTENER_FD} is not the listening socket that `start` hands over")]
    Listener(#[source] io::Error),
    /// Capabilities that no sandbox needs.
    #[error("Cannot confine the serving process")]
    Confine(#[from] seccomp::ConfineError),
    /// The helper.
    #[error("Cannot make the helper process")]
    Helper(#[source] io::Error),
    /// A bug in the service.
    #[error("The service has panicked")]
    Panicked,
    /// The runtime, or a signal handler.
    #[error("Cannot set up the serving process")]
    Runtime(#[source] io::Error),
    /// The server.
    #[error("Cannot serve")]
    Server(#[from] ttrpc::Error),
}

/// Serves until containerd asks for the end, or SIGTERM does.
pub fn run(flags: &Flags) -> Result<(), ServeError> {
    let bundle = super::bundle(flags).map_err(ServeError::Runtime)?;
    log::init(Some(&bundle), if flags.debug { LevelFilter::DEBUG } else { LevelFilter::INFO });
    let served = serve(flags);
    if let Err(error) = &served {
        tracing::error!("{}", super::with_causes(error));
    }
    served
}

fn serve(flags: &Flags) -> Result<(), ServeError> {
    let id = Id::try_from(flags.id.as_str())?;
    log::set_sandbox(&id);
    let listener = inherited_listener()?;
    // What the helper must not have: it would keep them open.
    let sign = pool::take_sign();
    let run_dir = RunDir::from_environment();
    let bundle = super::bundle(flags).map_err(ServeError::Runtime)?;
    let socket = run_dir.socket(&flags.address, &flags.namespace, &id);
    let (bundles, sandbox) = (bundle.parent().unwrap_or(&bundle).to_owned(), run_dir.sandbox(&id));
    let sandboxes = run_dir.sandboxes();
    let events = events::address_from_environment();
    let service = Service { namespace: flags.namespace.clone(), run_dir, socket, listener, events, sign, spare: None };
    divided(&bundles, sandboxes, sandbox, service, |service, host| in_runtime(serve_until_told(service, host))?)
}

/// Divides the process into helper and shim. The shim's first thread does what needs privileges; `api` is what the other
/// does, with `given`, which the helper has none of.
pub fn divided<T: Send + 'static>(
    bundles: &Path,
    sandboxes: PathBuf,
    sandbox: PathBuf,
    given: T,
    api: impl FnOnce(T, Host) -> Result<(), ServeError> + Send + 'static,
) -> Result<(), ServeError> {
    // Before anything that only the shim needs is there, and before the process has threads.
    let helper = match helper::divide().map_err(ServeError::Helper)? {
        helper::Forked::Helper(socket) => {
            drop(given);
            let grounds = Grounds::new(bundles, sandboxes).map_err(ServeError::Helper)?;
            return helper::serve(socket, sandbox, grounds).map_err(ServeError::Helper);
        }
        helper::Forked::Shim(helper) => Arc::new(helper),
    };
    raise_file_limit();
    seccomp::drop_privileges()?;
    let (main, work) = main_thread::new();
    let host = Host { helper, main };
    let api = Builder::new().name(THREAD.to_owned()).spawn(move || {
        let main = host.main.clone();
        let served = api(given, host);
        main.end();
        served
    });
    let api = api.map_err(ServeError::Runtime)?;
    work.run();
    api.join().unwrap_or(Err(ServeError::Panicked))
}

/// Every file that a guest has open or remembers is a descriptor here.
pub fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "Cannot raise the limit of open files");
    }
}

/// What the service's thread is given.
pub struct Service {
    /// containerd's namespace.
    pub namespace: String,
    /// Where state is.
    pub run_dir: RunDir,
    /// Where the listener is bound.
    pub socket: PathBuf,
    /// On which containerd calls.
    pub listener: UnixListener,
    /// Where containerd takes events.
    pub events: Option<String>,
    /// To be closed when the first container was started: the pool is refilled then.
    pub sign: Option<OwnedFd>,
    /// The machine, if it was made before anybody asked for it.
    pub spare: Option<Spare>,
}

/// Runs `work` in the calling thread, which has no capabilities from here on.
pub fn in_runtime<T>(work: impl Future<Output = T>) -> Result<T, ServeError> {
    seccomp::drop_capabilities()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(STACK_SIZE)
        .thread_name(THREAD)
        .on_thread_start(|| seccomp::set_role(seccomp::Role::Api))
        .enable_all()
        .build()
        .map_err(ServeError::Runtime)?;
    Ok(runtime.block_on(work))
}

/// Serves containerd until it, or SIGTERM, asks for the end.
pub async fn serve_until_told(service: Service, host: Host) -> Result<(), ServeError> {
    let Service { namespace, run_dir, socket, listener, events, sign, spare } = service;
    if spare.is_none() {
        // A spare has it watched already.
        host.helper.watch().map_err(ServeError::Helper)?;
    }
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Runtime)?;
    let publisher = Publisher::new(&namespace, events);
    let service = TaskService::new(namespace, run_dir, Some(socket.clone()), host, publisher, spare, sign);
    let service = Arc::new(service);
    let listener = Listener::try_from(listener).map_err(ServeError::Listener)?;
    let [v2, v3] = service.register();
    let mut server = Server::new().add_listener(listener).register_service(v2).register_service(v3);
    server.start().await?;
    tracing::debug!("Serving");
    tokio::select! {
        () = service.shutdown_requested() => tracing::debug!("containerd asks for the end"),
        _ = terminate.recv() => tracing::warn!("SIGTERM asks for the end"),
    }
    service.finish().await;
    // Before connections close: containerd calls `delete` at once, which must not find a socket that nobody serves.
    match std::fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(socket = %socket.display(), %error, "Cannot remove the socket");
        }
        _ => {}
    }
    // Answers that are on their way are sent before connections close.
    server.shutdown().await?;
    Ok(())
}

/// Takes the listening socket over, after a look that it is one: the program may have been started by hand.
fn inherited_listener() -> Result<UnixListener, ServeError> {
    use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
    use std::os::fd::BorrowedFd;

    // SAFETY: the borrow ends before anything could close the descriptor; whether it is open the call itself tells.
    let borrowed = unsafe { BorrowedFd::borrow_raw(LISTENER_FD) };
    match getsockopt(&borrowed, AcceptConn) {
        Ok(true) => {}
        Ok(false) => return Err(ServeError::Listener(io::ErrorKind::InvalidInput.into())),
        Err(errno) => return Err(ServeError::Listener(errno.into())),
    }
    // SAFETY: the descriptor is a listening socket, as was just seen, and nothing else in this process knows of it.
    let owned = unsafe { OwnedFd::from_raw_fd(LISTENER_FD) };
    nix::fcntl::fcntl(&owned, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .map_err(|errno| ServeError::Listener(errno.into()))?;
    Ok(owned.into())
}
