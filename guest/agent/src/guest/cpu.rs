//! OnlineCPUMem: CPUs and memory that were plugged in are there, but not in use until somebody says so.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const CPUS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";

/// Brings CPUs into use until `wanted` are (0: all there are), and unless `cpu_only` all memory. Answers how many CPUs
/// are in use then.
pub fn online(wanted: u32, cpu_only: bool) -> io::Result<u32> {
    let count = online_cpus(Path::new(CPUS), wanted)?;
    if !cpu_only {
        online_memory(Path::new(MEMORY))?;
    }
    Ok(count)
}

fn online_cpus(root: &Path, wanted: u32) -> io::Result<u32> {
    let mut count = 0;
    for cpu in numbered(root, "cpu")? {
        if wanted != 0 && count >= wanted {
            break;
        }
        let switch = cpu.join("online");
        // The first CPU often has no switch: it cannot be taken out of use.
        if switch.exists() && fs::read_to_string(&switch)?.trim() == "0" {
            fs::write(&switch, "1")?;
        }
        count += 1;
    }
    Ok(count)
}

fn online_memory(root: &Path) -> io::Result<()> {
    // A kernel without memory hotplug has no such directory, and nothing to do.
    if !root.exists() {
        return Ok(());
    }
    for block in numbered(root, "memory")? {
        let state = block.join("state");
        if fs::read_to_string(&state)?.trim() == "offline" {
            fs::write(&state, "online")?;
        }
    }
    Ok(())
}

/// Entries named `PREFIX` and a number, by number.
fn numbered(root: &Path, prefix: &str) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.strip_prefix(prefix)?.parse::<u32>().ok());
        if let Some(number) = number {
            found.push((number, entry.path()));
        }
    }
    found.sort_unstable();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(states: &[Option<&str>]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("A directory");
        for (number, state) in states.iter().enumerate() {
            let cpu = root.path().join(format!("cpu{number}"));
            fs::create_dir(&cpu).expect("New");
            if let Some(state) = state {
                fs::write(cpu.join("online"), state).expect("New");
            }
        }
        fs::create_dir(root.path().join("cpufreq")).expect("New");
        root
    }

    #[test]
    fn as_many_as_wanted_come_into_use() {
        let root = cpus(&[None, Some("0\n"), Some("0\n")]);
        assert_eq!(online_cpus(root.path(), 2).expect("Done"), 2);
        assert_eq!(fs::read_to_string(root.path().join("cpu1/online")).expect("There"), "1");
        assert_eq!(fs::read_to_string(root.path().join("cpu2/online")).expect("There"), "0\n");
        assert_eq!(online_cpus(root.path(), 0).expect("Done"), 3);
        assert_eq!(online_cpus(root.path(), 9).expect("Done"), 3, "There are no more");
    }

    #[test]
    fn offline_memory_comes_into_use() {
        let root = tempfile::tempdir().expect("A directory");
        let block = root.path().join("memory7");
        fs::create_dir(&block).expect("New");
        fs::write(block.join("state"), "offline\n").expect("New");
        online_memory(root.path()).expect("Done");
        assert_eq!(fs::read_to_string(block.join("state")).expect("There"), "online");
        online_memory(Path::new("/nowhere")).expect("Nothing to do");
    }
}
