//! The filter files as they are written. Read by the build script, which compiles them, and by the tests, which hold
//! them against what test runs really called.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use syscalls::Sysno;

/// Numbers by the names that the kernel's headers give them: `constants.toml`.
pub type Constants = BTreeMap<String, u64>;

/// One filter file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoleFile {
    /// Files whose rules belong to this role too.
    #[serde(default)]
    pub include: Vec<String>,
    /// What the role may call.
    #[serde(default)]
    pub allow: Vec<Rule>,
    /// What it may not call, in a file that allows all the rest.
    #[serde(default)]
    pub refuse: Vec<Rule>,
}

/// System calls that are allowed, all under the same condition.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Their names.
    #[serde(deserialize_with = "by_name")]
    pub calls: Vec<Sysno>,
    /// Who calls them.
    #[allow(dead_code, reason = "written for readers; parsed so that a rule cannot go without")]
    pub why: String,
    /// Index of the argument that is looked at, from 0.
    pub argument: Option<u8>,
    /// The argument is one of these.
    #[serde(default)]
    pub values: Vec<String>,
    /// The argument has these bits.
    #[serde(default)]
    pub with: Vec<String>,
    /// The argument has none of these bits.
    #[serde(default)]
    pub without: Vec<String>,
    /// Why no recorded run calls them. A rule without this is one that a run has called.
    #[allow(dead_code, reason = "the build script compiles rules whether they were seen or not")]
    pub unseen: Option<String>,
}

/// What one argument must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Anything.
    Any,
    /// One of the values.
    OneOf { argument: u8, values: Vec<u64> },
    /// Under the mask, the value.
    Masked { argument: u8, mask: u64, value: u64 },
}

impl Rule {
    /// The rule's condition, in numbers.
    pub fn condition(&self, constants: &Constants) -> Result<Condition, String> {
        let number = |name: &String| constants.get(name).copied().ok_or_else(|| format!("{name} is no known constant"));
        let numbers = |names: &[String]| names.iter().map(number).collect::<Result<Vec<_>, _>>();
        let bits = |names: &[String]| Ok::<_, String>(numbers(names)?.into_iter().fold(0, |all, bit| all | bit));
        let masked = !self.with.is_empty() || !self.without.is_empty();
        match self.argument {
            None if self.values.is_empty() && !masked => Ok(Condition::Any),
            Some(argument) if !self.values.is_empty() && !masked => {
                Ok(Condition::OneOf { argument, values: numbers(&self.values)? })
            }
            Some(argument) if self.values.is_empty() && masked => {
                let (with, without) = (bits(&self.with)?, bits(&self.without)?);
                if with & without != 0 {
                    return Err(format!("{:?} asks for bits that it forbids", self.calls));
                }
                Ok(Condition::Masked { argument, mask: with | without, value: with })
            }
            _ => Err(format!("{:?} needs an argument with values, or with bits, or none of these", self.calls)),
        }
    }
}

fn by_name<'de, D: Deserializer<'de>>(names: D) -> Result<Vec<Sysno>, D::Error> {
    let names = Vec::<String>::deserialize(names)?;
    names
        .iter()
        .map(|name| {
            name.parse().map_err(|_| D::Error::custom(format!("{name} is no system call of this architecture")))
        })
        .collect()
}

/// Reads `constants.toml`.
pub fn constants(directory: &Path) -> Result<Constants, String> {
    parse(&directory.join("constants.toml"))
}

/// All rules of a role: its file's and those of the files that it includes.
pub fn rules(directory: &Path, role: &str) -> Result<Vec<Rule>, String> {
    let (mut rules, mut read) = (Vec::new(), BTreeSet::new());
    collect(directory, role, &mut rules, &mut read)?;
    Ok(rules)
}

/// The rules of a role's file alone.
#[allow(dead_code, reason = "for the tests")]
pub fn own_rules(directory: &Path, role: &str) -> Result<Vec<Rule>, String> {
    let file: RoleFile = parse(&directory.join(format!("{role}.toml")))?;
    Ok(file.allow)
}

fn collect(directory: &Path, name: &str, rules: &mut Vec<Rule>, read: &mut BTreeSet<String>) -> Result<(), String> {
    if !read.insert(name.to_owned()) {
        return Ok(());
    }
    let file: RoleFile = parse(&directory.join(format!("{name}.toml")))?;
    rules.extend(file.allow.into_iter().chain(file.refuse));
    file.include.iter().try_for_each(|include| collect(directory, include, rules, read))
}

fn parse<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    toml::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))
}
