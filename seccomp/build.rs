//! Compiles the filter files into BPF programs, which the crate embeds.

#[path = "src/compile.rs"]
mod compile;
#[path = "src/rules.rs"]
#[allow(missing_docs, reason = "documented where it is a module of the crate")]
mod rules;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use compile::Step;

const FILTERS: &str = "filters";
/// Each becomes a constant of the same name in capitals.
const ROLES: [&str; 6] = ["ceiling", "api", "io", "vcpu", "fs", "uffd"];

fn main() -> Result<(), String> {
    println!("cargo::rerun-if-changed={FILTERS}");
    println!("cargo::rerun-if-changed=src/rules.rs");
    println!("cargo::rerun-if-changed=src/compile.rs");
    let directory = Path::new(FILTERS);
    let constants = rules::constants(directory)?;
    let mut text = String::new();
    for role in ROLES {
        let compiled = compile::allowing(&rules::rules(directory, role)?, &constants)?;
        embed(&mut text, &role.to_uppercase(), &compiled);
    }
    embed(&mut text, "HELPER", &compile::refusing(&rules::rules(directory, "helper")?, libc::EPERM)?);
    let out = env::var_os("OUT_DIR").map(PathBuf::from).ok_or("Cargo sets OUT_DIR")?;
    fs::write(out.join("filters.rs"), text).map_err(|error| error.to_string())
}

fn embed(text: &mut String, name: &str, program: &[Step]) {
    let _ = writeln!(text, "const {name}: &[sock_filter] = &[");
    for step in program {
        let _ =
            writeln!(text, "sock_filter {{ code: {}, jt: {}, jf: {}, k: {} }},", step.code, step.jt, step.jf, step.k);
    }
    text.push_str("];\n");
}
