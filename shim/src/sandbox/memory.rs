//! Memory beyond what the machine starts with: as much as the limits of its containers are together, and no more than is
//! configured.
//!
//! It is plugged before the container that it is for is made, and the guest is asked to give it back when that is gone.

use std::collections::HashMap;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use oci_spec::runtime::LinuxResources;
use tokio::io::Interest;
use tokio::sync::watch;
use vmm::MemHandle;

use super::guest::Guest;
use super::{Sandbox, SandboxError};
use crate::config::Hypervisor;
use crate::container::Container;
use crate::ids::Id;
use crate::lock::lock;
use crate::oci::{self, MemoryLimit};
use crate::readiness;
use crate::sandbox::machine::BLOCK;

/// Longest time that a guest may take to plug memory. On real processors it is a millisecond or two for 128 MiB, emulated
/// ones that have other work take a hundred times as long.
const PLUG_PATIENCE: Duration = Duration::from_secs(30);

/// Why a container does not have the memory that it may use.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The guest did not plug it.
    #[error(
        "The guest has plugged {} of {} MiB of memory for its containers within {} s",
        plugged >> 20, wanted >> 20, PLUG_PATIENCE.as_secs()
    )]
    Late {
        /// Bytes that it has.
        plugged: u64,
        /// Bytes that it was asked to have.
        wanted: u64,
    },
    /// The machine has ended meanwhile.
    #[error("The machine of the sandbox has ended")]
    Ended,
    /// There is nothing to wait with.
    #[error("Cannot wait for the guest's memory")]
    Wait(#[from] io::Error),
}

/// What containers want of the memory that can be plugged.
pub struct Demand {
    /// Most that the guest can be asked for, in bytes: whole blocks.
    most: u64,
    /// Memory limits of the containers that have one, in bytes.
    limits: Mutex<HashMap<Id, u64>>,
    /// What the guest is asked for, in bytes.
    wanted: watch::Sender<u64>,
    /// Held by whoever waits for the guest: what tells of its progress can be read once.
    turn: tokio::sync::Mutex<()>,
}

impl Demand {
    /// Nobody wants anything of what `hypervisor` says there is.
    pub fn new(hypervisor: &Hypervisor) -> Self {
        let most = hypervisor.more_memory_mib << 20;
        Self {
            most: most.saturating_sub(most % BLOCK),
            limits: Mutex::default(),
            wanted: watch::Sender::new(0),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// Makes `limit` that of `container`, and asks the guest, if it is still there, for what all want now. Returns the limit
    /// that there was, and whether all limits fit.
    fn set(&self, memory: Option<&MemHandle>, container: &Id, limit: Option<u64>) -> (Option<u64>, bool) {
        let mut limits = lock(&self.limits);
        let before = match limit {
            Some(limit) => limits.insert(container.clone(), limit),
            None => limits.remove(container),
        };
        let sum = limits.values().fold(0, |sum: u64, limit| sum.saturating_add(*limit));
        let bytes = sum.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX).min(self.most);
        // The lock is held, so that the guest is asked for what the last change has come to.
        if let Some(memory) = memory
            && self.wanted.send_if_modified(|wanted| std::mem::replace(wanted, bytes) != bytes)
            && let Err(error) = memory.set_requested(bytes)
        {
            tracing::error!(%error, "The guest cannot be asked for memory");
        }
        (before, sum <= self.most)
    }

    /// Waits until the guest has what it was last asked for, `patience` at most.
    async fn is_met(
        &self,
        memory: &MemHandle,
        ended: impl Future<Output = io::Result<()>>,
        patience: Duration,
    ) -> Result<(), MemoryError> {
        let mut wanted = self.wanted.subscribe();
        if memory.plugged() >= *wanted.borrow_and_update() {
            return Ok(());
        }
        let met = async {
            // Whoever waits for a turn waits for the same guest: that counts for its patience too.
            let _turn = self.turn.lock().await;
            let event = memory.changed().try_clone()?.into_raw_fd();
            // SAFETY: nobody else has the descriptor.
            let event = readiness::watch(unsafe { OwnedFd::from_raw_fd(event) }, Interest::READABLE)?;
            while memory.plugged() < *wanted.borrow_and_update() {
                tokio::select! {
                    ready = event.readable() => {
                        ready?.clear_ready();
                        // It has nothing to read where somebody has made it readable for nothing.
                        let _ = memory.changed().read();
                    }
                    // The sender is in this object, so it cannot be gone.
                    _ = wanted.changed() => {}
                }
            }
            Ok::<(), MemoryError>(())
        };
        tokio::select! {
            met = tokio::time::timeout(patience, met) => {
                let late = |_| MemoryError::Late { plugged: memory.plugged(), wanted: *self.wanted.borrow() };
                met.map_err(late)?
            }
            ended = ended => Err(ended.map_or_else(MemoryError::Wait, |()| MemoryError::Ended)),
        }
    }
}

/// Memory that is wanted for a container, and not any more when this is dropped, unless it is [settled](Self::settle).
pub struct Claim {
    sandbox: Arc<Sandbox>,
    container: Id,
    before: Option<u64>,
    settled: bool,
}

impl Claim {
    /// The container exists with this limit.
    pub fn settle(mut self, limit: Option<u64>) {
        self.settled = true;
        self.sandbox.set_memory_limit(&self.container, limit);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.settled {
            self.sandbox.set_memory_limit(&self.container, self.before);
        }
    }
}

impl Sandbox {
    /// Asks the guest for the memory that a container with this limit needs, if that is more than it has now.
    pub(super) fn claim_memory(self: &Arc<Self>, container: &Id, limit: Option<u64>) -> Claim {
        let memory = self.pluggable_memory();
        let (before, fits) = self.demand.set(memory.as_ref(), container, limit);
        if memory.is_some() && !fits {
            let most_mib = self.demand.most >> 20;
            tracing::warn!(%container, most_mib, "The memory limits of the containers do not fit below default_maxmemory");
        }
        Claim { sandbox: Arc::clone(self), container: container.clone(), before, settled: false }
    }

    /// Waits until the guest has what was claimed.
    pub(super) async fn memory_is_there(&self, guest: &Guest) -> Result<(), MemoryError> {
        match guest.machine().pluggable_memory() {
            Some(memory) => self.demand.is_met(&memory, guest.ended(), PLUG_PATIENCE).await,
            None => Ok(()),
        }
    }

    /// Asks the guest for what containers want when the limit of one has changed, or it is gone. Does not wait for it.
    pub(super) fn set_memory_limit(&self, container: &Id, limit: Option<u64>) {
        self.demand.set(self.pluggable_memory().as_ref(), container, limit);
    }

    /// Changes a container's limits: those of its memory after there is enough of it, and before there is less.
    pub async fn update_container(
        self: &Arc<Self>,
        container: &Container,
        resources: &LinuxResources,
    ) -> Result<(), SandboxError> {
        let guest = self.guest()?;
        let limit = oci::memory_limit(resources);
        let claim = limit.map(|MemoryLimit(limit)| (self.claim_more_memory(&container.id, limit), limit));
        if claim.is_some() {
            self.memory_is_there(&guest).await?;
        }
        let updated = guest.agent.update(&container.id, oci::resources(resources)).await;
        updated.map_err(|source| SandboxError::Agent { what: "Cannot update the container's limits", source })?;
        if let Some((claim, limit)) = claim {
            claim.settle(limit);
            if self.container(&container.id).is_none() {
                // Removed meanwhile.
                self.set_memory_limit(&container.id, None);
            }
        }
        Ok(())
    }

    /// As [`claim_memory`](Self::claim_memory), for a container that keeps what it has until it is settled.
    fn claim_more_memory(self: &Arc<Self>, container: &Id, limit: Option<u64>) -> Claim {
        let present = lock(&self.demand.limits).get(container).copied();
        self.claim_memory(container, limit.max(present))
    }

    fn pluggable_memory(&self) -> Option<MemHandle> {
        self.guest().ok()?.machine().pluggable_memory()
    }
}

#[cfg(test)]
mod tests {
    use devices::virtio::mem::{Mem, MemConfig, PluggableMemory};

    use super::*;
    use crate::config::Config;

    struct Nowhere;

    impl PluggableMemory for Nowhere {
        fn plug(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn unplug(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
    }

    fn demand(more_memory_mib: u64) -> (Demand, MemHandle) {
        let hypervisor = Hypervisor { more_memory_mib, ..Config::default().hypervisor };
        let region = MemConfig { size: 1 << 30, block_size: BLOCK, requested: 0, node: 0 };
        (Demand::new(&hypervisor), Mem::new(region, 4 << 30, Box::new(Nowhere)).unwrap().1)
    }

    fn id(name: &str) -> Id {
        Id::try_from(name).unwrap()
    }

    #[test]
    fn the_guest_is_asked_for_the_sum_of_all_limits_in_whole_blocks() {
        let (demand, memory) = demand(513);
        let set = |name: &str, limit| {
            let (before, fits) = demand.set(Some(&memory), &id(name), limit);
            assert_eq!(memory.requested(), *demand.wanted.borrow());
            (before, fits, memory.requested() >> 20)
        };
        assert_eq!(set("a", Some(1)), (None, true, 2));
        assert_eq!(set("b", Some(BLOCK)), (None, true, 4));
        assert_eq!(set("c", None), (None, true, 4));
        assert_eq!(set("b", Some(510 << 20)), (Some(BLOCK), true, 512));
        // One past the most, which is whole blocks too.
        assert_eq!(set("a", Some((2 << 20) + 1)), (Some(1), false, 512));
        assert_eq!(set("a", Some(u64::MAX)), (Some((2 << 20) + 1), false, 512));
        assert_eq!(set("a", None), (Some(u64::MAX), true, 510));
        assert_eq!(set("b", None), (Some(510 << 20), true, 0));
    }

    #[test]
    fn where_there_is_nothing_to_plug_nothing_is_asked_for() {
        let (demand, memory) = demand(1);
        assert_eq!(demand.set(Some(&memory), &id("a"), Some(1 << 30)), (None, false));
        assert_eq!((memory.requested(), demand.most), (0, 0));
        assert_eq!(demand.set(None, &id("a"), None), (Some(1 << 30), true));
    }

    /// The machine's end, which does not come.
    fn never() -> std::future::Pending<io::Result<()>> {
        std::future::pending()
    }

    /// A guest that plugs nothing holds nobody up for longer than it may, and says how much is missing.
    #[tokio::test]
    async fn a_guest_that_plugs_nothing_is_late() {
        let (demand, memory) = demand(1024);
        demand.is_met(&memory, never(), Duration::ZERO).await.unwrap();
        demand.set(Some(&memory), &id("a"), Some(64 << 20));
        let late = demand.is_met(&memory, never(), Duration::from_millis(1)).await.unwrap_err();
        assert_eq!(late.to_string(), "The guest has plugged 0 of 64 MiB of memory for its containers within 30 s");
        let ended = demand.is_met(&memory, async { Ok(()) }, PLUG_PATIENCE).await.unwrap_err();
        assert!(matches!(ended, MemoryError::Ended));
    }

    /// One that waits behind another is late as soon.
    #[tokio::test]
    async fn nobody_waits_longer_for_a_turn() {
        let (demand, memory) = demand(1024);
        demand.set(Some(&memory), &id("a"), Some(64 << 20));
        let _first = demand.turn.lock().await;
        let late = demand.is_met(&memory, never(), Duration::from_millis(1)).await.unwrap_err();
        assert!(matches!(late, MemoryError::Late { plugged: 0, .. }));
    }

    /// Whoever waits is not held up by what nobody wants any more.
    #[tokio::test]
    async fn a_wait_ends_when_less_is_wanted() {
        let (demand, memory) = demand(1024);
        demand.set(Some(&memory), &id("a"), Some(64 << 20));
        let less = async {
            tokio::task::yield_now().await;
            demand.set(Some(&memory), &id("a"), None);
        };
        let (met, ()) = tokio::join!(demand.is_met(&memory, never(), PLUG_PATIENCE), less);
        met.unwrap();
    }
}
