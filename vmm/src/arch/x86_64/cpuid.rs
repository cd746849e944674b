//! What the guest's processors say about themselves: what KVM supports on this host, with the
//! machine's own topology and clock put in.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VcpuFd};

use super::ArchError;

/// Sub-leaf matters (`KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
const SIGNIFICANT_INDEX: u32 = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

const LEAF_VENDOR: u32 = 0;
const LEAF_FEATURES: u32 = 1;
const LEAF_INTEL_CACHES: u32 = 4;
const LEAF_PERFORMANCE_COUNTERS: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TSC: u32 = 0x15;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
/// Clock rates in kHz, where VMware put them and other hypervisors' guests look.
const LEAF_HYPERVISOR_CLOCK: u32 = 0x4000_0010;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HYPER_THREADING: u32 = 1 << 28;
/// `GenuineIntel`, the EBX part.
const INTEL_EBX: u32 = u32::from_le_bytes(*b"Genu");
/// KVM's local APIC timer counts at 1 GHz (`APIC_BUS_CYCLE_NS`).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// The leaves that all processors of one machine have in common.
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    vcpus: u8,
}

impl Template {
    /// Asks KVM what it supports (`KVM_GET_SUPPORTED_CPUID`) and adapts it to a machine of
    /// `vcpus` processors in one socket, one thread per core.
    pub fn new(kvm: &Kvm, vcpus: u8) -> Result<Self, kvm_ioctls::Error> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        Ok(Self::from_supported(supported.as_slice(), vcpus))
    }

    fn from_supported(supported: &[kvm_cpuid_entry2], vcpus: u8) -> Self {
        let rebuilt = |leaf| matches!(leaf, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 | LEAF_TSC);
        let mut entries: Vec<_> = supported.iter().filter(|entry| !rebuilt(entry.function)).copied().collect();
        for entry in &mut entries {
            adapt(entry, u32::from(vcpus));
        }
        let vendor = entries.iter().find(|entry| entry.function == LEAF_VENDOR).copied();
        if vendor.is_some_and(|vendor| vendor.eax >= LEAF_TOPOLOGY) {
            entries.extend(topology(u32::from(vcpus)));
        }
        Self { entries, vcpus }
    }

    /// Tells the guest the rates of its clocks, so that it need not measure them.
    pub fn set_clock(&mut self, tsc_khz: u32) {
        let clock = |function, eax, ebx, ecx| kvm_cpuid_entry2 { function, eax, ebx, ecx, ..Default::default() };
        let vendor = self.entries.iter().find(|entry| entry.function == LEAF_VENDOR).copied();
        if vendor.is_some_and(|it| it.ebx == INTEL_EBX && it.eax >= LEAF_TSC) {
            // TSC rate = ECX * EBX / EAX. Linux also takes the crystal's rate, ECX, for the
            // local APIC timer's, so it must be that of KVM's.
            self.entries.push(clock(LEAF_TSC, APIC_BUS_KHZ, tsc_khz, APIC_BUS_KHZ * 1000));
        }
        for entry in &mut self.entries {
            if entry.function == LEAF_HYPERVISOR {
                entry.eax = entry.eax.max(LEAF_HYPERVISOR_CLOCK);
            }
        }
        self.entries.push(clock(LEAF_HYPERVISOR_CLOCK, tsc_khz, APIC_BUS_KHZ, 0));
    }

    /// Gives vCPU `index` its identification.
    pub fn apply(&self, vcpu: &VcpuFd, index: u8) -> Result<(), ArchError> {
        let cpuid = CpuId::from_entries(&self.entries_of(index)).map_err(|_| ArchError::CpuidTooLarge)?;
        vcpu.set_cpuid2(&cpuid).map_err(ArchError::vcpu(index, "KVM_SET_CPUID2"))
    }

    /// What all processors have in common.
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries
    }

    /// What vCPU `index` is told.
    pub fn entries_of(&self, index: u8) -> Vec<kvm_cpuid_entry2> {
        let apic_id = u32::from(index);
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                LEAF_FEATURES => {
                    entry.ebx = entry.ebx & 0x0000_ffff
                        | u32::from(self.vcpus).next_power_of_two().min(255) << 16
                        | apic_id << 24;
                }
                LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => entry.edx = apic_id,
                LEAF_AMD_TOPOLOGY => {
                    entry.eax = apic_id;
                    entry.ebx = apic_id;
                    entry.ecx = 0;
                }
                _ => {}
            }
        }
        entries
    }
}

/// The words of bits that each say that the processor can do something: leaf, sub-leaf, register.
const FEATURE_WORDS: [(u32, u32, Register); 14] = [
    (LEAF_FEATURES, 0, Register::Ecx),
    (LEAF_FEATURES, 0, Register::Edx),
    (7, 0, Register::Ebx),
    (7, 0, Register::Ecx),
    (7, 0, Register::Edx),
    (7, 1, Register::Eax),
    (7, 1, Register::Edx),
    (7, 2, Register::Edx),
    (0xd, 0, Register::Eax),
    (0xd, 1, Register::Eax),
    (0x4000_0001, 0, Register::Eax),
    (0x8000_0001, 0, Register::Ecx),
    (0x8000_0001, 0, Register::Edx),
    (LEAF_AMD_SIZES, 0, Register::Ebx),
];

/// One of the four that the instruction fills in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// A guest was told of what this host does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FeatureGap {
    /// Another maker.
    #[error("The processor's vendor is another one (CPUID leaf 0)")]
    Vendor,
    /// Bits.
    #[error("CPUID leaf {leaf:#x}, sub-leaf {subleaf}, {register:?}: this host lacks {missing:#010x}")]
    Features {
        /// Number of the leaf.
        leaf: u32,
        /// Number of the sub-leaf.
        subleaf: u32,
        /// Which register.
        register: Register,
        /// The bits.
        missing: u32,
    },
}

/// Checks that `host` can do what `guest` was told that it can.
pub fn missing_features(guest: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Result<(), FeatureGap> {
    fn find(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
        entries.iter().find(|entry| (entry.function, entry.index) == (leaf, subleaf))
    }
    let vendor = |entries| find(entries, LEAF_VENDOR, 0).map(|entry| (entry.ebx, entry.ecx, entry.edx));
    if vendor(guest) != vendor(host) {
        return Err(FeatureGap::Vendor);
    }
    for (leaf, subleaf, register) in FEATURE_WORDS {
        let word = |entries| {
            find(entries, leaf, subleaf).map_or(0, |entry| match register {
                Register::Eax => entry.eax,
                Register::Ebx => entry.ebx,
                Register::Ecx => entry.ecx,
                Register::Edx => entry.edx,
            })
        };
        let missing = word(guest) & !word(host);
        if missing != 0 {
            return Err(FeatureGap::Features { leaf, subleaf, register, missing });
        }
    }
    Ok(())
}

/// Bits of an APIC identifier that tell the cores of the socket apart.
fn core_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

fn adapt(entry: &mut kvm_cpuid_entry2, vcpus: u32) {
    match entry.function {
        LEAF_FEATURES => {
            // KVM leaves the deadline timer to whoever makes the local APIC: it is in the kernel.
            entry.ecx |= ECX_HYPERVISOR | ECX_TSC_DEADLINE;
            if vcpus > 1 {
                entry.edx |= EDX_HYPER_THREADING;
            }
        }
        LEAF_INTEL_CACHES if entry.eax & 0x1f != 0 => {
            let cores = (1 << core_bits(vcpus)) - 1;
            entry.eax = entry.eax & 0x3fff | cache_sharing(entry.eax, vcpus) | u32::min(cores, 63) << 26;
        }
        LEAF_AMD_CACHES if entry.eax & 0x1f != 0 => {
            entry.eax = entry.eax & 0x3fff | cache_sharing(entry.eax, vcpus);
        }
        LEAF_AMD_SIZES => {
            entry.ecx = entry.ecx & !0xf0ff | core_bits(vcpus) << 12 | vcpus.saturating_sub(1);
        }
        // No performance counters: nothing in the guest needs them, and they tell about neighbours.
        LEAF_PERFORMANCE_COUNTERS => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        _ => {}
    }
}

/// Bits 14 to 25 of a cache leaf: identifiers that share the cache, less one. The third level is
/// the socket's, the others belong to a core.
fn cache_sharing(eax: u32, vcpus: u32) -> u32 {
    let level = (eax >> 5) & 7;
    if level < 3 { 0 } else { ((1 << core_bits(vcpus)) - 1) << 14 }
}

/// Leaf 0xb: level 0 is the thread within a core (one), level 1 the core within the socket.
fn topology(vcpus: u32) -> [kvm_cpuid_entry2; 3] {
    const LEVEL_THREAD: u32 = 1 << 8;
    const LEVEL_CORE: u32 = 2 << 8;
    let level = |index, eax, ebx, kind| kvm_cpuid_entry2 {
        function: LEAF_TOPOLOGY,
        index,
        flags: SIGNIFICANT_INDEX,
        eax,
        ebx,
        ecx: kind | index,
        ..Default::default()
    };
    [level(0, 0, 1, LEVEL_THREAD), level(1, core_bits(vcpus), vcpus, LEVEL_CORE), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_needs_each_feature_that_it_was_told_of_and_no_more() {
        let entry = |function, ecx| kvm_cpuid_entry2 { function, ecx, ..Default::default() };
        let with = |features| [entry(LEAF_VENDOR, 1), entry(LEAF_FEATURES, features)];
        assert_eq!(missing_features(&with(0b0110), &with(0b1110)), Ok(()));
        let gap = FeatureGap::Features { leaf: 1, subleaf: 0, register: Register::Ecx, missing: 0b0010 };
        assert_eq!(missing_features(&with(0b0110), &with(0b1100)), Err(gap));
        assert_eq!(missing_features(&with(0), &[entry(LEAF_VENDOR, 2)]), Err(FeatureGap::Vendor));
    }

    fn leaf(function: u32, eax: u32, ebx: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx, ecx, ..Default::default() }
    }

    fn intel(vcpus: u8) -> Template {
        let supported = [
            leaf(LEAF_VENDOR, 0x16, INTEL_EBX, 0),
            leaf(LEAF_FEATURES, 0, 0xffff_ffff, 0),
            leaf(LEAF_INTEL_CACHES, 0xffff_c000 | 3 << 5 | 3, 0, 0),
            leaf(LEAF_PERFORMANCE_COUNTERS, 7, 7, 7),
            leaf(LEAF_TOPOLOGY, 9, 9, 9),
            leaf(LEAF_HYPERVISOR, 0x4000_0001, 0, 0),
        ];
        Template::from_supported(&supported, vcpus)
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|it| it.function == function && it.index == index).expect("leaf")
    }

    #[test]
    fn each_processor_has_its_own_apic_identifier() {
        let template = intel(3);
        for index in 0..3 {
            let entries = template.entries_of(index);
            let features = find(&entries, LEAF_FEATURES, 0);
            assert_eq!(features.ebx, u32::from(index) << 24 | 4 << 16 | 0xffff);
            assert_eq!(features.ecx, ECX_HYPERVISOR | ECX_TSC_DEADLINE);
            assert_eq!(find(&entries, LEAF_TOPOLOGY, 1).edx, u32::from(index));
        }
    }

    #[test]
    fn three_cores_need_two_bits() {
        let entries = intel(3).entries_of(0);
        let core = find(&entries, LEAF_TOPOLOGY, 1);
        assert_eq!((core.eax, core.ebx, core.ecx), (2, 3, 0x201));
        let thread = find(&entries, LEAF_TOPOLOGY, 0);
        assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 0x100));
        let cache = find(&entries, LEAF_INTEL_CACHES, 0);
        assert_eq!((cache.eax >> 14 & 0xfff, cache.eax >> 26), (3, 3));
    }

    #[test]
    fn the_guest_is_told_its_clock_rates() {
        let mut template = intel(1);
        template.set_clock(2_600_000);
        let entries = template.entries_of(0);
        let tsc = find(&entries, LEAF_TSC, 0);
        let hertz = u64::from(tsc.ecx) * u64::from(tsc.ebx) / u64::from(tsc.eax);
        assert_eq!(hertz, 2_600_000_000);
        assert_eq!(find(&entries, LEAF_HYPERVISOR, 0).eax, LEAF_HYPERVISOR_CLOCK);
        assert_eq!(find(&entries, LEAF_HYPERVISOR_CLOCK, 0).eax, 2_600_000);
    }

    #[test]
    fn performance_counters_are_hidden() {
        let counters = find(&intel(1).entries_of(0), LEAF_PERFORMANCE_COUNTERS, 0);
        assert_eq!((counters.eax, counters.ebx, counters.ecx, counters.edx), (0, 0, 0, 0));
    }
}
