//! The boot segments, in the two forms that are needed: descriptors in guest memory and the
//! hidden parts of the segment registers that KVM takes.

use kvm_bindings::kvm_segment;

/// A segment descriptor (Intel SDM volume 3, section 3.4.5), flat: base 0.
#[derive(Clone, Copy)]
pub struct Descriptor {
    /// Access byte: type, S, DPL, P.
    access: u8,
    /// AVL, L, D/B and G in the low four bits.
    flags: u8,
    /// Limit, 20 bits.
    limit: u32,
}

/// Code, 32 bits, 4 GiB.
pub const CODE_32: Descriptor = Descriptor { access: 0x9b, flags: 0xc, limit: 0xf_ffff };
/// Code, 64 bits.
pub const CODE_64: Descriptor = Descriptor { access: 0x9b, flags: 0xa, limit: 0xf_ffff };
/// Data, 4 GiB.
pub const DATA: Descriptor = Descriptor { access: 0x93, flags: 0xc, limit: 0xf_ffff };
/// Task state, busy: VM entry wants one loaded.
pub const TASK: Descriptor = Descriptor { access: 0x8b, flags: 0x0, limit: 0x67 };

impl Descriptor {
    /// The eight bytes that stand in a descriptor table.
    pub fn table_entry(self) -> u64 {
        let limit = u64::from(self.limit);
        (limit & 0xffff)
            | u64::from(self.access) << 40
            | ((limit >> 16) & 0xf) << 48
            | u64::from(self.flags & 0xf) << 52
    }

    /// The register content after loading entry `index` of the table.
    pub fn segment(self, index: u16) -> kvm_segment {
        let bit = |byte: u8, n: u8| (byte >> n) & 1;
        kvm_segment {
            base: 0,
            limit: if bit(self.flags, 3) == 1 { self.limit << 12 | 0xfff } else { self.limit },
            selector: index * 8,
            type_: self.access & 0xf,
            s: bit(self.access, 4),
            dpl: (self.access >> 5) & 3,
            present: bit(self.access, 7),
            avl: bit(self.flags, 0),
            l: bit(self.flags, 1),
            db: bit(self.flags, 2),
            g: bit(self.flags, 3),
            unusable: 0,
            padding: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_have_the_well_known_encodings() {
        assert_eq!(CODE_32.table_entry(), 0x00cf_9b00_0000_ffff);
        assert_eq!(CODE_64.table_entry(), 0x00af_9b00_0000_ffff);
        assert_eq!(DATA.table_entry(), 0x00cf_9300_0000_ffff);
        assert_eq!(TASK.table_entry(), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn a_flat_segment_covers_four_gib() {
        let code = CODE_32.segment(1);
        assert_eq!((code.selector, code.limit, code.type_), (8, u32::MAX, 0xb));
        assert_eq!((code.present, code.s, code.db, code.l, code.g), (1, 1, 1, 0, 1));
        let task = TASK.segment(3);
        assert_eq!((task.limit, task.s, task.g, task.type_), (0x67, 0, 0, 0xb));
    }
}
