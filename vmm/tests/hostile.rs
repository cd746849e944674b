//! A guest that means harm, on KVM, against a machine with every device that needs nothing of the host: floods of ports,
//! registers and notifications, rings where no memory is. The machine goes on, or ends with a reason; it does not grow,
//! and its threads come to rest. What single requests can do is tested in `devices`, without a processor.

mod support;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use devices::virtio::fs::CachePolicy;
use support::script::{Numbers, PORT_WIDTHS, Script, WIDTHS, Width};
use support::{EXIT_PORT, I8042_PORT, SERIAL_PORT, config, console, ended_within, wait};
use vmm::{
    BalloonConfig, BlkConfig, ConsoleConfig, ExitReason, FsConfig, Machine, MachineConfig, MemConfig, PmemConfig,
    PortConfig, PortEnd, RngConfig, VsockConfig,
};

const WINDOWS: u32 = 0xd000_0000;
const WINDOW: u32 = 0x1000;
/// Devices of [`everything`]: fs, blk, vsock, rng, balloon, pluggable memory, pmem, console.
const DEVICES: u32 = 8;
const BLK: u32 = WINDOWS + WINDOW;

// Registers (virtio 1.2 section 4.2.2).
const DRIVER_FEATURES: u32 = 0x20;
const DRIVER_FEATURES_SEL: u32 = 0x24;
const QUEUE_SEL: u32 = 0x30;
const QUEUE_NUM: u32 = 0x38;
const QUEUE_READY: u32 = 0x44;
const QUEUE_NOTIFY: u32 = 0x50;
const STATUS: u32 = 0x70;
/// Address registers of a queue: descriptors, available ring, used ring; the upper half is 4 above.
const QUEUE_ADDRESSES: [u32; 3] = [0x80, 0x90, 0xa0];
/// The first bytes of a window that are the device's own.
const CONFIG: u32 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 3;
const FEATURES_OK: u32 = 0xb;
const DRIVER_OK: u32 = 0xf;
const FAILED: u32 = 0x80;

/// Memory of the guest for rings, zero at the start.
const RINGS: u32 = 0x200_0000;
const SEEN: &str = "end";
/// What the process may grow by: the stacks and code that its threads touch, and what the allocator keeps. A buffer that
/// a guest can make grow passes it within one of the floods.
const GROWTH: usize = 16 << 20;
/// Processor time of a device loop with nothing to do, in ticks of 10 ms, over [`REST`].
const RESTING: u64 = 5;
const REST: Duration = Duration::from_millis(300);

/// One machine at a time: memory and threads are the process's.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Resident bytes of the process's mappings beside guest memory, which is left out of core dumps (`dd`,
/// proc_pid_smaps(5)).
fn resident() -> Vec<(String, usize)> {
    let text = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let (mut mappings, mut head, mut rss) = (Vec::new(), "", 0);
    for line in text.lines() {
        if let Some(value) = line.strip_prefix("Rss:") {
            rss = value.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10;
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split_whitespace().all(|flag| flag != "dd") {
                mappings.push((head.to_owned(), rss));
            }
        } else if line.split(' ').next().is_some_and(|word| word.contains('-')) {
            head = line;
        }
    }
    mappings
}

fn total(mappings: &[(String, usize)]) -> usize {
    mappings.iter().map(|(_, rss)| rss).sum()
}

/// Processor time of the process's device loops, in ticks.
fn ticks_of_loops() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("tasks");
    let stats = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
    let of_loop = |stat: &String| ["(io)", "(fs)", "(blk)", "(fs-"].iter().any(|name| stat.contains(name));
    let ticks = |stat: String| -> u64 {
        let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_ascii_whitespace().collect();
        // utime and stime, fields 14 and 15 (proc_pid_stat(5)).
        [fields[11], fields[12]].iter().map(|field| field.parse::<u64>().expect("ticks")).sum()
    };
    stats.filter(of_loop).map(ticks).sum()
}

/// A machine with every device, and what must outlive it.
fn everything(script: &Script) -> (MachineConfig, impl Sized + use<>) {
    let kernel = script.kernel();
    let (shared, file) = (tempfile::tempdir().expect("directory"), tempfile::tempfile().expect("file"));
    file.set_len(1 << 20).expect("size");
    let persistent = tempfile::tempfile().expect("file");
    persistent.set_len(4 << 20).expect("size");
    let mut config = config(kernel.path());
    config.fs.push(FsConfig {
        tag: "share".to_owned(),
        shared_dir: shared.path().to_owned(),
        cache: CachePolicy::Auto,
        num_request_queues: 1,
        queue_size: 128,
        writeback: false,
        workers: 2,
        xattr: true,
        posix_locks: false,
    });
    config.blk.push(BlkConfig::new("drive", file));
    config.vsock = Some(VsockConfig { guest_cid: 3, uds_path: None });
    config.rng = Some(RngConfig::default());
    config.balloon = Some(BalloonConfig { free_page_reporting: true, ..BalloonConfig::default() });
    config.pluggable = Some(MemConfig { size: 128 << 20, block_size: 2 << 20, requested: 2 << 20, node: 0 });
    config.pmem.push(PmemConfig { id: "persistent".to_owned(), file: persistent, read_only: false });
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").expect("null");
    let host = PortEnd::Streams { input: None, output: Some(null) };
    config.console = Some(ConsoleConfig { ports: vec![PortConfig { number: 0, console: true, name: None, host }] });
    (config, (kernel, shared))
}

/// Runs the script to its end, which the guest must reach, and looks at what the machine has become.
#[track_caller]
fn goes_on(script: Script) {
    let _alone = alone();
    let script = script.print(SEEN).shut_down();
    let (config, _kept) = everything(&script);
    let machine = Machine::build(config).expect("build");
    let before = resident();
    machine.start().expect("start");
    assert!(ended_within(&machine, 120_000), "the guest is not through: {:?}", console(&machine));
    assert_eq!(machine.wait(), ExitReason::Shutdown);
    assert!(console(&machine).ends_with(SEEN), "{:?}", console(&machine));
    let after = resident();
    let grown = total(&after).saturating_sub(total(&before));
    assert!(grown < GROWTH, "{grown} bytes more: {before:#?} and then {after:#?}");
    // Whatever was asked of them, the device loops have no work for ever.
    let busy = ticks_of_loops();
    std::thread::sleep(REST);
    let ticks = ticks_of_loops() - busy;
    assert!(ticks <= RESTING, "the device loops used {ticks} ticks at rest");
    machine.stop();
}

fn windows() -> impl Iterator<Item = u32> {
    (WINDOWS..).step_by(WINDOW as usize).take(DEVICES as usize)
}

/// The driver's way to `status` (section 3.1.1), with one queue that lies at `rings`.
fn bring_to(script: Script, window: u32, status: u32, rings: u32) -> Script {
    let steps = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
    let mut script = script.store(window + STATUS, 0);
    for step in steps.into_iter().take_while(|step| *step <= status) {
        if step == FEATURES_OK {
            // VERSION_1, and nothing else.
            script = script.store(window + DRIVER_FEATURES_SEL, 1).store(window + DRIVER_FEATURES, 1);
        }
        if step == DRIVER_OK {
            script = set_queue(script, window, 0, rings);
        }
        script = script.store(window + STATUS, step);
    }
    if status == FAILED { script.store(window + STATUS, FAILED) } else { script }
}

fn set_queue(script: Script, window: u32, queue: u32, rings: u32) -> Script {
    let script = script.store(window + QUEUE_SEL, queue).store(window + QUEUE_NUM, 8);
    let script = QUEUE_ADDRESSES.into_iter().enumerate().fold(script, |script, (page, register)| {
        // A ring near the end of the address space leaves the others at its beginning.
        let ring = rings.wrapping_add(0x1000 * u32::try_from(page).expect("small"));
        script.store(window + register, ring).store(window + register + 4, 0)
    });
    script.store(window + QUEUE_READY, 1)
}

/// A request of the drive: reads sector 0. Descriptors, rings and buffers are pages from `rings` on.
fn read_sector(script: Script, rings: u32) -> Script {
    let (available, header, data, status) = (rings + 0x1000, rings + 0x3000, rings + 0x4000, rings + 0x5000);
    let chain = [(header, 16, 1 | 1 << 16), (data, 512, 3 | 2 << 16), (status, 1, 2)];
    let script = (rings..).step_by(16).zip(chain).fold(script, |script, (at, (address, length, flags))| {
        script.store(at, address).store(at + 8, length).store(at + 12, flags)
    });
    // One entry: descriptor 0.
    script.store(available, 1 << 16)
}

#[test]
fn a_flooded_console_keeps_its_size() {
    need_kvm!();
    let numbers = &mut Numbers::new(1);
    let script = (0..32).fold(Script::new(), |script, _| script.out(Width::Byte, SERIAL_PORT, numbers.next(), 2000));
    // The other registers too: interrupts on, loopback, which feeds the output to the input.
    let script = script.out(Width::Byte, SERIAL_PORT + 1, 0xf, 1).out(Width::Byte, SERIAL_PORT + 4, 0x1f, 1);
    goes_on(script.out(Width::Byte, SERIAL_PORT, 0x41, 20_000).out(Width::Byte, SERIAL_PORT + 4, 0, 1));
}

#[test]
fn every_port_takes_every_width() {
    need_kvm!();
    let numbers = &mut Numbers::new(2);
    // Those below 0x600 one by one, and some of the others.
    let ports: Vec<u16> = (0..0x600).chain((0x600..=u16::MAX).step_by(97)).collect();
    let mut script = Script::new();
    for port in ports {
        // An access as wide as 4 bytes from 3 below reaches these, and they end the machine: see the next test.
        let ends = [EXIT_PORT, I8042_PORT].iter().any(|end| (end - 3..=*end).contains(&port));
        for width in PORT_WIDTHS {
            script = script.input(width, port, 1);
            if !ends {
                script = script.out(width, port, numbers.next(), 1);
            }
        }
    }
    // Whatever the serial port's registers were left at, the console works again.
    goes_on(script.out(Width::Byte, SERIAL_PORT + 3, 3, 1).out(Width::Byte, SERIAL_PORT + 4, 0, 1));
}

#[test]
fn ports_that_end_the_machine_end_it_with_a_reason() {
    need_kvm!();
    let _alone = alone();
    for (port, width) in [EXIT_PORT, I8042_PORT].into_iter().flat_map(|port| PORT_WIDTHS.map(|width| (port, width))) {
        let script = (0..=0xff).fold(Script::new(), |script, value| script.out(width, port, value, 1));
        let (config, _kept) = everything(&script.shut_down());
        let machine = Machine::build(config).expect("build");
        machine.start().expect("start");
        let reason = wait(&machine);
        assert!(
            matches!(reason, ExitReason::Shutdown | ExitReason::Reset | ExitReason::Panicked(_)),
            "{port:#x} {width:?}: {reason:?}"
        );
    }
}

#[test]
fn every_register_takes_every_width_in_every_state() {
    need_kvm!();
    let numbers = &mut Numbers::new(3);
    let mut script = Script::new();
    for window in windows() {
        for status in [0, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK, FAILED] {
            script = bring_to(script, window, status, RINGS);
            for offset in (0..CONFIG).step_by(4).chain([1, 2, 3, 5, 0x71, 0x101, 0x104, 0x1fc, 0xff8, 0xffd]) {
                for width in WIDTHS {
                    script = script.read(width, window + offset, 1);
                    // A status that leads elsewhere is its own test.
                    if offset.wrapping_sub(STATUS) >= 4 || status == 0 {
                        script = script.write(width, window + offset, numbers.next(), 1);
                    }
                }
            }
        }
        script = script.store(window + STATUS, 0);
    }
    goes_on(script);
}

#[test]
fn random_register_writes_lead_nowhere() {
    need_kvm!();
    let numbers = &mut Numbers::new(4);
    let values = [0, 1, 3, 7, 0xb, 0xf, 0x80, 0x100, 0x8000, 0xffff, RINGS, WINDOWS, 0x7fff_f000, u32::MAX];
    let registers =
        [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x100, 0x104];
    let mut script = Script::new();
    for _ in 0..12_000 {
        let window = WINDOWS + WINDOW * (numbers.next() % DEVICES);
        script = script.store(window + numbers.one_of(&registers), numbers.one_of(&values));
    }
    goes_on(windows().fold(script, |script, window| script.store(window + STATUS, 0)));
}

#[test]
fn a_storm_of_resets_and_activations_is_survived() {
    need_kvm!();
    let mut script = Script::new();
    for _ in 0..60 {
        for window in windows() {
            script = bring_to(script, window, DRIVER_OK, RINGS).store(window + QUEUE_NOTIFY, 0);
        }
    }
    goes_on(windows().fold(script, |script, window| script.store(window + STATUS, 0)));
}

#[test]
fn a_storm_of_notifications_wakes_the_devices_and_no_more() {
    need_kvm!();
    let mut script = Script::new();
    for window in windows() {
        script = bring_to(script, window, DRIVER_OK, RINGS);
        // Queues that are there, that are not ready, and that do not exist.
        for queue in [0, 1, 7, 0xffff, u32::MAX] {
            script = script.write(Width::Long, window + QUEUE_NOTIFY, queue, 4000);
        }
        // No ioeventfd takes these.
        script =
            script.write(Width::Byte, window + QUEUE_NOTIFY, 0, 500).write(Width::Quad, window + QUEUE_NOTIFY, 0, 500);
    }
    goes_on(script);
}

#[test]
fn a_storm_of_requests_is_worked_through() {
    need_kvm!();
    let rings = RINGS + 0x10_0000;
    let script = read_sector(bring_to(Script::new(), BLK, DRIVER_OK, rings), rings);
    // The index runs ahead by a request each time, and over its end.
    let script = (1..3000u32).fold(script, |script, index| {
        script.store(rings + 0x1000, (index & 0xffff) << 16).store(BLK + QUEUE_NOTIFY, 0)
    });
    // An index that jumps further than the ring is long breaks the device, which its driver resets.
    goes_on(script.store(rings + 0x1000, 0x7777 << 16).store(BLK + QUEUE_NOTIFY, 0).store(BLK + STATUS, 0));
}

#[test]
fn a_queue_is_what_it_was_at_driver_ok() {
    need_kvm!();
    let rings = RINGS + 0x20_0000;
    let mut script = read_sector(bring_to(Script::new(), BLK, DRIVER_OK, rings), rings);
    for size in [0, 1, 3, 16, 256, 257, 0x8000, 0xffff] {
        script = script.store(BLK + QUEUE_SEL, 0).store(BLK + QUEUE_NUM, size);
        script = QUEUE_ADDRESSES.into_iter().fold(script, |script, register| script.store(BLK + register, WINDOWS));
        script = script.store(BLK + QUEUE_READY, 0).store(BLK + QUEUE_READY, 1);
    }
    let script = script.store(BLK + QUEUE_NOTIFY, 0).print(SEEN).out(Width::Byte, SERIAL_PORT, 0x20, 200);
    let _alone = alone();
    let (config, _kept) = everything(&script);
    let machine = Machine::build(config).expect("build");
    machine.start().expect("start");
    // The script has no end: the guest runs into what follows it, so the machine has some reason to end, or goes on.
    let _ = ended_within(&machine, 2000);
    assert!(console(&machine).contains(SEEN), "{:?} {:?}", console(&machine), machine.exit_reason());
    machine.stop();
}

#[test]
fn rings_where_no_memory_is_break_their_device_alone() {
    need_kvm!();
    const MEMORY_END: u32 = 128 << 20;
    // At the end of memory and over it, at the end of the gap's start, in the devices' own windows, at the APIC.
    let places =
        [MEMORY_END - 16, MEMORY_END - 0x1000, MEMORY_END, WINDOWS - 16, WINDOWS, BLK, 0xfee0_0000, 0xffff_f000];
    let mut script = Script::new();
    for (window, place) in windows().flat_map(|window| places.map(|place| (window, place))) {
        script = bring_to(script, window, DRIVER_OK, place);
        // The same with a sane ring before and after the one that is not.
        script = script.store(window + QUEUE_NOTIFY, 0).store(window + STATUS, 0);
        script = script.store(window + STATUS, ACKNOWLEDGE).store(window + STATUS, DRIVER);
        script = script.store(window + DRIVER_FEATURES_SEL, 1).store(window + DRIVER_FEATURES, 1);
        script = set_queue(script.store(window + STATUS, FEATURES_OK), window, 0, RINGS);
        script = script.store(window + 0x90, place).store(window + 0x94, u32::MAX).store(window + STATUS, DRIVER_OK);
        script = script.write(Width::Long, window + QUEUE_NOTIFY, 0, 3).store(window + STATUS, 0);
    }
    goes_on(script);
}
