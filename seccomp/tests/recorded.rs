//! Nothing unused: each rule of a role was needed by a recorded run, or says in `unseen` why none needed it; and each
//! call of a recorded run is allowed. For the roles that machines on this host's own KVM have: `recorded/` has the calls of the roles' threads, written by `tests/record`.

use std::collections::BTreeSet;
use std::path::Path;

use syscalls::Sysno;

#[path = "../src/rules.rs"]
#[allow(dead_code, missing_docs, reason = "the build script needs more of it")]
mod rules;

use rules::{Constants, Rule};

/// Calls of a thread before it is confined, by which it is.
const ENTERING: [&str; 13] = [
    "capget",
    "capset",
    "landlock_create_ruleset",
    "landlock_add_rule",
    "landlock_restrict_self",
    "prctl",
    "seccomp",
    "rt_sigaction",
    "set_robust_list",
    "rseq",
    "sched_getaffinity",
    "getrandom",
    // The allocator counts the processors, for the first block of the ninth thread.
    "openat",
];

/// A call, and the value of the argument by which ioctls differ.
type Seen = BTreeSet<(Sysno, Option<u64>)>;

fn filters() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/filters"))
}

fn seen(role: &str) -> Seen {
    let path = format!("{}/recorded/{role}.txt", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let constants = rules::constants(filters()).expect("constants");
    text.lines()
        .map(|line| {
            let (call, request) = line.split_once(' ').map_or((line, None), |(call, request)| (call, Some(request)));
            let number = request.map(|name| *constants.get(name).unwrap_or_else(|| panic!("{name} is unknown")));
            (call.parse().unwrap_or_else(|()| panic!("{call} is unknown")), number)
        })
        .collect()
}

fn serves(rule: &Rule, constants: &Constants, (call, request): &(Sysno, Option<u64>)) -> bool {
    let numbers = rule.values.iter().map(|name| constants.get(name).copied());
    rule.calls.contains(call) && (*call != Sysno::ioctl || numbers.into_iter().any(|number| number == *request))
}

#[test]
fn no_rule_is_there_for_nothing() {
    let constants = rules::constants(filters()).expect("constants");
    let mut unused = Vec::new();
    for role in ["vcpu", "io", "uffd"] {
        let seen = seen(role);
        for rule in rules::rules(filters(), role).expect("rules").iter().filter(|rule| rule.unseen.is_none()) {
            for call in &rule.calls {
                let hit = |one: &&(Sysno, Option<u64>)| one.0 == *call && serves(rule, &constants, one);
                if seen.iter().find(hit).is_none() {
                    unused.push(format!("{role}: {call}"));
                }
            }
        }
    }
    // What every thread may do, some role did.
    let thread: BTreeSet<Sysno> =
        rules::rules(filters(), "thread").expect("rules").iter().flat_map(|rule| rule.calls.clone()).collect();
    let everywhere: Seen = ["vcpu", "io", "uffd"].into_iter().flat_map(seen).collect();
    unused.retain(|entry| {
        let call: Sysno = entry.rsplit(' ').next().and_then(|call| call.parse().ok()).expect("a call");
        !(thread.contains(&call) && everywhere.iter().any(|(seen, _)| *seen == call))
    });
    assert!(unused.is_empty(), "rules that no recorded run needed: {unused:#?}");
}

#[test]
fn what_was_recorded_is_allowed() {
    let constants = rules::constants(filters()).expect("constants");
    for role in ["vcpu", "io", "uffd"] {
        let rules = rules::rules(filters(), role).expect("rules");
        for call in seen(role).iter().filter(|(call, _)| !ENTERING.contains(&call.name())) {
            assert!(rules.iter().any(|rule| serves(rule, &constants, call)), "{role}: {call:?} is not allowed");
        }
    }
}

#[test]
fn every_constant_is_used() {
    let roles = ["ceiling", "api", "io", "vcpu", "fs", "uffd", "sandbox"];
    let all: Vec<Rule> = roles.iter().flat_map(|role| rules::rules(filters(), role).expect("rules")).collect();
    let used: BTreeSet<&String> =
        all.iter().flat_map(|rule| rule.values.iter().chain(&rule.with).chain(&rule.without)).collect();
    let constants = rules::constants(filters()).expect("constants");
    let unused: Vec<_> = constants.keys().filter(|name| !used.contains(name)).collect();
    assert!(unused.is_empty(), "{unused:?}");
}

#[test]
fn no_role_may_leave_its_process() {
    let all = rules::rules(filters(), "ceiling").expect("rules");
    for forbidden in
        ["execve", "execveat", "fork", "vfork", "mount", "umount2", "setns", "ptrace", "pivot_root", "chroot", "bpf"]
    {
        let call: Sysno = forbidden.parse().expect("a call");
        assert!(!all.iter().any(|rule| rule.calls.contains(&call)), "{forbidden}");
    }
}
