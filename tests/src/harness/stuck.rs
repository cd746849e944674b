//! Where things hang: threads that wait in the kernel, and where.

use std::ffi::OsStr;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Programs whose threads are told of whatever they do.
const OURS: [&str; 3] = ["inlay", "containerd", "ctr"];

/// Every thread that nothing can interrupt, and every one of containerd, its clients and its shims: its state and its stack
/// in the kernel (proc_pid_stack(5)). Reads nothing that a process whose memory is locked would have to give.
pub fn threads() -> String {
    let mut text = String::new();
    for process in entries(Path::new("/proc")) {
        let program = read(&process.join("comm"));
        let ours = OURS.iter().any(|name| program.starts_with(name));
        for task in entries(&process.join("task")) {
            let stat = read(&task.join("stat"));
            // The name before may have any characters.
            let state = stat.rsplit_once(") ").map(|(_, rest)| rest).unwrap_or_default();
            if ours || state.starts_with('D') {
                let (name, id) = (read(&task.join("comm")), task.file_name().unwrap_or_default().to_owned());
                let state = state.get(..1).unwrap_or("?");
                let (id, program, name) = (id.display(), program.trim(), name.trim());
                let _ = writeln!(text, "{id} {program}/{name} {state}: {}", stack(&read(&task.join("stack"))));
            }
        }
    }
    text
}

/// The functions of a stack on one line, innermost first.
fn stack(text: &str) -> String {
    let functions = text.lines().filter_map(|line| line.split_whitespace().nth(1)?.split('+').next());
    functions.collect::<Vec<_>>().join(" < ")
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let numbered = |name: &OsStr| name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|entry| numbered(&entry.file_name())).map(|entry| entry.path()).collect()
}

/// Nothing of what has ended meanwhile.
fn read(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_is_one_line() {
        let text = "[<0>] do_nanosleep+0x6c/0x160\n[<0>] hrtimer_nanosleep+0x9f/0x1a0\n";
        assert_eq!(stack(text), "do_nanosleep < hrtimer_nanosleep");
        assert_eq!(stack(""), "");
    }

    #[test]
    fn threads_of_ours_are_told_of() {
        // This program's name begins as ours do.
        let all = threads();
        assert!(all.lines().any(|line| line.contains(" inlay_tests") && line.contains(" R: ")), "{all}");
    }
}
