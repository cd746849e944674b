//! A machine from its first instruction to each of its ends, with guests of a few bytes.

mod support;

use support::{Code, DEBUG_PORT, EXIT_PORT, I8042_PORT, config, console, ended_within, run, wait};
use vmm::{ExitReason, Machine};

const SHUTDOWN: u8 = 4;
const PANICKED: u8 = 1;
const RESET: u8 = 0xfe;

#[test]
fn every_kind_of_kernel_prints_and_shuts_down() {
    need_kvm!();
    let code = Code::new().print("hello").out(EXIT_PORT, SHUTDOWN).spin();
    for (kind, kernel) in [("pvh", code.pvh()), ("elf", code.elf()), ("flat", code.flat())] {
        let (machine, reason) = run(kernel.path());
        assert_eq!(reason, ExitReason::Shutdown, "{kind}");
        assert_eq!(console(&machine), "hello", "{kind}");
    }
}

#[test]
fn a_reset_ends_the_machine() {
    need_kvm!();
    let (_, reason) = run(Code::new().out(I8042_PORT, RESET).spin().flat().path());
    assert_eq!(reason, ExitReason::Reset);
}

#[test]
fn a_triple_fault_ends_the_machine() {
    need_kvm!();
    let code = Code::new().triple_fault();
    for kernel in [code.pvh(), code.flat()] {
        let (_, reason) = run(kernel.path());
        assert_eq!(reason, ExitReason::TripleFault);
    }
}

#[test]
fn a_panic_ends_the_machine_with_what_the_console_says() {
    need_kvm!();
    let code =
        Code::new().print("[ 1.0] Kernel panic - not syncing: no luck today\r\n").out(EXIT_PORT, PANICKED).spin();
    let (_, reason) = run(code.flat().path());
    assert_eq!(reason, ExitReason::Panicked("no luck today".into()));
}

#[test]
fn stop_ends_a_guest_that_spins_and_one_that_sleeps() {
    need_kvm!();
    for code in [Code::new().spin(), Code::new().halt()] {
        let kernel = code.flat();
        let machine = Machine::build(config(kernel.path())).expect("build");
        machine.start().expect("start");
        assert!(!ended_within(&machine, 50));
        assert_eq!(machine.exit_reason(), None);
        machine.stop();
        machine.stop();
        assert_eq!(machine.wait(), ExitReason::Stopped);
        assert!(machine.start().is_err());
        assert!(machine.pause().is_err());
    }
}

#[test]
fn a_machine_that_never_ran_can_be_dropped() {
    need_kvm!();
    let kernel = Code::new().spin().flat();
    drop(Machine::build(config(kernel.path())).expect("build"));
}

#[test]
fn the_stations_of_the_start_are_in_order() {
    need_kvm!();
    let code = Code::new().out(DEBUG_PORT, 0x41).out(EXIT_PORT, SHUTDOWN).spin();
    let kernel = code.flat();
    let machine = Machine::build(config(kernel.path())).expect("build");
    let created = machine.trace().vm_created().expect("T1");
    assert_eq!(machine.trace().first_run(), None);
    machine.start().expect("start");
    wait(&machine);
    let first_run = machine.trace().first_run().expect("T2");
    let init = machine.trace().guest_init().expect("T3");
    assert!(created < first_run && first_run < init);
    println!("T2 - T1 = {} us, T3 - T2 = {} us", (first_run - created) / 1000, (init - first_run) / 1000);
}
