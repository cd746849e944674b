//! From rules to a BPF program as seccomp(2) takes it. Read by the build script, and by the tests of what it makes.
//!
//! seccompiler makes what looks at bits of a call's arguments. It compares with one number after the other; here a call's number,
//! and an argument that is one of a list, are found by halving. The kernel translates a program and asks it about every call that
//! there is whenever a thread comes under it: its length is what confining a thread takes.

use std::collections::{BTreeMap, BTreeSet};

use libc::{SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_TRAP};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use syscalls::Sysno;

use super::rules::{Condition, Constants, Rule};

/// AUDIT_ARCH_X86_64 (linux/audit.h): a call by another table has other numbers.
const ARCHITECTURE: u32 = 0xc000_003e;
/// __X32_SYSCALL_BIT (asm/unistd.h): the same calls, for programs with short pointers.
const X32: u32 = 0x4000_0000;

/// Offsets in seccomp_data (linux/seccomp.h).
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;
const ARGUMENT_SIZE: u32 = 8;

/// Ranges of numbers that are compared one by one: more take longer than halving them, fewer make the program larger.
const CHAIN: usize = 24;

/// BPF_LD | BPF_W | BPF_ABS (linux/bpf_common.h), as all of these: a word of seccomp_data.
pub const LOAD: u16 = 0x20;
/// BPF_JMP | BPF_JEQ | BPF_K
pub const IF_EQUAL: u16 = 0x15;
/// BPF_JMP | BPF_JGE | BPF_K
pub const IF_AT_LEAST: u16 = 0x35;
/// BPF_JMP | BPF_JA, by more than a condition can.
pub const SKIP: u16 = 0x05;
/// BPF_RET | BPF_K
pub const ANSWER: u16 = 0x06;

/// One instruction.
pub type Step = seccompiler::sock_filter;

/// A call's fate.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    /// What the kernel is to do (SECCOMP_RET_*).
    Always(u32),
    /// It is allowed if one of these is true, and trapped else.
    If(Vec<Condition>),
}

/// The program that allows what `rules` allow, and traps the rest. The flags of clone3 are in memory, where a filter cannot
/// look. Told that there is no such call, the C library takes clone, whose flags are in a register.
pub fn allowing(rules: &[Rule], constants: &Constants) -> Result<Vec<Step>, String> {
    let mut answers: BTreeMap<u32, Answer> = BTreeMap::new();
    for rule in rules {
        let condition = rule.condition(constants)?;
        for call in &rule.calls {
            let answer = answers.entry(number(*call)?).or_insert_with(|| Answer::If(Vec::new()));
            match (answer, &condition) {
                // Allowed by one rule, whatever others say.
                (Answer::Always(_), _) => {}
                (answer, Condition::Any) => *answer = Answer::Always(SECCOMP_RET_ALLOW),
                (Answer::If(conditions), condition) => conditions.push(condition.clone()),
            }
        }
    }
    answers.insert(number(Sysno::clone3)?, errno(libc::ENOSYS)?);
    program(&ranges(answers, SECCOMP_RET_TRAP))
}

/// The program that refuses what `rules` name with `code`, as well as all calls with short pointers, and allows the rest.
pub fn refusing(rules: &[Rule], code: i32) -> Result<Vec<Step>, String> {
    let refused = errno(code)?;
    let calls = rules.iter().flat_map(|rule| &rule.calls);
    let answers =
        calls.map(|call| Ok((number(*call)?, refused.clone()))).collect::<Result<BTreeMap<_, _>, String>>()?;
    let mut ranges = ranges(answers, SECCOMP_RET_ALLOW);
    ranges.push((X32, refused));
    program(&ranges)
}

fn number(call: Sysno) -> Result<u32, String> {
    u32::try_from(call.id()).map_err(|_| format!("{call} has no number"))
}

fn errno(code: i32) -> Result<Answer, String> {
    let code = u32::try_from(code).map_err(|_| format!("{code} is no error number"))?;
    Ok(Answer::Always(SECCOMP_RET_ERRNO | code))
}

fn program(ranges: &[(u32, Answer)]) -> Result<Vec<Step>, String> {
    let mut steps = vec![
        load(ARCHITECTURE_AT),
        Step { code: IF_EQUAL, jt: 1, jf: 0, k: ARCHITECTURE },
        answer(SECCOMP_RET_KILL_PROCESS),
        load(NUMBER_AT),
    ];
    steps.extend(search(ranges)?);
    Ok(steps)
}

/// The first of each range of numbers with the same answer, from 0 on without a gap.
fn ranges(answers: BTreeMap<u32, Answer>, otherwise: u32) -> Vec<(u32, Answer)> {
    let otherwise = Answer::Always(otherwise);
    let mut ranges = vec![(0, otherwise.clone())];
    for (number, answer) in answers {
        if ranges.last().is_some_and(|(first, _)| *first == number) {
            ranges.pop();
        }
        if ranges.last().is_none_or(|(_, before)| *before != answer) {
            ranges.push((number, answer));
        }
        if let Some(next) = number.checked_add(1) {
            ranges.push((next, otherwise.clone()));
        }
    }
    ranges
}

/// Finds the range of the number that was loaded.
fn search(ranges: &[(u32, Answer)]) -> Result<Vec<Step>, String> {
    if let Some(steps) = chain(ranges) {
        return Ok(steps);
    }
    let (below, above) = ranges.split_at(ranges.len() / 2);
    match (below, above) {
        ([], [(first, Answer::If(conditions))]) => match list(conditions)? {
            Some((argument, values)) => listed(argument, values),
            None => check(*first, conditions),
        },
        ([], [(_, Answer::Always(fate))]) => Ok(vec![answer(*fate)]),
        (below, [(first, _), ..]) => {
            let (below, above) = (search(below)?, search(above)?);
            let skip = below.len();
            let mut steps = match u8::try_from(skip) {
                Ok(jt) => vec![Step { code: IF_AT_LEAST, jt, jf: 0, k: *first }],
                Err(_) => vec![
                    Step { code: IF_AT_LEAST, jt: 0, jf: 1, k: *first },
                    Step { code: SKIP, jt: 0, jf: 0, k: length(skip)? },
                ],
            };
            steps.extend(below);
            steps.extend(above);
            Ok(steps)
        }
        (_, []) => Err("There is no call".into()),
    }
}

/// Compares with one range after the other, where there are few and no argument is looked at: they share their answers.
fn chain(ranges: &[(u32, Answer)]) -> Option<Vec<Step>> {
    if ranges.len() > CHAIN {
        return None;
    }
    let fate = |(_, answer): &(u32, Answer)| match answer {
        Answer::Always(fate) => Some(*fate),
        Answer::If(_) => None,
    };
    let fates = ranges.iter().map(fate).collect::<Option<Vec<_>>>()?;
    let mut answers: Vec<u32> = Vec::new();
    for fate in &fates {
        if !answers.contains(fate) {
            answers.push(*fate);
        }
    }
    // From above: the first test that a number passes is its own. What passes none is in the first range, whose answer follows.
    let mut tests = Vec::new();
    let mut rest = ranges;
    while let [.., (first, _)] = rest {
        let fate = |back: usize| fates.get(rest.len().checked_sub(back)?);
        match rest {
            // A number by itself, with the same answer on both sides.
            [.., _, (single, _), _] if single + 1 == *first && fate(1) == fate(3) => {
                tests.push((IF_EQUAL, *single, fate(2)?));
                rest = rest.split_at(rest.len() - 2).0;
            }
            [_] => break,
            _ => {
                tests.push((IF_AT_LEAST, *first, fate(1)?));
                rest = rest.split_at(rest.len() - 1).0;
            }
        }
    }
    let mut steps = Vec::new();
    for (left, (code, number, fate)) in (0..tests.len()).rev().zip(tests) {
        let place = answers.iter().position(|answer| answer == fate)?;
        steps.push(Step { code, jt: u8::try_from(left + place).ok()?, jf: 0, k: number });
    }
    steps.extend(answers.into_iter().map(answer));
    Some(steps)
}

/// The argument that all conditions are about, and the values that one of them allows, if they are nothing but lists.
fn list(conditions: &[Condition]) -> Result<Option<(u8, BTreeSet<u32>)>, String> {
    let (mut about, mut all) = (None, BTreeSet::new());
    for condition in conditions {
        let Condition::OneOf { argument, values } = condition else { return Ok(None) };
        if about.is_some_and(|about| about != *argument) {
            return Ok(None);
        }
        about = Some(*argument);
        for value in values {
            all.insert(half(*value)?);
        }
    }
    Ok(about.map(|argument| (argument, all)))
}

/// Allows what has one of `values` in the lower half of an argument, and traps the rest.
fn listed(argument: u8, values: BTreeSet<u32>) -> Result<Vec<Step>, String> {
    let allowed = values.into_iter().map(|value| (value, Answer::Always(SECCOMP_RET_ALLOW))).collect();
    let mut steps = vec![load(ARGUMENTS_AT + ARGUMENT_SIZE * u32::from(argument))];
    steps.extend(search(&ranges(allowed, SECCOMP_RET_TRAP))?);
    Ok(steps)
}

/// Allows what meets one of the conditions, in the order of the files, and traps the rest.
fn check(call: u32, conditions: &[Condition]) -> Result<Vec<Step>, String> {
    let mut chain = Vec::new();
    for condition in conditions {
        match condition {
            Condition::Any => return Ok(vec![answer(SECCOMP_RET_ALLOW)]),
            Condition::OneOf { argument, values } => {
                for &value in values {
                    chain.push(one(*argument, SeccompCmpOp::Eq, value)?);
                }
            }
            Condition::Masked { argument, mask, value } => {
                chain.push(one(*argument, SeccompCmpOp::MaskedEq(u64::from(half(*mask)?)), *value)?);
            }
        }
    }
    let table = [(i64::from(call), chain)].into();
    let filter = SeccompFilter::new(table, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64);
    let program = filter.and_then(BpfProgram::try_from).map_err(|error| error.to_string())?;
    // What comes before the arguments was done when the number was found: the last of it compares the number, and goes on
    // with the next instruction if it is this one. The range may have more numbers.
    let found = Step { code: IF_EQUAL, jt: 0, jf: 1, k: call };
    let found = program.iter().position(|step| *step == found).ok_or("seccompiler compares no number")?;
    Ok(program.into_iter().skip(found + 1).collect())
}

/// Only the lower half of an argument is compared: the kernel reads no more of those that the files name.
fn one(argument: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompRule, String> {
    let value = u64::from(half(value)?);
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value);
    SeccompRule::new(vec![condition.map_err(|error| error.to_string())?]).map_err(|error| error.to_string())
}

fn load(offset: u32) -> Step {
    Step { code: LOAD, jt: 0, jf: 0, k: offset }
}

fn answer(fate: u32) -> Step {
    Step { code: ANSWER, jt: 0, jf: 0, k: fate }
}

fn half(value: u64) -> Result<u32, String> {
    u32::try_from(value).map_err(|_| format!("{value:#x} is more than half an argument"))
}

fn length(steps: usize) -> Result<u32, String> {
    u32::try_from(steps).map_err(|_| "The program is too long".into())
}
