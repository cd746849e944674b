//! A sandbox that was restored is nobody else.

use std::collections::HashMap;
use std::env;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use inlay_tests::harness::{Scene, containerd};
use inlay_tests::images;

use super::{make, remove, take_starts, with_factory};

crate::for_inlay!(shares_nothing_random_with_another_clone, has_the_hosts_time);

/// How many clones are compared; the variable asks for more.
const CLONES: usize = 10;
const VARIABLE: &str = "INLAY_CLONES";
/// What must not be shared, in hexadecimal digits: 32 bytes.
const SHARED: usize = 64;
/// The accuracy that is promised.
const ACCURACY: Duration = Duration::from_millis(10);

fn shares_nothing_random_with_another_clone(scene: &Scene) {
    let clones = env::var(VARIABLE).ok().and_then(|count| count.parse().ok()).unwrap_or(CLONES);
    with_factory(scene, "", "");
    make(scene);
    take_starts();
    let script = "head -c 4096 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'; echo; \
                  cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; hostname";
    let mut owner: HashMap<Vec<u8>, usize> = HashMap::new();
    for clone in 0..clones {
        let output = scene.run(&["sh", "-c", script]).ok().stdout;
        let lines: Vec<&str> = output.lines().collect();
        assert_eq!(lines.len(), 4, "{output}");
        let random = lines[0].as_bytes();
        assert_eq!(random.len(), 8192, "{output}");
        let windows = random.windows(SHARED).step_by(2).map(<[u8]>::to_vec);
        let names = lines[1..].iter().map(|line| line.as_bytes().to_vec());
        for piece in windows.chain(names) {
            let text = String::from_utf8_lossy(&piece).into_owned();
            let other = *owner.entry(piece).or_insert(clone);
            assert_eq!(other, clone, "clones {other} and {clone} share {text}");
        }
    }
    let starts = take_starts();
    assert!(starts.len() == clones && starts.iter().all(|start| start.restored), "{starts:?}");
    remove(scene);
}

/// The container is asked for the time again and again; the quickest answer tells most exactly.
fn has_the_hosts_time(scene: &Scene) {
    with_factory(scene, "", "");
    make(scene);
    let id = scene.id("clock");
    let mut command = containerd().command();
    command.args(["run", "--rm", "--runtime", scene.runtime.name(), images::BUSYBOX, &id]);
    command.args(["sh", "-c", "while read x; do date +%s.%N; done"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (mut input, mut answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()).lines());
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut best: Option<(Duration, f64)> = None;
    for _ in 0..30 {
        let asked = now();
        input.write_all(b"x\n").unwrap();
        let answer = answers.next().unwrap().unwrap();
        let (answered, said) = (now(), answer.trim().parse::<f64>().unwrap());
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
    remove(scene);
}
