//! Which shared libraries a program needs, read from its ELF headers.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use goblin::elf::Elf;

use crate::pool::Pool;

/// Where Debian's packages keep libraries, in the order in which the loader searches.
const LIBRARY_DIRS: [&str; 4] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib"];

/// What one ELF file asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Path of the program interpreter (`PT_INTERP`), absolute.
    pub interpreter: Option<PathBuf>,
    /// Names of libraries (`DT_NEEDED`).
    pub libraries: BTreeSet<String>,
}

/// Reads what the file's contents ask for; nothing where they are not ELF.
pub fn needs(contents: &[u8]) -> Result<Needs> {
    if !contents.starts_with(goblin::elf::header::ELFMAG) {
        return Ok(Needs::default());
    }
    let elf = Elf::parse(contents).context("The file begins as ELF but cannot be parsed")?;
    Ok(Needs {
        interpreter: elf.interpreter.map(PathBuf::from),
        libraries: elf.libraries.iter().map(|&name| name.to_owned()).collect(),
    })
}

/// The package that holds the library, and the library's path in it relative to the package's root.
pub fn find<'a>(pool: &'a Pool, library: &str) -> Option<(&'a str, PathBuf)> {
    LIBRARY_DIRS.iter().map(|dir| Path::new(dir).join(library)).find_map(|relative| {
        pool.iter()
            .find(|(_, root)| root.join(&relative).symlink_metadata().is_ok())
            .map(|(name, _)| (name, relative.clone()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_names_libc_and_its_loader() {
        let shell = std::fs::read("/bin/dash").or_else(|_| std::fs::read("/bin/sh")).unwrap();
        let needs = needs(&shell).unwrap();
        assert!(needs.libraries.contains("libc.so.6"), "{needs:?}");
        assert_eq!(needs.interpreter.unwrap(), Path::new("/lib64/ld-linux-x86-64.so.2"));
    }

    #[test]
    fn a_script_needs_nothing() {
        assert_eq!(needs(b"#!/bin/sh\n").unwrap(), Needs::default());
    }

    #[test]
    fn a_broken_elf_is_an_error() {
        assert!(needs(b"\x7fELF and then nothing").is_err());
    }
}
