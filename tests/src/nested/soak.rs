//! Container lives over and over: how often does the nested host itself fail?

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::session::Session;
use super::supervise::{Ending, Output};
use crate::harness::{Containerd, HOME, Parts, configure, unique};
use crate::images;

/// What a life prints when it ends well, at the start of a line.
const LIVED: &str = "life: ok";

/// And when it ends badly.
const FAILED: &str = "life: FAILED";

/// One life's limit; runc's take 3 s when nothing else runs.
const LIFE_LIMIT: Duration = Duration::from_secs(180);

/// What to live, and how often.
#[derive(Clone, Debug)]
pub struct Soak {
    /// Lives in all.
    pub lives: u32,
    /// Lives in one nested host at most.
    pub per_host: u32,
    /// containerd's name of the runtime.
    pub runtime: String,
    /// The program `inlay`, where the runtime needs it.
    pub shim: Option<String>,
}

/// Lives all lives, in as many hosts as it takes; prints the rates. True if no host failed.
pub fn run(session: &mut Session, soak: &Soak, program: &str) -> Result<bool> {
    let started = Instant::now();
    let mut count = Count::default();
    let mut interrupted = false;
    while count.ended() < soak.lives && !interrupted {
        let lives = soak.per_host.min(soak.lives - count.ended());
        let mut argv = vec![program.to_owned(), "lives".into(), "--count".into(), lives.to_string()];
        argv.extend(["--runtime".into(), soak.runtime.clone()]);
        if let Some(shim) = &soak.shim {
            argv.extend(["--shim".into(), shim.clone()]);
        }
        let before = count.ended();
        let limit = LIFE_LIMIT.saturating_mul(lives + 1);
        let run = session.attempt(&|| format!("lives from {before}"), &session.request(argv)?, limit, &mut count)?;
        match run.ending {
            Ending::Interrupted(_) => interrupted = true,
            // A life's failure is counted above; a host that does not even start containerd is not a life.
            Ending::Exited(_) | Ending::TimedOut => {
                ensure!(count.ended() > before, "No life ended in a host that did not fail")
            }
            Ending::HostFailed(_) => {}
        }
    }
    print_table(session, soak, &count, started.elapsed());
    Ok(session.failures().is_empty() && count.failed == 0)
}

/// Lives `count` lives; called inside the nested host.
pub fn live(soak: &Soak) -> Result<()> {
    configure(&Parts::find().configuration(""))?;
    let containerd = Containerd::start(Path::new(HOME), soak.shim.as_deref().map(Path::new))?;
    containerd.import(&images::busybox()?)?;
    for _ in 0..soak.lives {
        let id = unique("life");
        let args = ["run", "--rm", "--runtime", &soak.runtime, images::BUSYBOX, &id, "uname", "-a"];
        let output = containerd.ctr_with(&args, None, LIFE_LIMIT);
        let seconds = output.wall.as_secs_f64();
        if output.status.success() && output.stdout.contains("Linux") {
            println!("{LIVED} {seconds:.1} s");
        } else {
            println!("{FAILED} {seconds:.1} s {}{}", output.stdout.trim(), output.stderr.trim());
        }
        io::stdout().flush().context("Cannot write")?;
    }
    Ok(())
}

fn print_table(session: &Session, soak: &Soak, count: &Count, took: Duration) {
    let ended = count.ended();
    let mut seconds = count.seconds.clone();
    seconds.sort_by(f64::total_cmp);
    let median = seconds.get(seconds.len() / 2).copied().unwrap_or_default();
    println!("| what | count | of 200 lives |\n| --- | --- | --- |");
    let row = |what: &str, number: usize| {
        println!("| {what} | {number} | {:.2} |", number as f64 * 200.0 / f64::from(ended.max(1)))
    };
    row("lives that ended well", count.lived as usize);
    row("lives that failed", count.failed as usize);
    let mut classes: Vec<&str> = session.failures().iter().map(|(_, failure)| failure.class()).collect();
    classes.sort_unstable();
    classes.dedup();
    for class in classes {
        row(
            &format!("host failures: {class}"),
            session.failures().iter().filter(|(_, failure)| failure.class() == class).count(),
        );
    }
    row("host failures in all", session.failures().len());
    println!(
        "soak: {ended} lives of {} in {:.0} s, median {median:.1} s a life; {}",
        soak.runtime,
        took.as_secs_f64(),
        session.summary()
    );
}

#[derive(Default)]
struct Count {
    lived: u32,
    failed: u32,
    seconds: Vec<f64>,
    line: String,
}

impl Count {
    fn ended(&self) -> u32 {
        self.lived + self.failed
    }
}

impl Output for Count {
    fn stdout(&mut self, piece: &[u8]) -> io::Result<()> {
        for letter in String::from_utf8_lossy(piece).chars() {
            if letter != '\n' {
                self.line.push(letter);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            if let Some(rest) = line.strip_prefix(LIVED) {
                self.lived += 1;
                self.seconds.extend(rest.split_whitespace().next().and_then(|word| word.parse::<f64>().ok()));
            } else if line.starts_with(FAILED) {
                self.failed += 1;
            }
        }
        io::stdout().write_all(piece)
    }

    fn stderr(&mut self, piece: &[u8]) -> io::Result<()> {
        io::stderr().write_all(piece)
    }
}
