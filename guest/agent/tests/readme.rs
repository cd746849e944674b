//! The README's table of calls is what the code serves.

use std::fs;
use std::path::Path;

const BEGIN: &str = "<!-- calls: checked by tests/readme.rs -->\n";
const END: &str = "<!-- end of calls -->";

/// Names of the calls of a service, in the order of its proto file.
fn calls(proto: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../agent-proto/protos").join(proto);
    let text = fs::read_to_string(path).expect("The protos are beside this crate");
    let name = |line: &str| Some(line.trim().strip_prefix("rpc ")?.split_once('(')?.0.to_owned());
    text.lines().filter_map(name).collect()
}

fn source(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/server").join(file);
    fs::read_to_string(path).expect("Readable")
}

/// Whether the method of this call is there and does not only say that it is not.
fn is_served(source: &str, call: &str) -> bool {
    let method = |line: &str| {
        let name = line.trim().strip_prefix("async fn ")?.split_once('(')?.0;
        Some(name.replace('_', "").eq_ignore_ascii_case(call))
    };
    source.lines().any(|line| method(line) == Some(true)) && !source.contains(&format!("unserved(\"{call}\")"))
}

#[test]
fn the_table_of_calls_is_what_is_served() {
    let mut table = String::from("| call | |\n| --- | --- |\n");
    for (proto, file) in [("agent.proto", "service.rs"), ("health.proto", "health.rs")] {
        let source = source(file);
        for call in calls(proto) {
            let answer = if is_served(&source, &call) { "served" } else { "UNIMPLEMENTED" };
            table.push_str(&format!("| {call} | {answer} |\n"));
        }
    }
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("Readable");
    let begin = readme.find(BEGIN).expect("The table has a beginning") + BEGIN.len();
    let end = readme.find(END).expect("The table has an end");
    assert_eq!(readme.get(begin..end).expect("In order"), table, "README.md should have this table:\n{table}");
}
