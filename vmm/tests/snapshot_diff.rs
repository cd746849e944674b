//! Snapshots that have only what was written since another one.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use support::virtio::{PAGE, bring_up, request, see_above};
use support::{Code, chain, config, console};
use vmm::snapshot::{Layers, MANIFEST, MEMORY, Manifest, SnapshotError};
use vmm::{Machine, MachineConfig, MemoryConfig, RngConfig};

/// Where the guests' pages are; in memory above 4 GiB as well, where a guest has that.
const PAGES: u64 = 0x80_0000;
/// Where the memory file has the first page above 4 GiB: what is below the gap for devices comes before.
const ABOVE_IN_FILE: u64 = 0xd000_0000;

/// Counts in the page whose number it reads from its console, and writes the number back. Means the same in 32-bit and
/// 64-bit mode.
fn counter(code: Code, above: bool) -> Code {
    // poll: mov dx, 0x3fd; in al, dx; test al, 1; jz poll
    let wait = [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7];
    // mov dx, 0x3f8; in al, dx; movzx eax, al; shl eax, 12
    let take = [0x66, 0xba, 0xf8, 0x03, 0xec, 0x0f, 0xb6, 0xc0, 0xc1, 0xe0, 0x0c];
    // inc dword [eax + 0x800000]
    let mut body = vec![0xff, 0x80, 0x00, 0x00, 0x80, 0x00];
    if above {
        // inc dword [eax + 0x40000000]
        body.extend([0xff, 0x80, 0x00, 0x00, 0x00, 0x40]);
    }
    // shr eax, 12; out dx, al; jmp poll
    body.extend([0xc1, 0xe8, 0x0c, 0xee, 0xeb]);
    let length = wait.len() + take.len() + body.len() + 1;
    body.push(u8::try_from(256 - length).expect("short"));
    code.bytes(&wait).bytes(&take).bytes(&body)
}

fn started(adapt: impl FnOnce(&mut MachineConfig)) -> Machine {
    let kernel = counter(Code::new(), false).pvh();
    let mut config = config(kernel.path());
    adapt(&mut config);
    let machine = Machine::build(config).expect("build");
    machine.start().expect("start");
    machine
}

fn restored(directory: &Path) -> Machine {
    Machine::restore(config(Path::new("/no kernel is needed")), directory).expect("restore")
}

/// Makes the guest count in these pages, and returns when it has.
fn touch(machine: &Machine, pages: &[u8]) {
    machine.resume().expect("resume");
    for page in pages {
        let before = machine.console_tail().len();
        assert_eq!(machine.console_input(&[*page]), 1);
        let deadline = Instant::now() + Duration::from_secs(20);
        while machine.console_tail().len() == before {
            assert!(Instant::now() < deadline, "{:?}", console(machine));
            std::thread::yield_now();
        }
    }
}

/// A word of a memory file.
fn word(directory: &Path, at: u64) -> u32 {
    let mut bytes = [0; 4];
    File::open(directory.join(MEMORY)).and_then(|file| file.read_exact_at(&mut bytes, at)).expect("memory");
    u32::from_le_bytes(bytes)
}

/// What the guest has counted in a page, by a whole snapshot or the topmost difference.
fn count(directory: &Path, page: u64) -> u32 {
    word(directory, PAGES + (page << 12))
}

/// The pages in a difference.
fn pages(directory: &Path) -> Vec<u64> {
    let base = Manifest::read(directory).expect("manifest").base.expect("a difference");
    base.pages.iter().flat_map(|(page, count)| *page..*page + *count).collect()
}

/// A machine that goes on from `directory` has the memory of `machine`, which is paused.
fn is_same(machine: &Machine, directory: &Path) {
    let place = tempfile::tempdir().expect("directory");
    let (one, other) = (place.path().join("one"), place.path().join("other"));
    machine.snapshot(&one).expect("snapshot");
    restored(directory).snapshot(&other).expect("snapshot");
    let sums = |directory: &Path| Manifest::read(directory).expect("manifest").memory;
    assert_eq!(sums(&one), sums(&other));
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("directory"))
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }
}

#[test]
fn a_difference_has_what_was_written_and_hardly_more() {
    need_kvm!();
    let place = Place::new();
    let machine = started(|_| {});
    machine.track_writes().expect("track");
    touch(&machine, &[1, 2, 3]);
    machine.snapshot(&place.at("whole")).expect("snapshot");
    touch(&machine, &[2, 200, 2]);
    machine.snapshot_diff(&place.at("diff"), &place.at("whole")).expect("difference");
    let first = PAGES >> 12;
    let found = pages(&place.at("diff"));
    assert!(found.contains(&(first + 2)) && found.contains(&(first + 200)), "{found:?}");
    assert!(!found.contains(&(first + 1)) && found.len() < 32, "{found:?}");
    assert_eq!((count(&place.at("diff"), 2), count(&place.at("diff"), 200)), (3, 1));
    assert!(fs::metadata(place.at("diff").join(MEMORY)).expect("memory").blocks() * 512 <= 4096 * 32);
    vmm::snapshot::verify(&place.at("diff")).expect("sound");
    is_same(&machine, &place.at("diff"));
}

#[test]
fn differences_of_differences_are_each_what_the_machine_was() {
    need_kvm!();
    let place = Place::new();
    let machine = started(|_| {});
    machine.track_writes().expect("track");
    touch(&machine, &[1, 2, 3]);
    machine.snapshot(&place.at("0")).expect("snapshot");
    for (round, touched) in [&[1, 2][..], &[2, 9], &[3, 9, 10]].iter().enumerate() {
        touch(&machine, touched);
        let (base, new) = (place.at(&round.to_string()), place.at(&(round + 1).to_string()));
        machine.snapshot_diff(&new, &base).expect("difference");
    }
    for (name, counts) in
        [("0", [1, 1, 1, 0, 0]), ("1", [2, 2, 1, 0, 0]), ("2", [2, 3, 1, 1, 0]), ("3", [2, 3, 2, 2, 1])]
    {
        restored(&place.at(name)).snapshot(&place.at("check")).expect("snapshot");
        assert_eq!([1, 2, 3, 9, 10].map(|page| count(&place.at("check"), page)), counts, "{name}");
    }
    assert_eq!(Layers::open(&place.at("3")).expect("layers").directories().count(), 4);
    is_same(&machine, &place.at("3"));
}

#[test]
fn a_restored_machine_is_saved_as_a_difference_to_its_template() {
    need_kvm!();
    let place = Place::new();
    let machine = started(|_| {});
    touch(&machine, &[1, 2]);
    machine.snapshot(&place.at("template")).expect("snapshot");
    drop(machine);
    let clone = restored(&place.at("template"));
    clone.track_writes().expect("track");
    touch(&clone, &[2]);
    clone.snapshot_diff(&place.at("diff"), &place.at("template")).expect("difference");
    assert_eq!(count(&place.at("diff"), 2), 2);
    assert!(!pages(&place.at("diff")).contains(&((PAGES >> 12) + 1)));
    is_same(&clone, &place.at("diff"));
    // Without, nobody knows what it has written.
    let careless = restored(&place.at("template"));
    touch(&careless, &[1]);
    careless.track_writes().expect("track");
    let refused = careless.snapshot_diff(&place.at("late"), &place.at("template"));
    assert!(matches!(refused, Err(SnapshotError::NotTheLast { .. })), "{refused:?}");
}

/// More than one slot of KVM: Firecracker's issue 5705.
#[test]
fn memory_above_the_gap_is_saved_in_its_place() {
    need_kvm!();
    let place = Place::new();
    let large = |config: &mut MachineConfig| config.memory = MemoryConfig::from_mib(3500);
    let kernel = counter(see_above(), true).flat();
    let mut original = config(kernel.path());
    large(&mut original);
    let machine = Machine::build(original).expect("build");
    machine.track_writes().expect("track");
    machine.start().expect("start");
    touch(&machine, &[1, 2]);
    machine.snapshot(&place.at("whole")).expect("snapshot");
    touch(&machine, &[2, 3]);
    machine.snapshot_diff(&place.at("diff"), &place.at("whole")).expect("difference");
    drop(machine);
    let high = |directory: &str, page: u64| word(&place.at(directory), ABOVE_IN_FILE + (page << 12));
    assert_eq!([1, 2, 3].map(|page| high("whole", page)), [1, 1, 0]);
    let found = pages(&place.at("diff"));
    for (page, there) in [(1, false), (2, true), (3, true)] {
        assert_eq!(found.contains(&((PAGES >> 12) + page)), there, "{found:?}");
        assert_eq!(found.contains(&((ABOVE_IN_FILE >> 12) + page)), there, "{found:?}");
    }
    assert_eq!([2, 3].map(|page| high("diff", page)), [2, 1]);
    // And each comes back to where it was.
    let mut again = config(Path::new("/no kernel is needed"));
    large(&mut again);
    let clone = Machine::restore(again, &place.at("diff")).expect("restore");
    clone.track_writes().expect("track");
    touch(&clone, &[1, 2, 3]);
    clone.snapshot_diff(&place.at("last"), &place.at("diff")).expect("difference");
    assert_eq!([1, 2, 3].map(|page| high("last", page)), [2, 3, 2]);
    assert_eq!([1, 2, 3].map(|page| count(&place.at("last"), page)), [2, 3, 2]);
}

/// KVM does not know what devices write.
#[test]
fn what_a_device_wrote_is_in_the_difference() {
    need_kvm!();
    let place = Place::new();
    // Takes a byte from the console and sends it back.
    // mov dx, 0x3fd; in al, dx; test al, 1; jz -9; mov dx, 0x3f8; in al, dx; out dx, al
    let wait = |code: Code| {
        code.bytes(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xee])
    };
    let page = |turn: u16| PAGE + 0x1000 * u32::from(turn);
    let ask = |code: Code, turn: u16| wait(request(wait(code), 0, 0, turn, &[(page(turn).into(), 64, true)]));
    let kernel = ask(ask(bring_up(see_above(), 0, 0, &[0]), 0), 1).halt().flat();
    let mut config = config(kernel.path());
    config.rng = Some(RngConfig::default());
    let machine = Machine::build(config).expect("build");
    machine.track_writes().expect("track");
    machine.start().expect("start");
    machine.snapshot(&place.at("0")).expect("snapshot");
    for turn in 0..2 {
        let (base, new) = (place.at(&turn.to_string()), place.at(&(turn + 1).to_string()));
        // The device has answered when the guest takes its second byte.
        touch(&machine, b"xx");
        machine.snapshot_diff(&new, &base).expect("difference");
        let address = u64::from(page(turn));
        assert!(pages(&new).contains(&(address >> 12)), "{turn}: {:?}", pages(&new));
        assert_ne!(word(&new, address), 0);
    }
    assert!(!pages(&place.at("2")).contains(&(u64::from(page(0)) >> 12)), "It was not written again");
}

#[test]
fn what_is_no_difference_is_refused_by_sentence() {
    need_kvm!();
    let place = Place::new();
    let machine = started(|_| {});
    touch(&machine, &[1]);
    machine.snapshot(&place.at("untracked")).expect("snapshot");
    let refused = |directory: &str, base: &str| {
        let error = machine.snapshot_diff(&place.at(directory), &place.at(base)).expect_err("refused");
        chain(&error)
    };
    assert!(refused("diff", "untracked").contains("is not the last snapshot"));
    machine.track_writes().expect("track");
    assert!(refused("diff", "untracked").contains("is not the last snapshot"));
    assert!(refused("diff", "nowhere").contains("No such file"));
    machine.snapshot(&place.at("first")).expect("snapshot");
    machine.snapshot(&place.at("second")).expect("snapshot");
    assert!(refused("diff", "first").contains("is not the last snapshot"));
    assert!(refused("second", "second").contains("cannot take the place of"));
    machine.snapshot_diff(&place.at("third"), &place.at("second")).expect("difference");
    assert!(refused("second", "third").contains("cannot take the place of"));
    // A base that was replaced, and one that is gone, when it is restored.
    restored(&place.at("third"));
    let config = || config(Path::new("/no kernel is needed"));
    restored(&place.at("first")).snapshot(&place.at("second")).expect("snapshot");
    let said = chain(&Machine::restore(config(), &place.at("third")).expect_err("refused"));
    assert!(said.contains("is not the one that the snapshot in"), "{said}");
    assert!(chain(&vmm::snapshot::verify(&place.at("third")).expect_err("refused")).contains("is not the one"));
    fs::remove_file(place.at("second").join(MANIFEST)).expect("remove");
    let said = chain(&Machine::restore(config(), &place.at("third")).expect_err("refused"));
    assert!(said.contains("Cannot read"), "{said}");
}

#[test]
fn a_base_that_was_moved_is_found_by_its_link() {
    need_kvm!();
    let place = Place::new();
    let machine = started(|_| {});
    machine.track_writes().expect("track");
    machine.snapshot(&place.at("whole")).expect("snapshot");
    touch(&machine, &[7]);
    machine.snapshot_diff(&place.at("diff"), &place.at("whole")).expect("difference");
    fs::rename(place.at("whole"), place.at("moved")).expect("rename");
    fs::remove_file(place.at("diff").join("base")).expect("remove");
    std::os::unix::fs::symlink("../moved", place.at("diff").join("base")).expect("link");
    is_same(&machine, &place.at("diff"));
}

#[test]
fn damage_in_any_layer_is_found() {
    need_kvm!();
    let place = Place::new();
    let machine = started(|_| {});
    machine.track_writes().expect("track");
    touch(&machine, &[1]);
    machine.snapshot(&place.at("whole")).expect("snapshot");
    touch(&machine, &[1, 2]);
    machine.snapshot_diff(&place.at("diff"), &place.at("whole")).expect("difference");
    for name in ["whole", "diff"] {
        let file = fs::OpenOptions::new().write(true).open(place.at(name).join(MEMORY)).expect("memory");
        let good = count(&place.at(name), 1).to_le_bytes();
        file.write_all_at(&[0xff; 4], PAGES + (1 << 12)).expect("write");
        let said = chain(&vmm::snapshot::verify(&place.at("diff")).expect_err("damaged"));
        assert!(said.contains("is damaged in the 1048576 bytes from 0x800000"), "{said}");
        file.write_all_at(&good, PAGES + (1 << 12)).expect("write");
        vmm::snapshot::verify(&place.at("diff")).expect("sound");
        file.set_len((128 << 20) - 4096).expect("cut");
        let refused = Machine::restore(config(Path::new("")), &place.at("diff")).expect_err("refused");
        assert!(chain(&refused).contains("134213632 bytes where the manifest says"));
        file.set_len(128 << 20).expect("grow");
    }
    // Pages that memory does not have.
    let path = place.at("diff").join(MANIFEST);
    let mut manifest = Manifest::read(&place.at("diff")).expect("manifest");
    manifest.base.as_mut().expect("a difference").pages.push((128 << 8, 1));
    fs::write(&path, serde_json::to_vec(&manifest).expect("json")).expect("write");
    let refused = Machine::restore(config(Path::new("")), &place.at("diff")).expect_err("refused");
    assert!(chain(&refused).contains("not in order or leaves the memory at page 32768"), "{}", chain(&refused));
}

/// Firecracker's issue 4301: a snapshot onto the files that a machine was restored from.
#[test]
fn a_snapshot_in_the_place_of_its_own_template_harms_nobody() {
    need_kvm!();
    let place = Place::new();
    let machine = started(|_| {});
    touch(&machine, &[1]);
    machine.snapshot(&place.at("template")).expect("snapshot");
    drop(machine);
    let (writer, reader) = (restored(&place.at("template")), restored(&place.at("template")));
    touch(&writer, &[1, 2]);
    writer.snapshot(&place.at("template")).expect("snapshot");
    vmm::snapshot::verify(&place.at("template")).expect("sound");
    assert_eq!([1, 2, 3].map(|page| count(&place.at("template"), page)), [2, 1, 0]);
    // The other has what there was, the one that was saved goes on, and a third begins where that was.
    touch(&reader, &[1, 3]);
    reader.snapshot(&place.at("reader")).expect("snapshot");
    assert_eq!([1, 2, 3].map(|page| count(&place.at("reader"), page)), [2, 0, 1]);
    touch(&writer, &[2]);
    writer.snapshot(&place.at("writer")).expect("snapshot");
    assert_eq!([1, 2, 3].map(|page| count(&place.at("writer"), page)), [2, 2, 0]);
    is_same(&restored(&place.at("template")), &place.at("template"));
}

#[test]
fn a_template_is_restored_while_it_is_replaced() {
    need_kvm!();
    let place = Place::new();
    let machine = started(|_| {});
    touch(&machine, &[1]);
    machine.snapshot(&place.at("template")).expect("snapshot");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    // What it says on its console it has counted before.
                    let clone = restored(&place.at("template"));
                    touch(&clone, &[1]);
                }
            });
        }
        for _ in 0..10 {
            touch(&machine, &[1]);
            machine.snapshot(&place.at("template")).expect("snapshot");
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

/// Runs `test` with a directory on a file system of `size` bytes, in a thread whose mounts are its own.
fn on_small_disk(size: u64, test: impl FnOnce(&Path) + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let directory = tempfile::tempdir().expect("directory");
            // SAFETY: only this thread's mounts change.
            if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
                println!("skipped: a small disk needs CAP_SYS_ADMIN");
                return;
            }
            let path = std::ffi::CString::new(directory.path().as_os_str().as_encoded_bytes()).expect("path");
            let options = std::ffi::CString::new(format!("size={size}")).expect("options");
            let (none, tmpfs) = (c"none".as_ptr(), c"tmpfs".as_ptr());
            // SAFETY: C strings that live through the calls; nothing of this process is on these mounts.
            let mounted = unsafe {
                libc::mount(none, c"/".as_ptr(), std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE, std::ptr::null())
                    == 0
                    && libc::mount(none, path.as_ptr(), tmpfs, 0, options.as_ptr().cast()) == 0
            };
            assert!(mounted, "{}", std::io::Error::last_os_error());
            test(directory.path());
            // SAFETY: as above.
            unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn a_disk_that_is_full_costs_no_page() {
    need_kvm!();
    let place = Place::new();
    let machine = started(|_| {});
    machine.track_writes().expect("track");
    touch(&machine, &[1]);
    machine.snapshot(&place.at("whole")).expect("snapshot");
    on_small_disk(256 << 10, |small| {
        let many: Vec<u8> = (0..=255).collect();
        touch(&machine, &many);
        let error = machine.snapshot_diff(small, &place.at("whole")).expect_err("full");
        assert!(chain(&error).contains("No space left on device"), "{}", chain(&error));
        assert_eq!(fs::read_dir(small).expect("list").count(), 0, "Nothing is left behind");
    });
    // The guest may have gone on.
    touch(&machine, &[3]);
    machine.snapshot_diff(&place.at("diff"), &place.at("whole")).expect("difference");
    assert_eq!([1, 2, 3, 255].map(|page| count(&place.at("diff"), page)), [2, 1, 2, 1]);
    is_same(&machine, &place.at("diff"));
}

#[test]
fn a_failed_snapshot_leaves_the_one_that_is_there() {
    need_kvm!();
    let place = Place::new();
    let machine = started(|_| {});
    machine.track_writes().expect("track");
    touch(&machine, &[1]);
    machine.snapshot(&place.at("template")).expect("snapshot");
    // The last file of all cannot be written.
    fs::create_dir(place.at("template").join("manifest.new")).expect("obstacle");
    touch(&machine, &[1]);
    machine.snapshot(&place.at("template")).expect_err("obstructed");
    vmm::snapshot::verify(&place.at("template")).expect("the old one");
    assert_eq!(count(&place.at("template"), 1), 1);
    // And it still is what differences are to.
    machine.snapshot_diff(&place.at("diff"), &place.at("template")).expect("difference");
    is_same(&machine, &place.at("diff"));
}
