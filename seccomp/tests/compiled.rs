//! What the compiled programs answer, for each call there is, is what the rules say.

use std::collections::BTreeSet;
use std::path::Path;

use syscalls::Sysno;

#[path = "../src/compile.rs"]
mod compile;
#[path = "../src/rules.rs"]
#[allow(dead_code, missing_docs, reason = "the build script needs more of it")]
mod rules;

use compile::{ANSWER, IF_AT_LEAST, IF_EQUAL, LOAD, SKIP, Step};
use rules::{Condition, Constants, Rule};

/// BPF_ALU | BPF_AND | BPF_K (linux/bpf_common.h), which seccompiler makes of a masked argument.
const AND: u16 = 0x54;

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const X32: u32 = 0x4000_0000;
/// Past the last call.
const NUMBERS: u32 = 600;
const REFUSED: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned();

/// What a call is to the filter: `struct seccomp_data`.
#[derive(Debug, Clone, Copy)]
struct Call {
    number: u32,
    architecture: u32,
    arguments: [u64; 6],
}

impl Call {
    fn new(number: u32, argument: u64) -> Self {
        Self { number, architecture: X86_64, arguments: [argument; 6] }
    }

    fn word(&self, offset: u32) -> u32 {
        match offset {
            0 => self.number,
            4 => self.architecture,
            // Only lower halves are looked at, which come first.
            _ => {
                assert!(offset >= 16 && offset.is_multiple_of(8), "{offset}");
                let argument = self.arguments[(offset as usize - 16) / 8].to_le_bytes();
                u32::from_le_bytes([argument[0], argument[1], argument[2], argument[3]])
            }
        }
    }
}

/// What the kernel does with a program.
fn run(program: &[Step], call: &Call) -> u32 {
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let Step { code, jt, jf, k } = program[at].clone();
        at += 1;
        let jump = |condition: bool| usize::from(if condition { jt } else { jf });
        match code {
            LOAD => accumulator = call.word(k),
            AND => accumulator &= k,
            IF_EQUAL => at += jump(accumulator == k),
            IF_AT_LEAST => at += jump(accumulator >= k),
            SKIP => at += k as usize,
            ANSWER => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn filters() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/filters"))
}

/// What the rules say of a call, read one by one.
fn expected(conditions: &[(BTreeSet<u32>, Condition)], call: &Call) -> u32 {
    if call.number == Sysno::clone3.id().cast_unsigned() {
        return libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    }
    let lower = |argument: u8| call.arguments[usize::from(argument)] & 0xffff_ffff;
    let met = |condition: &Condition| match condition {
        Condition::Any => true,
        Condition::OneOf { argument, values } => values.contains(&lower(*argument)),
        Condition::Masked { argument, mask, value } => lower(*argument) & mask == *value,
    };
    match conditions.iter().any(|(calls, condition)| calls.contains(&call.number) && met(condition)) {
        true => libc::SECCOMP_RET_ALLOW,
        false => libc::SECCOMP_RET_TRAP,
    }
}

fn numbers(rule: &Rule) -> BTreeSet<u32> {
    rule.calls.iter().map(|call| call.id().cast_unsigned()).collect()
}

/// All values that a rule names, their neighbours, and some that none names.
fn telling(rules: &[Rule], constants: &Constants) -> BTreeSet<u64> {
    let named = rules.iter().flat_map(|rule| [&rule.values, &rule.with, &rule.without]).flatten();
    let values = named.map(|name| constants[name]);
    let near = values.flat_map(|value| [value, value + 1, value.wrapping_sub(1), value | 0xdead_0000_0000_0000]);
    near.chain([0, 0x4711, u64::from(u32::MAX), u64::MAX]).collect()
}

#[test]
fn each_call_of_a_role_is_answered_as_its_rules_say() {
    let constants = rules::constants(filters()).expect("constants");
    for role in ["ceiling", "api", "io", "vcpu", "fs", "uffd"] {
        let rules = rules::rules(filters(), role).expect("rules");
        let program = compile::allowing(&rules, &constants).expect("compiled");
        let values = telling(&rules, &constants);
        let conditions: Vec<_> =
            rules.iter().map(|rule| (numbers(rule), rule.condition(&constants).expect("condition"))).collect();
        for number in 0..NUMBERS {
            let looked_at = conditions
                .iter()
                .any(|(calls, condition)| calls.contains(&number) && !matches!(condition, Condition::Any));
            for &value in values.iter().take(if looked_at { values.len() } else { 2 }) {
                let call = Call::new(number, value);
                assert_eq!(run(&program, &call), expected(&conditions, &call), "{role}: {call:x?}");
            }
        }
    }
}

#[test]
fn calls_by_other_tables_are_not_allowed() {
    let constants = rules::constants(filters()).expect("constants");
    let role = compile::allowing(&rules::rules(filters(), "vcpu").expect("rules"), &constants).expect("compiled");
    let helper = compile::refusing(&rules::rules(filters(), "helper").expect("rules"), libc::EPERM).expect("compiled");
    for number in 0..NUMBERS {
        let foreign = Call { architecture: I386, ..Call::new(number, 0) };
        let short = Call::new(X32 | number, 0);
        assert_eq!(run(&role, &foreign), libc::SECCOMP_RET_KILL_PROCESS);
        assert_eq!(run(&helper, &foreign), libc::SECCOMP_RET_KILL_PROCESS);
        assert_eq!(run(&role, &short), libc::SECCOMP_RET_TRAP);
        assert_eq!(run(&helper, &short), REFUSED);
    }
    assert_eq!(run(&role, &Call::new(u32::MAX, 0)), libc::SECCOMP_RET_TRAP);
}

#[test]
fn the_helper_is_refused_what_its_file_names() {
    let rules = rules::rules(filters(), "helper").expect("rules");
    let refused: BTreeSet<_> = rules.iter().flat_map(numbers).collect();
    let program = compile::refusing(&rules, libc::EPERM).expect("compiled");
    for number in 0..NUMBERS {
        let answer = if refused.contains(&number) { REFUSED } else { libc::SECCOMP_RET_ALLOW };
        assert_eq!(run(&program, &Call::new(number, 0)), answer, "{number}");
    }
}

#[test]
fn what_cannot_be_compared_is_no_filter() {
    let rule = |values: &[&str]| Rule {
        calls: vec![Sysno::ioctl],
        argument: Some(1),
        values: values.iter().map(|name| (*name).to_owned()).collect(),
        ..Rule::default()
    };
    let constants: Constants = [("wide".into(), 1 << 32), ("narrow".into(), (1 << 32) - 1)].into();
    assert!(compile::allowing(&[rule(&["narrow"])], &constants).is_ok());
    assert!(compile::allowing(&[rule(&["wide"])], &constants).is_err());
}
