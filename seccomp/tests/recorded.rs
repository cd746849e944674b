//! Nothing unused: each rule of a role was needed by a recorded run, or says in `unseen` why none needed it; and each
//! call of a recorded run is allowed. `recorded/` has the calls of the roles' threads, written by `tests/record`.

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

/// Files whose rules a recording must have used, and the recordings that may: what several roles include, one of them
/// must have used. `main` has the calls of the thread that builds machines, under the ceiling alone.
const FILES: [(&str, &[&str]); 9] = [
    ("vcpu", &["vcpu"]),
    ("io", &["io"]),
    ("uffd", &["uffd"]),
    ("fs", &["fs"]),
    ("api", &["api", "main"]),
    ("ceiling", &["main", "api", "vcpu", "io", "uffd", "fs"]),
    ("thread", &["vcpu", "io", "uffd", "fs", "api", "main"]),
    ("spawn", &["vcpu", "io", "uffd", "fs", "api", "main"]),
    ("vhost", &["vcpu", "io"]),
];
/// Files that are not among them: numbers, and refusals, which no run shows the use of.
const NOT_HELD: [&str; 2] = ["constants", "helper"];

#[test]
fn no_rule_is_there_for_nothing() {
    let constants = rules::constants(filters()).expect("constants");
    let mut unused = Vec::new();
    for (file, recordings) in FILES {
        let seen: Seen = recordings.iter().flat_map(|recording| seen(recording)).collect();
        let rules = rules::own_rules(filters(), file).expect("rules");
        for rule in rules.iter().filter(|rule| rule.unseen.is_none()) {
            let called = |call: &&Sysno| seen.iter().any(|one| one.0 == **call && serves(rule, &constants, one));
            unused.extend(rule.calls.iter().filter(|call| !called(call)).map(|call| format!("{file}: {call}")));
            // A device's requests are many calls by one name.
            let ioctls = rule.calls.contains(&Sysno::ioctl).then_some(&rule.values);
            let made = |name: &&String| seen.contains(&(Sysno::ioctl, constants.get(*name).copied()));
            unused
                .extend(ioctls.into_iter().flatten().filter(|name| !made(name)).map(|name| format!("{file}: {name}")));
        }
    }
    assert!(unused.is_empty(), "rules that no recorded run needed: {unused:#?}");
}

#[test]
fn what_was_recorded_is_allowed() {
    let constants = rules::constants(filters()).expect("constants");
    let mut refused = Vec::new();
    let recorded =
        [("vcpu", "vcpu"), ("io", "io"), ("uffd", "uffd"), ("fs", "fs"), ("api", "api"), ("ceiling", "main")];
    for (role, recording) in recorded {
        let rules = rules::rules(filters(), role).expect("rules");
        for call in seen(recording).iter().filter(|(call, _)| !ENTERING.contains(&call.name())) {
            if !rules.iter().any(|rule| serves(rule, &constants, call)) {
                refused.push(format!("{role}: {call:?}"));
            }
        }
    }
    assert!(refused.is_empty(), "recorded, and not allowed: {refused:#?}");
}

#[test]
fn every_filter_file_is_accounted_for() {
    for entry in std::fs::read_dir(filters()).expect("filters") {
        let name = entry.expect("entry").file_name().into_string().expect("name");
        let file = name.strip_suffix(".toml").expect("a filter file");
        assert!(NOT_HELD.contains(&file) || FILES.iter().any(|(held, _)| *held == file), "{name}");
    }
}

#[test]
fn every_constant_is_used() {
    let roles = ["ceiling", "api", "io", "vcpu", "fs", "uffd", "helper"];
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
