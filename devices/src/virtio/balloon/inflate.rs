//! The pure half of inflating: a list of page numbers becomes runs of pages.

use std::ops::Range;

use tracing::debug;

use super::PAGE_SIZE;
use super::reclaim::discard;
use crate::GuestMemory;
use crate::virtio::queue::{Chain, QueueError};

/// Page numbers that one request gets served: four times what Linux sends, a page full of them. Of
/// a longer one the rest stays with the guest, so that no request costs the loop more than this
/// many system calls.
pub const MAX_PAGES_PER_REQUEST: usize = 1024;

/// Bytes of a page number.
const PFN_SIZE: usize = size_of::<u32>();

/// Reads page numbers from chains and gives the pages back.
#[derive(Default)]
pub struct Inflate {
    bytes: Vec<u8>,
    pages: Vec<u32>,
}

impl Inflate {
    /// Serves one request and returns how many bytes went back to the host.
    pub fn serve(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<u64, QueueError> {
        let readable = chain.readable();
        let wanted = (readable.len() as usize).min(MAX_PAGES_PER_REQUEST.saturating_mul(PFN_SIZE));
        self.bytes.resize(wanted, 0);
        let copied = readable.read(memory, &mut self.bytes)?;
        let (numbers, rest) = self.bytes.get(..copied).unwrap_or_default().as_chunks::<PFN_SIZE>();
        if !rest.is_empty() || copied < readable.len() as usize {
            debug!(device = "balloon", bytes = readable.len(), "A request is cut to whole page numbers and its limit");
        }
        self.pages.clear();
        self.pages.extend(numbers.iter().map(|number| u32::from_le_bytes(*number)));
        self.pages.sort_unstable();
        Ok(runs(&self.pages).fold(0, |sum: u64, run| {
            let bytes = |page: u64| page.saturating_mul(PAGE_SIZE);
            sum.saturating_add(discard(memory, bytes(run.start)..bytes(run.end)))
        }))
    }
}

/// The runs of neighbours in sorted page numbers, of which each may be there more than once.
pub fn runs(pages: &[u32]) -> impl Iterator<Item = Range<u64>> + '_ {
    pages.chunk_by(|page, next| next.saturating_sub(*page) <= 1).filter_map(|run| {
        let (first, last) = (run.first()?, run.last()?);
        Some(u64::from(*first)..u64::from(*last).saturating_add(1))
    })
}
