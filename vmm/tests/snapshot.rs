//! Machines that are saved, and go on in other machines.

mod support;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use support::virtio::{PAGE, bring_up, request, see_above};
use support::{Code, ELF_BASE, EXIT_PORT, chain, config, console, wait};
use vmm::{ExitReason, Machine, MachineConfig, MemoryConfig, RestoreMemory, RngConfig, VsockConfig};

const SHUTDOWN: u8 = 4;
/// Where the counting guest counts, and what it waits for before it ends.
const COUNTER: u32 = 0x20_0000;
const LEAVE: u32 = 0x20_1000;

/// Counts in memory until the word at [`LEAVE`] is set, then prints `done` and shuts down; in 32-bit mode.
fn counter() -> Code {
    let code = Code::new().print("up ");
    // inc dword [COUNTER]; cmp word [LEAVE], 1; jne -17
    let code = code.bytes(&[0xff, 0x05]).bytes(&COUNTER.to_le_bytes());
    let code = code.bytes(&[0x66, 0x83, 0x3d]).bytes(&LEAVE.to_le_bytes()).bytes(&[1, 0x75, 0xf0]);
    code.print("done").out(EXIT_PORT, SHUTDOWN).halt()
}

fn printed(machine: &Machine, text: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !console(machine).contains(text) {
        assert!(Instant::now() < deadline, "{:?}", console(machine));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The word at `address` of the memory file.
fn saved_word(directory: &Path, address: u32) -> u32 {
    let mut bytes = [0; 4];
    let file = fs::File::open(directory.join("memory")).expect("memory");
    file.read_exact_at(&mut bytes, address.into()).expect("read");
    u32::from_le_bytes(bytes)
}

/// Changes a word of the memory file, as nobody but a test does: the guest that is restored sees it.
fn poke(directory: &Path, address: u32, value: u32) {
    let file = fs::OpenOptions::new().write(true).open(directory.join("memory")).expect("memory");
    file.write_all_at(&value.to_le_bytes(), address.into()).expect("write");
}

/// A machine that counts, saved in `directory` after it has begun.
fn saved(directory: &Path, adapt: impl FnOnce(&mut MachineConfig)) -> Machine {
    let kernel = counter().pvh();
    let mut config = config(kernel.path());
    adapt(&mut config);
    let machine = Machine::build(config).expect("build");
    machine.start().expect("start");
    printed(&machine, "up ");
    machine.snapshot(directory).expect("snapshot");
    machine
}

/// Lets a machine run until it has counted further than `from`, and saves it in `directory`.
fn goes_on(machine: &Machine, directory: &Path, from: u32) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        machine.resume().expect("resume");
        std::thread::sleep(Duration::from_millis(1));
        machine.snapshot(directory).expect("snapshot");
        if saved_word(directory, COUNTER) > from {
            return;
        }
        assert!(Instant::now() < deadline, "the guest stands still");
    }
}

fn restore_config() -> MachineConfig {
    config(Path::new("/no kernel is needed"))
}

fn refused(config: MachineConfig, directory: &Path) -> String {
    chain(&Machine::restore(config, directory).expect_err("refused"))
}

#[test]
fn a_guest_goes_on_where_it_was_and_so_does_the_one_that_was_saved() {
    need_kvm!();
    let directory = tempfile::tempdir().expect("directory");
    let original = saved(directory.path(), |_| {});
    let first = saved_word(directory.path(), COUNTER);
    assert!(first > 0);
    // Twice of a paused machine: the same, but for nothing.
    let again = tempfile::tempdir().expect("directory");
    original.snapshot(again.path()).expect("snapshot");
    assert_eq!(saved_word(again.path(), COUNTER), first);
    goes_on(&original, again.path(), first);
    drop(original);
    // The restored one counts on from there, prints nothing twice, and ends when it is told to.
    let restored = Machine::restore(restore_config(), directory.path()).expect("restore");
    assert_eq!(console(&restored), "");
    goes_on(&restored, again.path(), first);
    drop(restored);
    poke(again.path(), LEAVE, 1);
    let last = Machine::restore(restore_config(), again.path()).expect("restore");
    last.start().expect("start");
    assert_eq!(wait(&last), ExitReason::Shutdown);
    assert_eq!(console(&last), "done");
}

#[test]
fn many_machines_are_restored_from_one_directory_at_a_time() {
    need_kvm!();
    let directory = tempfile::tempdir().expect("directory");
    drop(saved(directory.path(), |_| {}));
    poke(directory.path(), LEAVE, 1);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let machine = Machine::restore(restore_config(), directory.path()).expect("restore");
                machine.start().expect("start");
                assert_eq!(wait(&machine), ExitReason::Shutdown);
                assert_eq!(console(&machine), "done");
            });
        }
    });
    // What they wrote is theirs.
    assert_eq!(saved_word(directory.path(), LEAVE), 1);
}

/// By the pages of a start before.
#[test]
fn what_a_guest_writes_to_is_copied_before_it_does() {
    need_kvm!();
    let (directory, again) = (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
    drop(saved(directory.path(), |_| {}));
    let first = saved_word(directory.path(), COUNTER);
    let machine = Machine::restore(restore_config(), directory.path()).expect("restore");
    assert!(machine.written_memory().expect("pages").is_empty());
    assert_eq!(machine.copy_ahead().expect("nothing is expected"), 0);
    goes_on(&machine, again.path(), first);
    let written = machine.written_memory().expect("pages");
    drop(machine);
    let page = u64::from(COUNTER);
    assert!(written.ranges().any(|range| range.contains(&page)) && written.bytes() < 1 << 20, "{written:?}");

    let mapped = RestoreMemory::Mapped { written: Some(written.clone()) };
    let machine = Machine::restore_with(restore_config(), directory.path(), mapped).expect("restore");
    assert!(machine.written_memory().expect("pages").is_empty());
    match machine.copy_ahead() {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            println!("skipped: the host's kernel has no MADV_POPULATE_WRITE");
            return;
        }
        copied => assert_eq!(copied.expect("copy"), written.bytes()),
    }
    assert_eq!(machine.written_memory().expect("pages"), written);
    assert_eq!((machine.copy_ahead().expect("once"), machine.copied_ahead()), (0, written.bytes()));
    // It has what the template has, and the guest goes on in it.
    goes_on(&machine, again.path(), first);
    assert_eq!(saved_word(directory.path(), COUNTER), first);
    machine.stop();
    assert_eq!(machine.copy_ahead().expect("nothing is left"), 0);
    machine.written_memory().expect_err("no memory is left");
}

#[test]
fn several_processors_and_devices_come_back() {
    need_kvm!();
    let directory = tempfile::tempdir().expect("directory");
    let adapt = |config: &mut MachineConfig| {
        config.vcpus = 3;
        config.rng = Some(RngConfig::default());
        config.vsock = Some(VsockConfig { guest_cid: 3, uds_path: None });
    };
    drop(saved(directory.path(), adapt));
    poke(directory.path(), LEAVE, 1);
    let mut config = restore_config();
    adapt(&mut config);
    let machine = Machine::restore(config, directory.path()).expect("restore");
    machine.start().expect("start");
    assert_eq!(wait(&machine), ExitReason::Shutdown);
}

#[test]
fn pages_of_zeros_take_no_place() {
    need_kvm!();
    let directory = tempfile::tempdir().expect("directory");
    drop(saved(directory.path(), |_| {}));
    let memory = fs::metadata(directory.path().join("memory")).expect("memory");
    assert_eq!(memory.len(), 128 << 20);
    assert!(memory.blocks() * 512 < 1 << 20, "{} bytes on the disk", memory.blocks() * 512);
    assert_eq!(memory.mode() & 0o777, 0o600);
    vmm::snapshot::verify(directory.path()).expect("sound");
}

#[test]
fn what_does_not_fit_is_refused_with_its_name() {
    need_kvm!();
    let directory = tempfile::tempdir().expect("directory");
    drop(saved(directory.path(), |config| config.rng = Some(RngConfig::default())));
    let with = |adapt: &dyn Fn(&mut MachineConfig)| {
        let mut config = restore_config();
        config.rng = Some(RngConfig::default());
        adapt(&mut config);
        config
    };
    let refuses = |adapt: &dyn Fn(&mut MachineConfig), words: &str| {
        let said = refused(with(adapt), directory.path());
        assert!(said.contains(words), "{said}");
    };
    refuses(&|config| config.vcpus = 2, "1 vCPUs");
    refuses(&|config| config.memory = MemoryConfig::from_mib(64), "134217728 bytes of memory");
    refuses(&|config| config.rng = None, "1 virtio devices");
    refuses(&|config| config.vsock = Some(VsockConfig { guest_cid: 3, uds_path: None }), "type 4");
    drop(Machine::restore(with(&|_| {}), directory.path()).expect("restore"));
    let nothing = tempfile::tempdir().expect("directory");
    assert!(refused(restore_config(), nothing.path()).contains("manifest"));
}

#[test]
fn damage_is_found() {
    need_kvm!();
    let directory = tempfile::tempdir().expect("directory");
    drop(saved(directory.path(), |_| {}));
    let path = |name: &str| directory.path().join(name);
    let state = fs::read(path("state")).expect("state");
    for (position, words) in [(0, "damaged"), (state.len() / 2, "damaged"), (state.len() - 1, "damaged")] {
        let mut flipped = state.clone();
        flipped[position] ^= 1;
        fs::write(path("state"), &flipped).expect("write");
        let said = refused(restore_config(), directory.path());
        assert!(said.contains(words), "{said}");
    }
    fs::write(path("state"), &state[..state.len() - 1]).expect("write");
    assert!(refused(restore_config(), directory.path()).contains("bytes where the manifest says"));
    fs::write(path("state"), &state).expect("write");

    poke(directory.path(), u32::try_from(ELF_BASE).expect("low"), 0);
    let said = vmm::snapshot::verify(directory.path()).expect_err("damaged").to_string();
    assert!(said.contains("damaged in the 1048576 bytes from 0x100000"), "{said}");
    let memory = fs::OpenOptions::new().write(true).open(path("memory")).expect("memory");
    memory.set_len((128 << 20) - 4096).expect("cut");
    assert!(refused(restore_config(), directory.path()).contains("134213632 bytes where the manifest says"));

    let manifest = fs::read_to_string(path("manifest")).expect("manifest");
    fs::write(path("manifest"), manifest.replace("\"format\": 2", "\"format\": 3")).expect("write");
    assert!(refused(restore_config(), directory.path()).contains("format 3"));
}

/// What a guest asks a device for after it was restored is its own, and so is what it had asked for before.
#[test]
fn clones_have_entropy_of_their_own() {
    need_kvm!();
    let directory = tempfile::tempdir().expect("directory");
    let code = bring_up(see_above(), 0, 0, &[0]).print("up");
    // mov dx, 0x3fd; in al, dx; test al, 1; jz -9: until there is input.
    let code = code.bytes(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7]);
    let code = request(code, 0, 0, 0, &[(PAGE.into(), 32, true)]).print_memory(PAGE, 32);
    let kernel = code.out(EXIT_PORT, SHUTDOWN).halt().flat();
    let with_rng = |kernel: &Path| {
        let mut config = config(kernel);
        config.rng = Some(RngConfig::default());
        config
    };
    let template = Machine::build(with_rng(kernel.path())).expect("build");
    template.start().expect("start");
    printed(&template, "up");
    template.snapshot(directory.path()).expect("snapshot");
    drop(template);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..8 {
        let clone = Machine::restore(with_rng(Path::new("")), directory.path()).expect("restore");
        clone.start().expect("start");
        assert_eq!(clone.console_input(b"x"), 1);
        assert_eq!(wait(&clone), ExitReason::Shutdown);
        let bytes = clone.console_tail();
        assert_eq!(bytes.len(), 32);
        assert!(seen.insert(bytes), "two clones have the same entropy");
    }
}

/// How long a restore takes, and to the guest's first instruction. Printed, not judged: run with `--nocapture`.
#[test]
fn a_restore_does_not_read_memory() {
    need_kvm!();
    let directory = tempfile::tempdir().expect("directory");
    drop(saved(directory.path(), |_| {}));
    poke(directory.path(), LEAVE, 1);
    let mut times = Vec::new();
    for _ in 0..20 {
        let begin = Instant::now();
        let machine = Machine::restore(restore_config(), directory.path()).expect("restore");
        let restored = begin.elapsed();
        machine.start().expect("start");
        assert_eq!(wait(&machine), ExitReason::Shutdown);
        times.push((restored, begin.elapsed()));
    }
    times.sort();
    println!("median restore {:?}, to the guest's end {:?}", times[10].0, times[10].1);
}
