//! The device status register as a state machine (virtio 1.2 section 2.1 and 3.1.1).

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};

/// How far the driver has brought the device. The order is the order of section 3.1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Nothing happened since the reset.
    Reset,
    /// The guest has seen the device.
    Acknowledged,
    /// The guest has a driver for it; features are being negotiated.
    Driver,
    /// Features are final; queues are being set up.
    FeaturesOk,
    /// The device works; queues are frozen.
    DriverOk,
}

impl Phase {
    fn bits(self) -> u32 {
        let reached = |phase, bit| if self >= phase { bit } else { 0 };
        reached(Self::Acknowledged, VIRTIO_CONFIG_S_ACKNOWLEDGE)
            | reached(Self::Driver, VIRTIO_CONFIG_S_DRIVER)
            | reached(Self::FeaturesOk, VIRTIO_CONFIG_S_FEATURES_OK)
            | reached(Self::DriverOk, VIRTIO_CONFIG_S_DRIVER_OK)
    }

    fn next(self) -> Option<Self> {
        match self {
            Self::Reset => Some(Self::Acknowledged),
            Self::Acknowledged => Some(Self::Driver),
            Self::Driver => Some(Self::FeaturesOk),
            Self::FeaturesOk => Some(Self::DriverOk),
            Self::DriverOk => None,
        }
    }
}

/// The device status register, without `DEVICE_NEEDS_RESET`, which is the device's to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    phase: Phase,
    failed: bool,
}

/// What a write to the status register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// Start over.
    Reset,
    /// One step forward.
    Advance(Phase),
    /// The driver gives up.
    Fail,
    /// Nothing, or something that the specification does not allow.
    None,
}

impl Status {
    /// The state after a reset.
    pub const RESET: Self = Self { phase: Phase::Reset, failed: false };

    /// The state after a step of the driver.
    pub fn at(phase: Phase) -> Self {
        Self { phase, failed: false }
    }

    /// This state after the driver gave up.
    pub fn failed(self) -> Self {
        Self { failed: true, ..self }
    }

    /// Whether the driver is in `phase` and has not given up.
    pub fn is(self, phase: Phase) -> bool {
        self == Self::at(phase)
    }

    /// Whether a driver is at work.
    pub fn has_driver(self) -> bool {
        !self.failed && self.phase >= Phase::Driver
    }

    /// Whether features are final.
    pub fn has_features(self) -> bool {
        self.phase >= Phase::FeaturesOk
    }

    /// The state in which the register has the value `bits`, if there is one.
    pub fn from_bits(bits: u32) -> Option<Self> {
        let phases = [Phase::Reset, Phase::Acknowledged, Phase::Driver, Phase::FeaturesOk, Phase::DriverOk];
        let states = phases.into_iter().flat_map(|phase| [Self::at(phase), Self::at(phase).failed()]);
        states.into_iter().find(|state| state.bits() == bits)
    }

    /// The register's value.
    pub fn bits(self) -> u32 {
        self.phase.bits() | if self.failed { VIRTIO_CONFIG_S_FAILED } else { 0 }
    }

    /// What the driver means by writing `written`. The only allowed writes are 0 and the present
    /// value with one more bit (section 2.1.1: a driver clears no bit).
    pub fn transition(self, written: u32) -> Transition {
        if written == 0 {
            return Transition::Reset;
        }
        // A driver that adds a bit to what it read may carry this one along.
        let written = written & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if self.failed {
            return Transition::None;
        }
        if written == self.failed().bits() {
            return Transition::Fail;
        }
        match self.phase.next() {
            Some(next) if written == next.bits() => Transition::Advance(next),
            _ => Transition::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHASES: [(Phase, u32); 5] = [
        (Phase::Reset, 0x00),
        (Phase::Acknowledged, 0x01),
        (Phase::Driver, 0x03),
        (Phase::FeaturesOk, 0x0b),
        (Phase::DriverOk, 0x0f),
    ];

    #[test]
    fn only_three_writes_mean_something_in_each_phase() {
        for (index, (phase, bits)) in PHASES.into_iter().enumerate() {
            let status = Status::at(phase);
            assert_eq!(status.bits(), bits);
            for written in 0..=0xff_u32 {
                let expected = match written & !0x40 {
                    _ if written == 0 => Transition::Reset,
                    value if value == bits | 0x80 => Transition::Fail,
                    value if PHASES.get(index + 1).is_some_and(|next| next.1 == value) => {
                        Transition::Advance(PHASES[index + 1].0)
                    }
                    _ => Transition::None,
                };
                assert_eq!(status.transition(written), expected, "{phase:?} {written:#x}");
            }
        }
    }

    #[test]
    fn a_failed_device_takes_nothing_but_a_reset() {
        for (phase, bits) in PHASES {
            let status = Status::at(phase).failed();
            assert_eq!(status.bits(), bits | 0x80);
            for written in 1..=0xff_u32 {
                assert_eq!(status.transition(written), Transition::None);
            }
            assert_eq!(status.transition(0), Transition::Reset);
        }
    }

    #[test]
    fn a_status_is_read_back_from_its_bits_and_from_no_others() {
        let possible: Vec<u32> = PHASES.into_iter().flat_map(|(_, bits)| [bits, bits | 0x80]).collect();
        for bits in 0..=0x1ff_u32 {
            let status = Status::from_bits(bits);
            assert_eq!(status.is_some(), possible.contains(&bits), "{bits:#x}");
            assert!(status.is_none_or(|status| status.bits() == bits));
        }
    }

    #[test]
    fn bits_beyond_the_low_byte_mean_nothing() {
        assert_eq!(Status::RESET.transition(0x101), Transition::None);
    }
}
