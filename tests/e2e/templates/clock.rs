//! The clocks of a sandbox that was restored.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use inlay_tests::harness::{Scene, containerd};
use inlay_tests::images;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

use super::{make, remove, run_at_once, with_factory};

crate::for_inlay!(has_the_hosts_time, stands_still_while_the_template_waits);

/// The accuracy that is promised.
const ACCURACY: Duration = Duration::from_millis(10);
/// How long a template has waited, by the host's wall clock.
const AGE: Duration = Duration::from_secs(3600);
/// The clone's time since the boot of its template, and what its kernel complains of, which it has some seconds for.
const LOOK: &str = r#"
    cut -d ' ' -f 1 /proc/uptime
    sleep 5
    dmesg | grep -iE 'stall|lockup|unstable|backwards' || true"#;

fn has_the_hosts_time(scene: &Scene) {
    with_factory(scene, "", "");
    make(scene);
    assert_accurate(scene);
    remove(scene);
}

/// The host's wall clock goes on by an hour, as a clone meets it whose template was made an hour ago.
fn stands_still_while_the_template_waits(scene: &Scene) {
    if !has_a_clock_to_spare() {
        println!("skipped: the clock of a machine that is no nested host is not set");
        return;
    }
    with_factory(scene, "", "");
    let made = Instant::now();
    make(scene);
    let step = Step::ahead(AGE);
    assert_accurate(scene);
    let [seen] = run_at_once(scene, 1, &["sh", "-c", LOOK]).try_into().expect("one output");
    let alive = made.elapsed();
    drop(step);
    let (up, complaints) = seen.split_once('\n').expect("the time since the boot");
    let up = Duration::from_secs_f64(up.parse().expect("seconds"));
    assert!(up < alive, "the guest's time has jumped: {up:?} since a boot {alive:?} ago at most");
    assert_eq!(complaints, "");
    remove(scene);
}

/// Whether the host is there for the tests alone: what its kernel was told by `tests/nested` says so.
fn has_a_clock_to_spare() -> bool {
    fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains("inlay.inside="))
}

/// A step of the host's wall clock, which is taken back in the end.
struct Step(Duration);

impl Step {
    fn ahead(by: Duration) -> Self {
        set_wall_clock(|now| now + by);
        Self(by)
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        set_wall_clock(|now| now - self.0);
    }
}

fn set_wall_clock(change: impl FnOnce(Duration) -> Duration) {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).expect("the wall clock");
    let time = TimeSpec::from_duration(change(now.into()));
    clock_settime(ClockId::CLOCK_REALTIME, time).expect("the nested host's root sets its clock");
}

/// A container is asked for the time again and again; the quickest answer tells most exactly.
#[track_caller]
fn assert_accurate(scene: &Scene) {
    let id = scene.id("clock");
    let mut command = containerd().command();
    command.args(["run", "--rm", "--runtime", scene.runtime.name(), images::BUSYBOX, &id]);
    command.args(["sh", "-c", "while read x; do adjtimex; done"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (mut input, mut answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()).lines());
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut best: Option<(Duration, f64)> = None;
    for _ in 0..30 {
        let asked = now();
        input.write_all(b"x\n").unwrap();
        let said = read_time(&mut answers);
        let answered = now();
        let taken = answered - asked;
        let off = said - (asked + taken / 2).as_secs_f64();
        if best.is_none_or(|(least, _)| taken < least) {
            best = Some((taken, off));
        }
    }
    drop(input);
    assert!(child.wait().unwrap().success());
    let (taken, off) = best.unwrap();
    println!("the guest's clock is off by {:.1} ms, to within {:.1} ms", off * 1e3, taken.as_secs_f64() * 500.0);
    let bound = ACCURACY + taken / 2;
    assert!(off.abs() <= bound.as_secs_f64(), "off by {off} s, asked in {taken:?}");
}

/// What busybox's `adjtimex` prints, in seconds since 1970.
fn read_time(lines: &mut impl Iterator<Item = std::io::Result<String>>) -> f64 {
    let mut number = |name: &str| {
        let line = lines.by_ref().map(Result::unwrap).find(|line| line.contains(name)).expect("a line of adjtimex");
        line.split_whitespace().last().unwrap().parse::<u32>().unwrap()
    };
    let (seconds, microseconds) = (number("time.tv_sec"), number("time.tv_usec"));
    let _last = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("return value")));
    f64::from(seconds) + f64::from(microseconds) / 1e6
}
