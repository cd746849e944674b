//! Compiles the filter files into BPF programs, which the crate embeds.

#[path = "src/rules.rs"]
#[allow(missing_docs, reason = "documented where it is a module of the crate")]
mod rules;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use rules::{Condition, Constants, Rule};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use syscalls::Sysno;

const FILTERS: &str = "filters";
/// Each becomes a constant of the same name in capitals.
const ROLES: [&str; 6] = ["ceiling", "api", "io", "vcpu", "fs", "uffd"];

fn main() -> Result<(), String> {
    println!("cargo::rerun-if-changed={FILTERS}");
    println!("cargo::rerun-if-changed=src/rules.rs");
    let directory = Path::new(FILTERS);
    let constants = rules::constants(directory)?;
    let mut text = String::new();
    for role in ROLES {
        let compiled = role_filter(&rules::rules(directory, role)?, &constants)?;
        embed(&mut text, &role.to_uppercase(), &compiled);
    }
    embed(&mut text, "HELPER", &refusing(&rules::rules(directory, "helper")?, libc::EPERM)?);
    embed(&mut text, "REFUSE_CLONE3", &refuse_clone3()?);
    let out = env::var_os("OUT_DIR").map(PathBuf::from).ok_or("Cargo sets OUT_DIR")?;
    fs::write(out.join("filters.rs"), text).map_err(|error| error.to_string())
}

fn role_filter(rules: &[Rule], constants: &Constants) -> Result<BpfProgram, String> {
    let mut table: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    // A call that one rule allows without a condition is allowed, whatever others say: no chain means that to
    // seccompiler, so such a call is remembered apart.
    let mut free = Vec::new();
    for rule in rules {
        let condition = rule.condition(constants)?;
        for call in &rule.calls {
            let number = i64::from(call.id());
            let chain = table.entry(number).or_default();
            match &condition {
                Condition::Any => free.push(number),
                Condition::OneOf { argument, values } => {
                    for &value in values {
                        chain.push(one(*argument, SeccompCmpOp::Eq, value)?);
                    }
                }
                Condition::Masked { argument, mask, value } => {
                    chain.push(one(*argument, SeccompCmpOp::MaskedEq(*mask), *value)?);
                }
            }
        }
    }
    for number in free {
        table.insert(number, Vec::new());
    }
    compile(table, SeccompAction::Trap, SeccompAction::Allow)
}

/// For a process that starts programs of others, which inherit the filter: all is allowed that is not refused.
fn refusing(rules: &[Rule], errno: i32) -> Result<BpfProgram, String> {
    let calls = rules.iter().flat_map(|rule| &rule.calls);
    let table = calls.map(|call| (i64::from(call.id()), Vec::new())).collect();
    compile(table, SeccompAction::Allow, SeccompAction::Errno(errno.cast_unsigned()))
}

/// Only the lower half of an argument is compared: the kernel reads no more of those that the files name.
fn one(argument: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompRule, String> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value);
    SeccompRule::new(vec![condition.map_err(|error| error.to_string())?]).map_err(|error| error.to_string())
}

/// The flags of clone3 are in memory, where a filter cannot look. Told that there is no such call, the C library
/// takes clone, whose flags are in a register.
fn refuse_clone3() -> Result<BpfProgram, String> {
    let clone3 = Rule { calls: vec![Sysno::clone3], ..Rule::default() };
    refusing(&[clone3], libc::ENOSYS)
}

fn compile(
    table: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, String> {
    let filter = SeccompFilter::new(table, otherwise, matched, TargetArch::x86_64);
    filter.and_then(BpfProgram::try_from).map_err(|error| error.to_string())
}

fn embed(text: &mut String, name: &str, program: &BpfProgram) {
    let _ = writeln!(text, "const {name}: &[sock_filter] = &[");
    for step in program {
        let _ =
            writeln!(text, "sock_filter {{ code: {}, jt: {}, jf: {}, k: {} }},", step.code, step.jt, step.jf, step.k);
    }
    text.push_str("];\n");
}
