//! A sandbox that was restored is nobody else.

use std::collections::HashMap;
use std::env;

use inlay_tests::harness::Scene;

use super::{make, remove, run_at_once, with_factory};

crate::for_inlay!(shares_nothing_random_with_another_clone);

/// How many clones are compared; the variable asks for more.
const CLONES: usize = 10;
const VARIABLE: &str = "INLAY_CLONES";
/// How many of them start at a time.
const BATCH: usize = 5;
/// What a clone says of itself. None has an interface that could have another's address, nor a machine id.
const LOOK: &str = r#"
    echo $(grep : /proc/net/dev | cut -d : -f 1) $(cat /etc/machine-id)
    dmesg | grep 'inlay-agent: template' | tr -d '[]'
    cut -d ' ' -f 1 /proc/uptime
    cut -d ' ' -f 1 /proc/uptime
    head -c 4096 /dev/urandom | od -An -v -tx1 | tr -d ' \n'; echo
    cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; hostname"#;
/// What must not be shared, in hexadecimal digits: 32 bytes.
const SHARED: usize = 64;

fn shares_nothing_random_with_another_clone(scene: &Scene) {
    let clones = env::var(VARIABLE).ok().and_then(|count| count.parse().ok()).unwrap_or(CLONES);
    with_factory(scene, "", "");
    make(scene);
    let mut owner: HashMap<Vec<u8>, usize> = HashMap::new();
    for first in (0..clones).step_by(BATCH) {
        let batch = BATCH.min(clones - first);
        for (number, output) in run_at_once(scene, batch, &["sh", "-c", LOOK]).into_iter().enumerate() {
            compare(&mut owner, first + number, &output);
        }
    }
    remove(scene);
}

/// Notes what is the clone's own, and fails if another one has the same.
fn compare(owner: &mut HashMap<Vec<u8>, usize>, clone: usize, output: &str) {
    let lines: Vec<&str> = output.lines().collect();
    let [shared, saved, up, later, random, names @ ..] = lines.as_slice() else { panic!("{output}") };
    assert_eq!(*shared, "lo", "another interface than the loopback device, or a machine id");
    let [up, later] = [up, later].map(|seconds| seconds.parse::<f64>().unwrap());
    // Only a guest that was restored has the line. It has the time at which the template was about to be saved.
    let saved: f64 = saved.split_whitespace().next().unwrap().parse().unwrap();
    assert!(saved <= up && up <= later, "time goes backwards: {saved} s when saved, then {up} s and {later} s");
    assert!(random.len() == 8192 && names.len() == 3, "{output}");
    let windows = random.as_bytes().windows(SHARED).step_by(2).map(<[u8]>::to_vec);
    let names = names.iter().map(|name| name.as_bytes().to_vec());
    for piece in windows.chain(names) {
        let text = String::from_utf8_lossy(&piece).into_owned();
        let other = *owner.entry(piece).or_insert(clone);
        assert_eq!(other, clone, "clones {other} and {clone} share {text}");
    }
}
