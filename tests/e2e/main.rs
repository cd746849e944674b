//! End-to-end tests: containers through real containerd, and machines by their command line, on a host with KVM.
//!
//! Run by `nested-host test`, one at a time. Whatever both runtimes must do is tested with both:
//! a test that fails with runc is wrong itself.

/// Makes a test for each runtime of each named function, which takes a `&Scene`.
macro_rules! for_both_runtimes {
    ($($test:ident),+ $(,)?) => {
        mod runc {
            $(#[test] fn $test() { inlay_tests::harness::play(inlay_tests::harness::Runtime::Runc, super::$test); })+
        }
        mod inlay {
            $(#[test] fn $test() { inlay_tests::harness::play(inlay_tests::harness::Runtime::Inlay, super::$test); })+
        }
    };
}
use for_both_runtimes;

/// Makes a test for Inlay of each named function, which takes a `&Scene`.
macro_rules! for_inlay {
    ($($test:ident),+ $(,)?) => {
        mod inlay {
            $(#[test] fn $test() { inlay_tests::harness::play(inlay_tests::harness::Runtime::Inlay, super::$test); })+
        }
    };
}
use for_inlay;

/// Makes a test of each named function, which takes a `&Rig`: machines without containers.
macro_rules! on_a_rig {
    ($($test:ident),+ $(,)?) => {
        mod rig {
            $(#[test] fn $test() { inlay_tests::harness::standalone::play(super::$test); })+
        }
    };
}
use on_a_rig;

mod config;
mod containers;
mod faults;
mod files;
mod guest;
mod host;
mod image;
mod machine;
mod metrics;
mod privileges;
mod processes;
mod stdio;
mod templates;
