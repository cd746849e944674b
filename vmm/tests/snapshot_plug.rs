//! Machines that are saved before memory is plugged into them, and get it after they were restored.

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use support::virtio::{ABOVE, BLOCK, LongMode, PLUG, SEEN, UNPLUG, bring_up, first_block, see_above};
use support::{Code, EXIT_PORT, chain, config, console, wait};
use vmm::memory::uffd::Uffd;
use vmm::{ExitReason, LazyConfig, Machine, MachineConfig, MemConfig, RestoreMemory};

const SHUTDOWN: u8 = 4;

/// Brings its memory device up, and at each of three characters of input plugs its first block, unplugs it, and plugs it again. It prints
/// what is in there when it has it, four bytes, and writes there.
fn plugger() -> tempfile::NamedTempFile {
    let code = awaits_input(bring_up(see_above(), 0, 2, &[0]).print("up "));
    let code = first_block(code, 0, 0, PLUG).print_memory(SEEN, 4).put(SEEN, 0x6b63_6f6c).print_memory(SEEN, 4);
    let code = first_block(awaits_input(code.print(" it ")), 0, 1, UNPLUG);
    let code = first_block(awaits_input(code.print("gone ")), 0, 2, PLUG).print_memory(SEEN, 4);
    code.print(" back").out(EXIT_PORT, SHUTDOWN).halt().flat()
}

fn awaits_input(code: Code) -> Code {
    // mov dx, 0x3fd; in al, dx; test al, 1; jz -9; mov dx, 0x3f8; in al, dx
    code.bytes(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0x66, 0xba, 0xf8, 0x03, 0xec])
}

fn pluggable(requested: u64) -> MemConfig {
    MemConfig { size: 64 * BLOCK, block_size: BLOCK, requested, node: 0 }
}

fn configured(kernel: &Path, pluggable: MemConfig) -> MachineConfig {
    let mut config = config(kernel);
    config.pluggable = Some(pluggable);
    config
}

fn started(requested: u64) -> Machine {
    let machine = Machine::build(configured(plugger().path(), pluggable(requested))).expect("build");
    machine.start().expect("start");
    printed(&machine, "up ");
    machine
}

fn restore_config() -> MachineConfig {
    configured(Path::new("/no kernel is needed"), pluggable(0))
}

fn printed(machine: &Machine, text: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !console(machine).ends_with(text) {
        assert!(Instant::now() < deadline, "{:?}", console(machine));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Plugs a block of a machine whose guest waits for that, and takes it back.
fn has_it_for_a_while(machine: &Machine) {
    let memory = machine.pluggable_memory().expect("pluggable memory");
    assert_eq!((memory.plugged(), memory.address()), (0, ABOVE));
    memory.set_requested(BLOCK).expect("a block");
    assert_eq!(machine.console_input(b"x"), 1);
    printed(machine, "\0\0\0\0lock it ");
    assert_eq!(memory.plugged(), BLOCK);
    memory.set_requested(0).expect("no block");
    assert_eq!(machine.console_input(b"x"), 1);
    printed(machine, "gone ");
    assert_eq!(memory.plugged(), 0);
}

/// And plugs it again, which is the guest's last deed.
fn gets_it_again(machine: &Machine) {
    machine.pluggable_memory().expect("pluggable memory").set_requested(BLOCK).expect("a block");
    assert_eq!(machine.console_input(b"x"), 1);
    assert_eq!(wait(machine), ExitReason::Shutdown);
    assert!(console(machine).ends_with("\0\0\0\0 back"), "{:?}", console(machine));
}

#[test]
fn each_clone_gets_memory_of_its_own() {
    need_kvm!();
    let directory = tempfile::tempdir().expect("directory");
    let template = started(0);
    template.snapshot(directory.path()).expect("snapshot");
    template.resume().expect("resume");
    let clones = [0, 1].map(|_| Machine::restore(restore_config(), directory.path()).expect("restore"));
    for machine in clones.iter().chain([&template]) {
        if !std::ptr::eq(machine, &template) {
            machine.start().expect("start");
        }
        has_it_for_a_while(machine);
    }
    for machine in clones.iter().chain([&template]) {
        gets_it_again(machine);
    }
}

/// Which is no longer in the clone's file of memory than it was in the template's.
#[test]
fn a_clone_whose_blocks_are_gone_again_is_saved_whole_or_as_a_difference() {
    need_kvm!();
    let [base, whole, difference] = [0; 3].map(|_| tempfile::tempdir().expect("directory"));
    drop({
        let template = started(0);
        template.snapshot(base.path()).expect("snapshot");
        template
    });
    let clone = Machine::restore(restore_config(), base.path()).expect("restore");
    clone.track_writes().expect("track");
    clone.start().expect("start");
    has_it_for_a_while(&clone);
    clone.snapshot_diff(difference.path(), base.path()).expect("difference");
    clone.resume().expect("resume");
    clone.snapshot_live(whole.path()).expect("live");
    drop(clone);
    for directory in [&whole, &difference] {
        let machine = Machine::restore(restore_config(), directory.path()).expect("restore");
        machine.start().expect("start");
        gets_it_again(&machine);
    }
}

#[test]
fn memory_is_plugged_where_the_rest_comes_page_by_page() {
    need_kvm!();
    if let Err(error) = Uffd::open() {
        println!("skipped: {error}");
        return;
    }
    let directory = tempfile::tempdir().expect("directory");
    started(0).snapshot(directory.path()).expect("snapshot");
    let how = RestoreMemory::Lazy(LazyConfig::default());
    let machine = Machine::restore_with(restore_config(), directory.path(), how).expect("restore");
    machine.start().expect("start");
    has_it_for_a_while(&machine);
    gets_it_again(&machine);
}

#[test]
fn what_is_plugged_or_wanted_or_another_region_is_refused_by_sentence() {
    need_kvm!();
    let directory = tempfile::tempdir().expect("directory");
    let machine = started(BLOCK);
    let refused = |words: &str| {
        let said = chain(&machine.snapshot(directory.path()).expect_err("refused"));
        assert_eq!(
            said,
            format!("Device 0 cannot be saved: The pluggable memory cannot be saved while the guest {words}")
        );
        machine.resume().expect("resume");
        let said = chain(&machine.snapshot_live(directory.path()).expect_err("refused"));
        assert!(said.ends_with(words), "{said}");
    };
    refused("is asked to have some of it");
    assert_eq!(machine.console_input(b"x"), 1);
    printed(&machine, " it ");
    machine.pluggable_memory().expect("pluggable memory").set_requested(0).expect("none");
    refused("has some of it");
    assert_eq!(machine.console_input(b"x"), 1);
    printed(&machine, "gone ");
    machine.snapshot(directory.path()).expect("snapshot");
    drop(machine);

    let refuses = |config: MachineConfig, words: &str| {
        let said = chain(&Machine::restore(config, directory.path()).expect_err("refused"));
        assert!(said.contains(words), "{said}");
    };
    let larger = MemConfig { size: 65 * BLOCK, ..pluggable(0) };
    refuses(configured(Path::new(""), larger), "has 136314880 bytes, the one in the snapshot has 134217728");
    let coarser = MemConfig { block_size: 2 * BLOCK, ..pluggable(0) };
    refuses(configured(Path::new(""), coarser), "4194304 as the size of its blocks");
    refuses(config(Path::new("")), "1 virtio devices");
}
