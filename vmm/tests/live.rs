//! Machines that are saved while their guests run.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use support::virtio::{LongMode, REQUEST, bring_up, request, see_above};
use support::{Code, EXIT_PORT, chain, config, console, wait};
use vmm::memory::uffd::Uffd;
use vmm::snapshot::{Manifest, SnapshotError, verify};
use vmm::{
    BalloonConfig, Copied, ExitReason, LazyConfig, LiveSnapshot, Machine, MachineConfig, MemoryBacking, MemoryConfig,
    Placement, RestoreMemory,
};

const SHUTDOWN: u8 = 4;
/// Where the guest puts its numbers, one to a page.
const DATA: u32 = 0x40_0000;
const PAGES: u32 = 16 << 8;
const LEAVE: u32 = 0x20_1000;

/// Ends the test unless it can run guests whose writes it lets wait.
macro_rules! need_uffd {
    () => {
        need_kvm!();
        if let Err(error) = Uffd::open_for_writes() {
            println!("skipped: {error}");
            return;
        }
    };
}

/// Writes 1 to each of its pages in order, then 2, and so on, until the word at [`LEAVE`] is set: then it prints `done`. It prints `torn` if
/// a page has not the number before the one that its registers say; in 32-bit mode.
fn generations() -> Code {
    let end = DATA + PAGES * 4096;
    let (done, torn) = (leaving("done"), leaving("torn"));
    // mov eax, 1; xor ebx, ebx; outer: mov edi, DATA
    let code = Code::new().bytes(&[0xb8, 1, 0, 0, 0, 0x31, 0xdb, 0xbf]).bytes(&DATA.to_le_bytes());
    // inner: cmp [edi], ebx; jne torn
    let to_torn = 28 + i32::try_from(done.as_bytes().len()).expect("short");
    let code = code.bytes(&[0x39, 0x1f, 0x0f, 0x85]).bytes(&to_torn.to_le_bytes());
    // mov [edi], eax; add edi, 4096; cmp edi, end; jb inner
    let code = code.bytes(&[0x89, 0x07, 0x81, 0xc7, 0, 0x10, 0, 0, 0x81, 0xff]).bytes(&end.to_le_bytes());
    // inc eax; inc ebx; cmp word [LEAVE], 1; jne outer
    let code = code.bytes(&[0x72, 0xe8, 0x40, 0x43, 0x66, 0x83, 0x3d]).bytes(&LEAVE.to_le_bytes());
    code.bytes(&[1, 0x75, 0xd7]).bytes(done.as_bytes()).bytes(torn.as_bytes())
}

fn leaving(text: &str) -> Code {
    Code::new().print(text).out(EXIT_PORT, SHUTDOWN).halt()
}

fn page(index: u32) -> u64 {
    u64::from(DATA) + u64::from(index) * 4096
}

/// Waits until the guest has gone over its pages twice more.
fn goes_on(machine: &Machine) {
    let number = || machine.peek(page(PAGES - 1)).expect("memory");
    let (before, deadline) = (number(), Instant::now() + Duration::from_secs(20));
    while number() < before + 2 {
        assert!(
            Instant::now() < deadline,
            "the guest stands still; {:?} {:?}",
            machine.exit_reason(),
            console(machine)
        );
        std::thread::yield_now();
    }
}

fn build(adapt: impl FnOnce(&mut MachineConfig)) -> Machine {
    let kernel = generations().pvh();
    let mut config = small(kernel.path());
    adapt(&mut config);
    Machine::build(config).expect("build")
}

/// Checksums take most of these tests' time.
fn small(kernel: &Path) -> MachineConfig {
    MachineConfig { memory: MemoryConfig::from_mib(32), ..config(kernel) }
}

fn started(adapt: impl FnOnce(&mut MachineConfig)) -> Machine {
    let machine = build(adapt);
    machine.start().expect("start");
    goes_on(&machine);
    machine
}

fn restore_config() -> MachineConfig {
    small(Path::new("/no kernel is needed"))
}

fn live(machine: &Machine, directory: &Path) -> LiveSnapshot {
    machine.snapshot_live(directory).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// What is in `directory` is one moment: pages up to one have a number, those behind it the one before. A machine that goes on from there
/// finds in each page what its registers say.
fn is_one_moment(directory: &Path) {
    verify(directory).expect("sound");
    let memory = fs::File::open(directory.join("memory")).expect("memory");
    let numbers: Vec<_> = (0..PAGES)
        .map(|index| {
            let mut bytes = [0; 4];
            memory.read_exact_at(&mut bytes, page(index)).expect("read");
            u32::from_le_bytes(bytes)
        })
        .collect();
    let (first, last) = (numbers[0], numbers[numbers.len() - 1]);
    assert!(first > 0 && (last == first || last + 1 == first), "{first} {last}");
    assert!(numbers.is_sorted_by(|a, b| a >= b), "pages are of different moments");
    let leave = fs::OpenOptions::new().write(true).open(directory.join("memory")).expect("memory");
    leave.write_all_at(&1_u32.to_le_bytes(), LEAVE.into()).expect("write");
    let clone = Machine::restore(restore_config(), directory).expect("restore");
    clone.start().expect("start");
    assert_eq!(wait(&clone), ExitReason::Shutdown);
    assert_eq!(console(&clone), "done");
}

/// A running machine forks, and both go on. Returns how often it waited.
fn forks(machine: &Machine) -> u64 {
    let place = tempfile::tempdir().expect("directory");
    let taken = live(machine, place.path());
    goes_on(machine);
    is_one_moment(place.path());
    goes_on(machine);
    assert_eq!(console(machine), "");
    let Copied::Running { waits } = taken.copied else { panic!("{taken:?}") };
    println!("stood still for {:?}, then waited {waits} times", taken.stood_still);
    waits
}

fn printed(machine: &Machine, text: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !console(machine).contains(text) {
        assert!(Instant::now() < deadline, "{:?} {:?}", console(machine), machine.exit_reason());
        std::thread::yield_now();
    }
}

fn empty(directory: &Path) -> bool {
    fs::read_dir(directory).expect("read").next().is_none()
}

#[test]
fn a_running_machine_is_saved_as_it_was_at_one_moment() {
    need_uffd!();
    let machine = started(|_| {});
    let mut waits = 0;
    for _ in 0..5 {
        waits += forks(&machine);
    }
    // It writes all the time.
    assert!(waits > 0);
}

#[test]
fn memory_of_a_memfd_and_of_a_file_in_memory_forks_too() {
    need_uffd!();
    forks(&started(|config| config.memory.backing = MemoryBacking::Shared));
    let file = tempfile::tempfile_in("/dev/shm").expect("file");
    forks(&started(|config| config.memory.backing = MemoryBacking::File { file, shared: true }));
}

#[test]
fn a_restored_machine_forks() {
    need_uffd!();
    let original = started(|_| {});
    let in_memory = tempfile::tempdir_in("/dev/shm").expect("directory");
    live(&original, in_memory.path());
    drop(original);
    let restored = Machine::restore(restore_config(), in_memory.path()).expect("restore");
    restored.start().expect("start");
    forks(&restored);
    // Onto what it has mapped.
    let taken = live(&restored, in_memory.path());
    assert!(matches!(taken.copied, Copied::Running { .. }), "{taken:?}");
    goes_on(&restored);
    let lazy = RestoreMemory::Lazy(LazyConfig::default());
    let restored = Machine::restore_with(restore_config(), in_memory.path(), lazy).expect("restore");
    restored.start().expect("start");
    forks(&restored);
    is_one_moment(in_memory.path());
}

#[test]
fn memory_that_cannot_be_protected_is_copied_while_the_guest_stands_still() {
    need_uffd!();
    // Not where temporary files may be in memory.
    let on_disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("directory");
    let machine = started(|_| {});
    live(&machine, on_disk.path());
    drop(machine);
    let restored = Machine::restore(restore_config(), on_disk.path()).expect("restore");
    restored.start().expect("start");
    let place = tempfile::tempdir().expect("directory");
    let taken = live(&restored, place.path());
    match taken.copied {
        Copied::Written { reason } => println!("stood still for {:?}: {}", taken.stood_still, chain(&reason)),
        Copied::Running { .. } => println!("the target directory is in memory"),
        Copied::Still { .. } => panic!("{taken:?}"),
    }
    goes_on(&restored);
    is_one_moment(place.path());
    // What no snapshot has is copied as a whole.
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("file");
    let machine = started(|config| config.memory.backing = MemoryBacking::File { file, shared: true });
    let taken = live(&machine, place.path());
    assert!(!matches!(taken.copied, Copied::Written { .. }), "{taken:?}");
    goes_on(&machine);
    is_one_moment(place.path());
}

/// Of a difference over a whole snapshot on a disk, each page comes from the layer that has it, and what was written from memory.
#[test]
fn a_machine_of_layers_on_a_disk_forks() {
    need_uffd!();
    let on_disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("directory");
    let at = |name: &str| on_disk.path().join(name);
    let machine = started(|_| {});
    machine.track_writes().expect("track");
    machine.snapshot(&at("whole")).expect("snapshot");
    machine.resume().expect("resume");
    machine.snapshot_diff(&at("difference"), &at("whole")).expect("difference");
    drop(machine);
    // Nothing was written yet: all comes from the layers.
    let restored = Machine::restore(restore_config(), &at("difference")).expect("restore");
    live(&restored, &at("same"));
    restored.snapshot(&at("still")).expect("snapshot");
    let sums = |name: &str| Manifest::read(&at(name)).expect("manifest").memory;
    assert_eq!(sums("same"), sums("still"));
    restored.start().expect("start");
    live(&restored, &at("fork"));
    goes_on(&restored);
    is_one_moment(&at("fork"));
}

/// An image that is mapped into memory is part of it, whether the guest has looked at it or not.
#[test]
fn an_image_that_was_mapped_is_in_the_snapshot() {
    need_uffd!();
    const IMAGE: usize = 8 << 20;
    let mut image = support::elf(Code::new().print("up").spin().as_bytes(), false);
    // One segment that is not written to, which goes on with what is no code.
    image.resize(0x1000 + IMAGE, 0x5a);
    image[64 + 4] = 5;
    for field in [64 + 32, 64 + 40] {
        image[field..field + 8].copy_from_slice(&(IMAGE as u64).to_le_bytes());
    }
    let kernel = support::file(&image);
    let mut config = config(kernel.path());
    config.images = Placement::Mapped;
    let machine = Machine::build(config).expect("build");
    machine.start().expect("start");
    printed(&machine, "up");
    let place = tempfile::tempdir().expect("directory");
    let at = |name: &str| place.path().join(name);
    live(&machine, &at("live"));
    machine.snapshot(&at("still")).expect("snapshot");
    for name in ["live", "still"] {
        let memory = fs::File::open(at(name).join("memory")).expect("memory");
        let mut bytes = vec![0; IMAGE];
        memory.read_exact_at(&mut bytes, support::ELF_BASE).expect("read");
        assert!(bytes[..] == image[0x1000..], "{name}");
    }
}

#[test]
fn a_machine_that_stands_still_goes_on_standing_still() {
    need_uffd!();
    let machine = started(|_| {});
    machine.pause().expect("pause");
    let place = tempfile::tempdir().expect("directory");
    let before = machine.peek(page(PAGES - 1));
    live(&machine, place.path());
    assert_eq!(machine.state(), vmm::machine::RunState::Held);
    assert_eq!(machine.peek(page(PAGES - 1)), before);
    machine.resume().expect("resume");
    goes_on(&machine);
    is_one_moment(place.path());
}

#[test]
fn a_difference_to_it_has_what_was_written_since() {
    need_uffd!();
    let machine = started(|_| {});
    machine.track_writes().expect("track");
    let place = tempfile::tempdir().expect("directory");
    let at = |name: &str| place.path().join(name);
    machine.snapshot(&at("whole")).expect("snapshot");
    machine.resume().expect("resume");
    goes_on(&machine);
    // One that fails loses nothing that a difference needs.
    let file = support::file(b"no directory");
    machine.snapshot_live(file.path()).expect_err("no directory");
    live(&machine, &at("live"));
    goes_on(&machine);
    let refused = machine.snapshot_diff(&at("none"), &at("whole")).expect_err("not the last");
    assert!(matches!(refused, SnapshotError::NotTheLast { .. }), "{refused:?}");
    machine.snapshot_diff(&at("difference"), &at("live")).expect("difference");
    // The difference says the same as all of memory.
    machine.snapshot(&at("all")).expect("snapshot");
    Machine::restore(restore_config(), &at("difference")).expect("restore").snapshot(&at("again")).expect("snapshot");
    let sums = |name: &str| Manifest::read(&at(name)).expect("manifest").memory;
    assert_eq!(sums("again"), sums("all"));
    is_one_moment(&at("live"));
}

#[test]
fn one_snapshot_at_a_time() {
    need_uffd!();
    let machine = started(|_| {});
    let place = tempfile::tempdir().expect("directory");
    let at = |name: &str| place.path().join(name);
    let (second, saved, difference) = std::thread::scope(|scope| {
        let first = scope.spawn(|| live(&machine, &at("first")));
        while machine.live_progress().is_none() {
            assert!(!first.is_finished());
            std::thread::yield_now();
        }
        let second = machine.snapshot_live(&at("second"));
        let saved = machine.snapshot(&at("third"));
        let difference = machine.snapshot_diff(&at("fourth"), &at("first"));
        first.join().expect("join");
        (second.map(|_| ()), saved, difference)
    });
    for refused in [second, saved, difference] {
        assert!(matches!(refused, Err(SnapshotError::Live)), "{refused:?}");
    }
    assert_eq!(machine.live_progress(), None);
    assert!(["second", "third", "fourth"].iter().all(|name| !at(name).exists()));
    goes_on(&machine);
    is_one_moment(&at("first"));
    forks(&machine);
}

#[test]
fn a_machine_is_stopped_while_it_is_saved() {
    need_uffd!();
    let mut stopped = 0;
    for _ in 0..10 {
        let machine = started(|_| {});
        let place = tempfile::tempdir().expect("directory");
        let result = std::thread::scope(|scope| {
            let saving = scope.spawn(|| machine.snapshot_live(place.path()));
            while machine.live_progress().is_none_or(|(done, _)| done == 0) && !saving.is_finished() {
                std::hint::spin_loop();
            }
            machine.stop();
            // No memory is left, whoever is not done yet.
            assert_eq!(machine.peek(0), None);
            saving.join().expect("join")
        });
        assert_eq!(machine.exit_reason(), Some(ExitReason::Stopped));
        match result {
            Ok(_) => verify(place.path()).expect("sound"),
            Err(SnapshotError::Gone) => {
                assert!(empty(place.path()));
                stopped += 1;
            }
            Err(error) => panic!("{}", chain(&error)),
        }
        let error = machine.snapshot_live(place.path()).expect_err("ended");
        assert!(matches!(error, SnapshotError::State(_)), "{error:?}");
    }
    assert!(stopped > 0, "it was always too late");
}

/// A file system of 2 MiB that only this thread sees, and the copies of its descriptors.
fn small_file_system(at: &Path) -> bool {
    let path = std::ffi::CString::new(at.to_str().expect("a name")).expect("no zeros");
    // SAFETY: flags.
    if unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) } != 0 {
        return false;
    }
    let (none, data) = (std::ptr::null(), c"size=2m".as_ptr());
    let private = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: C strings that live through the calls, or none where none is looked at.
    unsafe {
        libc::mount(none, c"/".as_ptr(), none, private, std::ptr::null()) == 0
            && libc::mount(c"small".as_ptr(), path.as_ptr(), c"tmpfs".as_ptr(), 0, data.cast()) == 0
    }
}

#[test]
fn a_disk_that_is_full_costs_the_guest_nothing() {
    need_uffd!();
    let machine = started(|_| {});
    let place = tempfile::tempdir().expect("directory");
    let told = std::thread::scope(|scope| {
        let saving = scope.spawn(|| {
            if !small_file_system(place.path()) {
                return None;
            }
            let error = machine.snapshot_live(place.path()).expect_err("full");
            assert!(empty(place.path()));
            Some(chain(&error))
        });
        saving.join().expect("join")
    });
    let Some(told) = told else {
        println!("skipped: a file system cannot be mounted");
        return;
    };
    assert!(told.contains("memory.new: No space left on device"), "{told}");
    goes_on(&machine);
    let error = machine.snapshot_live(Path::new("/proc/nowhere")).expect_err("no directory");
    assert!(chain(&error).starts_with("Cannot write /proc/nowhere"), "{}", chain(&error));
    forks(&machine);
}

/// The guest gives a page with something in it away as soon as it is told to, which is while it is being saved.
#[test]
fn what_is_put_into_the_balloon_meanwhile_is_in_the_snapshot() {
    need_uffd!();
    const MARK: u32 = 0x6567_6170;
    // What takes a while to copy, above the code, and after it the page.
    const FILLED: u32 = 0x200_0000;
    const GIVEN: u32 = 0x700_0000;
    let code = bring_up(see_above(), 0, 0, &[0, 1]).put(GIVEN, MARK).put(REQUEST, GIVEN >> 12);
    // mov eax, MARK; mov edi, FILLED; mov [rdi], eax; add edi, 4096; cmp edi, GIVEN; jb -16
    let code = code.bytes(&[0xb8]).bytes(&MARK.to_le_bytes()).bytes(&[0xbf]).bytes(&FILLED.to_le_bytes());
    let code = code.bytes(&[0x89, 0x07, 0x81, 0xc7, 0, 0x10, 0, 0, 0x81, 0xff]).bytes(&GIVEN.to_le_bytes());
    let code = code.bytes(&[0x72, 0xf0]).print("up");
    // mov dx, 0x3fd; in al, dx; test al, 1; jz -9: until there is input.
    let code = code.bytes(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7]);
    let code = request(code, 0, 0, 0, &[(REQUEST.into(), 4, false)]).print("gone");

    let kernel = code.spin().flat();
    let mut config = config(kernel.path());
    config.balloon = Some(BalloonConfig { target: 4096, ..Default::default() });
    let machine = Machine::build(config).expect("build");
    machine.start().expect("start");
    printed(&machine, "up");
    let place = tempfile::tempdir().expect("directory");
    std::thread::scope(|scope| {
        let saving = scope.spawn(|| live(&machine, place.path()));
        while machine.live_progress().is_none_or(|(done, _)| done == 0) {
            assert!(!saving.is_finished(), "it was too late");
            std::hint::spin_loop();
        }
        assert_eq!(machine.console_input(b"x"), 1);
        // Whoever wants the machine to run, it does not let the balloon go on.
        machine.resume().expect("resume");
        let taken = saving.join().expect("join");
        assert!(matches!(taken.copied, Copied::Running { .. }), "{taken:?}");
    });
    printed(&machine, "upgone");
    assert_eq!(machine.peek(GIVEN.into()), Some(0));
    let mut bytes = [0; 4];
    let memory = fs::File::open(place.path().join("memory")).expect("memory");
    memory.read_exact_at(&mut bytes, GIVEN.into()).expect("read");
    assert_eq!(u32::from_le_bytes(bytes), MARK);
    verify(place.path()).expect("sound");
}
