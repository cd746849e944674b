//! What a sandbox tells about itself.

use std::fs::File;
use std::io;
use std::sync::Arc;

use tokio::net::UnixListener;

use super::{Sandbox, State};
use crate::container::state::State as ProcessState;
use crate::lock::lock;
use crate::metrics::process::Meter;
use crate::metrics::server::{self, Page};
use crate::metrics::{Containers, Figures, LazyFigures, Stage, families};

impl Sandbox {
    /// Answers on the socket for metrics until the sandbox has stopped. A sandbox without one runs as well.
    pub(super) fn serve_metrics(self: &Arc<Self>, meter: Option<Meter>) {
        let listener = match self.bind_metrics() {
            Ok(Some(listener)) => listener,
            Ok(None) => return,
            Err(error) => return tracing::warn!(%error, "The sandbox has no socket for metrics"),
        };
        let mut states = self.state.subscribe();
        let sandbox = Arc::downgrade(self);
        tokio::spawn(async move {
            let page = |page| {
                let (sandbox, meter) = (sandbox.upgrade(), meter.clone());
                async move {
                    match sandbox {
                        Some(sandbox) => sandbox.page(page, meter).await,
                        None => Vec::new(),
                    }
                }
            };
            tokio::select! {
                () = server::serve(&listener, page) => {}
                // An error is that there is no sandbox any more.
                _ = states.wait_for(|state| *state == State::Stopped) => {}
            }
        });
    }

    /// `None` when the sandbox has ended already.
    fn bind_metrics(&self) -> io::Result<Option<UnixListener>> {
        let resources = lock(&self.resources);
        let Some(resources) = resources.as_ref() else { return Ok(None) };
        server::bind(&File::open(resources.dir.path())?).map(Some)
    }

    async fn page(&self, page: Page, meter: Option<Meter>) -> Vec<u8> {
        let mut figures = self.figures();
        // Takes the time that walking the page tables does.
        let measured = tokio::task::spawn_blocking(move || meter.as_ref().and_then(Meter::read));
        figures.process = measured.await.ok().flatten();
        match page {
            Page::Text => families::text(None, vec![(self.id.to_string(), figures)]).into_bytes(),
            Page::Json => serde_json::to_vec(&figures).unwrap_or_default(),
        }
    }

    fn figures(&self) -> Figures {
        let state = match *self.state.borrow() {
            State::Running => Stage::Running,
            State::Stopping => Stage::Stopping,
            State::Stopped => Stage::Stopped,
        };
        let mut containers = Containers::default();
        for container in self.all_containers() {
            let count = match container.init.state() {
                ProcessState::Created => &mut containers.created,
                ProcessState::Running => &mut containers.running,
                ProcessState::Paused => &mut containers.paused,
                ProcessState::Stopped(_) => &mut containers.stopped,
            };
            *count = count.saturating_add(1);
        }
        Figures {
            state,
            containers,
            start: *lock(&self.times),
            guest_memory: self.config.hypervisor.memory_mib << 20,
            process: None,
            copied_ahead: self.guest().map_or(0, |guest| guest.machine().copied_ahead()),
            lazy: self.lazy_figures(),
        }
    }

    /// What has come of the guest's memory, where it comes page by page and there is a guest.
    pub(super) fn lazy_figures(&self) -> Option<LazyFigures> {
        let guest = self.guest().ok()?;
        guest.machine().lazy_memory().map(|memory| LazyFigures::of(&memory))
    }
}
