//! A sandbox that was restored is nobody else.

use std::collections::HashMap;
use std::env;

use inlay_tests::harness::Scene;

use super::{make, remove, take_starts, with_factory};

crate::for_inlay!(shares_nothing_random_with_another_clone);

/// How many clones are compared; the variable asks for more.
const CLONES: usize = 10;
const VARIABLE: &str = "INLAY_CLONES";
/// What must not be shared, in hexadecimal digits: 32 bytes.
const SHARED: usize = 64;

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
