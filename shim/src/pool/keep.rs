//! The process that fills a slot and waits to be claimed. Then it is the shim of a sandbox.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::LevelFilter;

use super::claim::{self, Claim, Handed};
use super::refill::{READY, has_a_pool};
use super::slot::Slot;
use super::spare::{Spare, SpareError};
use crate::bootstrap::{ServeError, Service, divided, in_runtime, serve_until_told, with_causes};
use crate::config::{Config, ConfigError};
use crate::ids::Id;
use crate::log;
use crate::main_thread::Ended;
use crate::readiness;
use crate::run_dir::RunDir;
use crate::sandbox::{Host, confine};
use crate::template::{Ready, Store, TemplateError, name_for};

/// Some process waits for memory for a tenth of a second within one: then a spare is a luxury
/// (Documentation/accounting/psi.rst).
const PRESSURE: &[u8] = b"some 100000 1000000\0";
const PRESSURE_FILE: &str = "/proc/pressure/memory";

/// Why a slot was not filled, or what ended the shim that the spare became.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no template that fits.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The slot.
    #[error("Cannot take a place in the pool")]
    Slot(#[source] io::Error),
    /// The spare.
    #[error(transparent)]
    Spare(#[from] SpareError),
    /// The process.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

impl From<Ended> for KeepError {
    fn from(ended: Ended) -> Self {
        Self::Slot(io::Error::other(ended))
    }
}

/// Fills a free slot and waits until the spare is claimed, is not wanted any more, or memory is short; once claimed, serves.
/// Does nothing if no slot is free. Begins when standard input ends: see [`Refill`](super::Refill).
pub fn keep(config_path: Option<&Path>) -> Result<(), KeepError> {
    io::copy(&mut io::stdin().lock(), &mut io::sink()).map_err(KeepError::Slot)?;
    let (config, _) = Config::load(config_path)?;
    let run_dir = RunDir::from_environment();
    let name = name_for(config_path);
    if !has_a_pool(&config) {
        return Ok(());
    }
    log::init(None, LevelFilter::INFO);
    // Replaced when the spare is claimed; before that no container is made.
    let nowhere = Path::new("/");
    let keeper = Keeper { config, config_path: config_path.map(Path::to_owned), run_dir, name };
    let sandboxes = keeper.run_dir.sandboxes();
    let pool = keeper.run_dir.pool();
    divided(nowhere, sandboxes, pool, keeper, |keeper, host| {
        let kept = in_runtime(keeper.run(host))?;
        if let Err(error) = &kept {
            say(&with_causes(error));
            tracing::error!("{}", with_causes(error));
        }
        Ok(())
    })?;
    Ok(())
}

struct Keeper {
    config: Config,
    config_path: Option<PathBuf>,
    run_dir: RunDir,
    name: Id,
}

impl Keeper {
    async fn run(self, host: Host) -> Result<(), KeepError> {
        let take = |index| Slot::take(&self.run_dir, &self.name, index).transpose();
        let Some(slot) = (0..self.config.factory.pool_size).find_map(take).transpose().map_err(KeepError::Slot)? else {
            return Ok(());
        };
        host.helper.watch().map_err(KeepError::Slot)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(KeepError::Slot)?;
        let pressure = Pressure::watch();
        let listener =
            slot.listen().and_then(|socket| readiness::watch(socket, Interest::READABLE)).map_err(KeepError::Slot)?;
        let store = Store::new(&self.config, &self.run_dir);
        let ready = {
            let (store, name, config) = (store.clone(), self.name.clone(), self.config.clone());
            host.main.run(move || Ready::find(&store, &name, &config)).await??
        };
        confine(self.config.runtime.confinement).map_err(ServeError::from)?;
        let spare = Spare::make(slot.directory(), &self.name, self.config.clone(), ready, store, &host).await?;
        slot.open().map_err(KeepError::Slot)?;
        say(READY);
        let claimed = tokio::select! {
            claimed = self.claimed(&listener, &spare) => claimed.map_err(KeepError::Slot)?,
            () = pressure.is_high() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        };
        let Some((connection, claim, handed)) = claimed else { return Ok(()) };
        log::send_to(&claim.bundle);
        log::set_level(if claim.debug { LevelFilter::DEBUG } else { LevelFilter::INFO });
        log::set_sandbox(&claim.id);
        let service = Service {
            socket: self.run_dir.socket(&claim.address, &claim.namespace, &claim.id),
            namespace: claim.namespace,
            run_dir: self.run_dir,
            listener: UnixListener::from(handed.listener),
            events: claim.events,
            sign: handed.sign,
            spare: Some(spare),
        };
        claim::answer(connection.as_fd(), &Ok(std::process::id())).map_err(KeepError::Slot)?;
        // By its lock a spare that does not answer is found and killed, so it goes after the answer.
        drop((slot, connection, listener, pressure, terminate));
        Ok(serve_until_told(service, host).await?)
    }

    /// The claim that is taken; `None` if the spare is not what a sandbox would be made of any more.
    async fn claimed(
        &self,
        listener: &AsyncFd<OwnedFd>,
        spare: &Spare,
    ) -> io::Result<Option<(OwnedFd, Claim, Handed)>> {
        loop {
            let mut ready = listener.readable().await?;
            let Ok(connection) = ready.try_io(|listener| claim::accept(listener.as_fd())) else { continue };
            let connection = connection?;
            let (claim, handed) = match claim::receive(connection.as_fd()) {
                Ok(Some(received)) => received,
                Ok(None) | Err(_) => continue,
            };
            let wanted = Config::load(self.config_path.as_deref());
            if wanted.is_ok_and(|(config, _)| spare.is_made_for(&config)) {
                return Ok(Some((connection, claim, handed)));
            }
            let why = "The spare does not fit the configuration and its template any more".to_owned();
            claim::answer(connection.as_fd(), &Err(why))?;
            return Ok(None);
        }
    }
}

/// For who has the pool filled. Nobody else listens.
fn say(what: &str) {
    let _ = writeln!(io::stdout(), "{what}");
}

/// The kernel's word that memory is short.
struct Pressure(Option<AsyncFd<OwnedFd>>);

impl Pressure {
    /// Where the kernel cannot tell, nobody is told.
    fn watch() -> Self {
        let watch = || {
            let file =
                nix::fcntl::open(PRESSURE_FILE, OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())?;
            nix::unistd::write(&file, PRESSURE)?;
            readiness::watch(file, Interest::PRIORITY)
        };
        Self(
            watch()
                .inspect_err(
                    |error: &io::Error| tracing::debug!(%error, "The kernel does not tell when memory is short"),
                )
                .ok(),
        )
    }

    async fn is_high(&self) {
        match &self.0 {
            Some(file) => drop(file.ready(Interest::PRIORITY).await),
            None => std::future::pending().await,
        }
    }
}
