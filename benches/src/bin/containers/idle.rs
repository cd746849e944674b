//! What a container that does nothing costs: a node has many of them.

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use benches::table::{markdown, milliseconds};
use inlay_tests::harness::{Parts, Runtime, configure, containerd, statistic, unique};
use inlay_tests::images;

use crate::inlay;

/// What a start leaves to do has been done by then.
const REST: Duration = Duration::from_secs(10);
/// KVM's counters that say why a vCPU that sleeps was woken.
const COUNTERS: [&str; 5] = ["exits", "halt_exits", "irq_injections", "mmio_exits", "io_exits"];

/// Measures a booted and a restored sandbox for so long each. Prints a table of their threads' processor time and of KVM's counters.
pub fn run(time: Duration) -> Result<()> {
    let parts = Parts::find();
    let mut rows = vec![["", "", "each second"].map(String::from).to_vec()];
    for (name, restored) in [("booted", false), ("restored", true)] {
        configure(&format!("{}\n[factory]\nenable_template = {restored}\n", parts.configuration("")))?;
        if restored {
            inlay(&parts, &["template", "create", "default", "--if-needed"])?;
        }
        let id = unique("idle");
        let args = ["run", "--detach", "--runtime", Runtime::Inlay.name(), images::BUSYBOX, &id, "sleep", "10000"];
        let started = containerd().ctr(&args);
        ensure!(started.status.success(), "{name} has failed: {started:#?}");
        thread::sleep(REST);
        let pid = containerd().pid_of(&id)?;
        let (before, begun) = (Look::at(pid)?, Instant::now());
        thread::sleep(time);
        let (after, seconds) = (Look::at(pid)?, begun.elapsed().as_secs_f64());
        for (thread, time) in after.threads {
            let spent = time.saturating_sub(before.threads.get(&thread).copied().unwrap_or_default());
            rows.push(vec![name.into(), format!("thread {thread}"), milliseconds(spent.div_f64(seconds))]);
        }
        for (index, counter) in COUNTERS.iter().enumerate() {
            let counted = (after.counters[index] - before.counters[index]) as f64;
            rows.push(vec![name.into(), (*counter).into(), format!("{:.2}", counted / seconds)]);
        }
        containerd().ctr(&["task", "delete", "--force", &id]).ok();
        containerd().ctr(&["container", "delete", &id]).ok();
    }
    inlay(&parts, &["template", "remove", "default"])?;
    println!("### A container that sleeps, for {} s\n", time.as_secs());
    println!("{}", markdown(&rows));
    Ok(())
}

/// What a sandbox has cost so far.
struct Look {
    /// Processor time by the threads' names.
    threads: BTreeMap<String, Duration>,
    counters: [u64; COUNTERS.len()],
}

impl Look {
    fn at(pid: u32) -> Result<Self> {
        let mut threads = BTreeMap::<String, Duration>::new();
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).context("The sandbox has ended")?;
        for task in tasks.flatten().map(|entry| entry.path()) {
            // A thread may end meanwhile.
            let Ok(name) = fs::read_to_string(task.join("comm")) else { continue };
            // Nanoseconds on a processor come first (proc-schedstat).
            let spent = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
            let spent = spent.split(' ').next().and_then(|spent| spent.parse().ok()).unwrap_or_default();
            *threads.entry(name.trim().to_owned()).or_default() += Duration::from_nanos(spent);
        }
        let mut counters = [0; COUNTERS.len()];
        for (counter, name) in counters.iter_mut().zip(COUNTERS) {
            *counter = statistic(pid, name)?;
        }
        Ok(Self { threads, counters })
    }
}
