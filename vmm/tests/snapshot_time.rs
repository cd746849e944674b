//! What time it is for a guest that was away: it goes on where it was.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use support::{Code, EXIT_PORT, config, console, wait};
use vmm::snapshot::{MachineState, STATE, codec};
use vmm::{ExitReason, Machine};

const SHUTDOWN: u8 = 4;
/// KVM's registers have numbers of their own; this one says where the guest wants its clock.
const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Where the guest has its clock.
const CLOCK: u32 = 0x20_0000;
/// In the clock's flags: the guest did not run for a while, and its watchdog should not be cross.
const GUEST_STOPPED: u8 = 2;
/// How long a machine runs between looks at its clock.
const RUN: Duration = Duration::from_millis(10);
/// How long a machine is away.
const AWAY: Duration = Duration::from_millis(1500);

/// `mov ecx, register; mov eax, value; xor edx, edx; wrmsr`
fn write_register(code: Code, register: u32, value: u32) -> Code {
    let code = code.bytes(&[0xb9]).bytes(&register.to_le_bytes()).bytes(&[0xb8]).bytes(&value.to_le_bytes());
    code.bytes(&[0x31, 0xd2, 0x0f, 0x30])
}

fn start(code: Code, says: &str) -> Machine {
    let kernel = code.pvh();
    let machine = Machine::build(config(kernel.path())).expect("build");
    machine.start().expect("start");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !console(&machine).contains(says) {
        assert!(Instant::now() < deadline, "{:?}", console(&machine));
        std::thread::yield_now();
    }
    machine
}

fn restored(directory: &Path) -> Machine {
    Machine::restore(config(Path::new("/no kernel is needed")), directory).expect("restore")
}

fn state(directory: &Path) -> MachineState {
    codec::decode(&std::fs::read(directory.join(STATE)).expect("state")).expect("decode")
}

/// A `pvclock_vcpu_time_info`: the time in nanoseconds when KVM wrote it, and its flags.
fn clock(directory: &Path) -> (u64, u8) {
    let mut bytes = [0; 32];
    let memory = File::open(directory.join("memory")).expect("memory");
    memory.read_exact_at(&mut bytes, CLOCK.into()).expect("read");
    let time = bytes[16..24].try_into().expect("8 bytes");
    (u64::from_le_bytes(time), bytes[29])
}

/// Firecracker's issues 5494, 5738, 5809: a clock that jumps, a watchdog that is not told, registers that are lost.
#[test]
fn the_guests_clock_goes_on_where_it_was_and_never_back() {
    need_kvm!();
    let directory = tempfile::tempdir().expect("directory");
    let code = write_register(Code::new(), MSR_KVM_SYSTEM_TIME_NEW, CLOCK | 1).print("up").spin();
    let machine = start(code, "up");
    machine.snapshot(directory.path()).expect("snapshot");
    drop(machine);
    let saved = state(directory.path()).clock.clock;
    let (first, flags) = clock(directory.path());
    assert!(first > 0 && first <= saved, "{first} {saved}");
    assert_eq!(flags & GUEST_STOPPED, 0);
    sleep(AWAY);
    let again = tempfile::tempdir().expect("directory");
    let machine = restored(directory.path());
    let begin = Instant::now();
    machine.start().expect("start");
    let deadline = begin + Duration::from_secs(20);
    let (second, flags) = loop {
        // KVM writes it when a processor enters the guest, which one that is stopped at once may never do.
        sleep(RUN);
        machine.snapshot(again.path()).expect("snapshot");
        if clock(again.path()).0 != first {
            break clock(again.path());
        }
        assert!(Instant::now() < deadline, "KVM does not write the clock any more");
        machine.resume().expect("resume");
    };
    let ran = u64::try_from(begin.elapsed().as_nanos()).expect("short");
    assert!(second >= saved, "{second} is before {saved}");
    let away = u64::try_from(AWAY.as_nanos()).expect("short");
    assert!(second < saved + ran + away / 2, "{} ns were added to {ran}", second - saved);
    assert_eq!(flags & GUEST_STOPPED, GUEST_STOPPED);
}

/// Firecracker's issues 4666 and 4618: a deadline that is lost since the time is set after it, or that is 0.
#[test]
fn a_timer_that_was_set_fires_after_the_restore() {
    need_kvm!();
    let directory = tempfile::tempdir().expect("directory");
    // The local APIC on, its timer in deadline mode with vector 0x20, which nobody takes: it stays requested.
    let code = Code::new().store(0xfee0_00f0, 0x1ff).store(0xfee0_0320, 0x4_0020);
    // rdtsc; add edx, 1; mov ecx, IA32_TSC_DEADLINE; wrmsr: 2^32 cycles from now.
    let code = code.bytes(&[0x0f, 0x31, 0x83, 0xc2, 0x01, 0xb9]).bytes(&IA32_TSC_DEADLINE.to_le_bytes());
    let code = code.bytes(&[0x0f, 0x30]).print("armed");
    // test dword [0xfee00210], 1; jz -12
    let code = code.bytes(&[0xf7, 0x05, 0x10, 0x02, 0xe0, 0xfe, 0x01, 0x00, 0x00, 0x00, 0x74, 0xf4]);
    let machine = start(code.print("fired").out(EXIT_PORT, SHUTDOWN).halt(), "armed");
    machine.snapshot(directory.path()).expect("snapshot");
    assert_eq!(console(&machine), "armed");
    drop(machine);
    // The deadline passes while nobody is there to see it: the guest's own time has stood still.
    sleep(AWAY);
    for _ in 0..2 {
        let machine = restored(directory.path());
        machine.start().expect("start");
        assert_eq!(wait(&machine), ExitReason::Shutdown);
        assert_eq!(console(&machine), "fired");
    }
}
