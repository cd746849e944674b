//! The table of the documentation.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::backend::{Chardev, Drive, Netdev};
use super::command;
use super::device::Device;
use super::fields::{Shape, shape};
use super::machine::{Incoming, MachineOption, Memory, Mon, Numa, Object, Qmp, Smp};
use super::support::{self, Support};

/// An option that is a list, and what its type reads.
type List = (&'static str, fn() -> Shape);

/// The options that are lists, and what their types read.
const LISTS: &[List] = &[
    ("chardev", shape::<Chardev>),
    ("device", shape::<Device>),
    ("drive", shape::<Drive>),
    ("incoming", shape::<Incoming>),
    ("m", shape::<Memory>),
    ("machine", shape::<MachineOption>),
    ("mon", shape::<Mon>),
    ("netdev", shape::<Netdev>),
    ("numa", shape::<Numa>),
    ("object", shape::<Object>),
    ("qmp", shape::<Qmp>),
    ("serial", shape::<Chardev>),
    ("smp", shape::<Smp>),
];

/// Every option, kind and property as a table in Markdown: one line each, from what the parser goes by.
pub fn markdown() -> String {
    let mut options: BTreeMap<String, Support> = command()
        .get_arguments()
        .filter_map(|arg| arg.get_long().map(str::to_owned).or_else(|| arg.get_short().map(String::from)))
        .map(|name| (name, Support::Compatible))
        .collect();
    options.extend(support::OPTIONS.iter().map(|(name, _, support)| ((*name).to_owned(), *support)));
    options.extend(support::FIELDS.iter().map(|(name, support)| ((*name).to_owned(), *support)));
    let mut text = "| option | kind | property | |\n| --- | --- | --- | --- |\n".to_owned();
    for (option, support) in options {
        line(&mut text, &format!("`-{option}`"), "", "", support);
        properties(&mut text, &option);
    }
    text
}

fn properties(text: &mut String, option: &str) {
    let mut rows: BTreeMap<(&str, &str), Support> = BTreeMap::new();
    match LISTS.iter().find(|(name, _)| *name == option).map(|(_, shape)| shape()) {
        Some(Shape::Fields(fields)) => rows.extend(fields.iter().map(|field| (("", *field), Support::Compatible))),
        Some(Shape::Kinds(kinds)) => {
            for (kind, fields) in kinds {
                rows.insert((kind, ""), Support::Compatible);
                rows.extend(fields.iter().map(|field| ((kind, *field), Support::Compatible)));
            }
        }
        Some(Shape::Value) | None => {}
    }
    rows.extend(support::kinds(option).map(|(kind, support)| ((kind, ""), support)));
    rows.extend(support::properties(option).map(|(kind, property, support)| ((kind, property), support)));
    for ((kind, property), support) in rows {
        line(text, "", kind, property, support);
    }
}

/// The options that are lists, and the properties that have a meaning in them; for clients that ask what there is.
pub fn catalogue() -> impl Iterator<Item = (&'static str, BTreeSet<&'static str>)> {
    LISTS.iter().map(|(option, shape)| {
        let fields = match shape() {
            Shape::Fields(fields) => fields.iter().copied().collect(),
            Shape::Kinds(kinds) => kinds.into_iter().flat_map(|(_, fields)| fields.iter().copied()).collect(),
            Shape::Value => BTreeSet::new(),
        };
        let known = support::properties(option).filter(|(_, _, support)| !matches!(support, Support::Refused(_)));
        (*option, known.map(|(_, property, _)| property).chain(fields).collect())
    })
}

/// The kinds of an option, `-device` or `-object`, and the properties of each.
pub fn kinds(option: &str) -> Vec<(&'static str, &'static [&'static str])> {
    match LISTS.iter().find(|(name, _)| *name == option).map(|(_, shape)| shape()) {
        Some(Shape::Kinds(kinds)) => kinds,
        _ => Vec::new(),
    }
}

fn line(text: &mut String, option: &str, kind: &str, property: &str, support: Support) {
    let code = |word: &str| if word.is_empty() { String::new() } else { format!("`{word}`") };
    let verdict = match support {
        Support::Compatible => "compatible".to_owned(),
        Support::Extended(what) => format!("extended: {what}"),
        Support::Ignored(why) => format!("accepted without effect: {why}"),
        Support::Only { values, why } => format!("{} only: {why}", values.join(", ")),
        Support::Partly(how) => format!("compatible, but: {how}"),
        Support::Refused(why) => format!("refused: {why}"),
    };
    // Writing to a string cannot fail.
    let _ = writeln!(text, "| {option} | {} | {} | {verdict} |", code(kind), code(property));
}
