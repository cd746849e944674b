//! What a guest tells about its memory (section 5.5.6.3).

/// Statistics that are read from one report: several times as many as there are kinds. What comes
/// after them is not looked at.
pub const MAX_STATS: usize = 64;

/// Bytes of one statistic: a tag of 16 bits and a value of 64, packed.
pub const STAT_SIZE: usize = 10;

/// A report of the guest about itself; bytes where a field counts memory. The guest may leave out
/// any of it and may lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestStats {
    /// Memory swapped in, in bytes.
    pub swap_in: Option<u64>,
    /// Memory swapped out, in bytes.
    pub swap_out: Option<u64>,
    /// Page faults that needed a disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Memory that nobody uses.
    pub free: Option<u64>,
    /// Memory that there is.
    pub total: Option<u64>,
    /// What a new program could get without swapping.
    pub available: Option<u64>,
    /// Files kept in memory, which can be dropped.
    pub caches: Option<u64>,
    /// Huge pages that were allocated.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be.
    pub hugetlb_failures: Option<u64>,
    /// Processes killed for lack of memory.
    pub oom_kills: Option<u64>,
    /// Allocations that had to wait for memory.
    pub allocation_stalls: Option<u64>,
    /// Pages looked at for reclaim in the background.
    pub async_scans: Option<u64>,
    /// Pages looked at for reclaim by who needed memory.
    pub direct_scans: Option<u64>,
    /// Pages reclaimed in the background.
    pub async_reclaims: Option<u64>,
    /// Pages reclaimed by who needed memory.
    pub direct_reclaims: Option<u64>,
}

impl GuestStats {
    /// Reads a report. Of several values with the same tag the last one counts; tags that are not
    /// known, and a last statistic that is not complete, do not.
    pub fn parse(report: &[u8]) -> Self {
        let mut stats = Self::default();
        let (entries, _) = report.as_chunks::<STAT_SIZE>();
        for [tag_low, tag_high, value @ ..] in entries {
            let tag = u16::from_le_bytes([*tag_low, *tag_high]);
            if let Some(field) = stats.field(tag) {
                *field = Some(u64::from_le_bytes(*value));
            }
        }
        stats
    }

    fn field(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.caches,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            10 => &mut self.oom_kills,
            11 => &mut self.allocation_stalls,
            12 => &mut self.async_scans,
            13 => &mut self.direct_scans,
            14 => &mut self.async_reclaims,
            15 => &mut self.direct_reclaims,
            _ => return None,
        })
    }
}
