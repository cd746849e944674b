//! Runs commands on a host with KVM: a nested one where the machine has no hardware virtualization.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use inlay_tests::nested::machine;
use inlay_tests::nested::soak::{self, Soak};
use inlay_tests::nested::trial::{self, Verdict};
use inlay_tests::nested::{self, Ending, Image, Output, Session, Shape};
use inlay_tests::{images, packages};

/// The command did not end in time: what timeout(1) answers.
const TIMED_OUT: u8 = 124;

/// The nested host failed, and its retries are used up.
const HOST_FAILED: u8 = 125;

/// The demonstration takes two or three minutes in a nested host.
const DEMO_LIMIT: Duration = Duration::from_secs(900);

#[derive(Parser)]
#[command(about, version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Installs, downloads and makes what the nested host and the tests are made of.
    Setup,
    /// Runs a command and ends with its exit code (124: out of time, 125: the host failed).
    Run(RunArgs),
    /// Runs the tests of a test binary; those that a failing host interrupts are run again.
    Test(TestArgs),
    /// Runs containers in microVMs and shows what they answer.
    Demo(DemoArgs),
    /// Runs containers over and over, and counts how often the nested host fails.
    Soak(SoakArgs),
    /// PID 1 of the nested host; nothing for a person to call.
    #[command(hide = true)]
    Inside,
    /// PID 1 of the room on the machine; nothing for a person to call.
    #[command(hide = true)]
    Room { request: String, artefacts: PathBuf },
    /// A soak's lives in one host; nothing for a person to call.
    #[command(hide = true)]
    Lives(LivesArgs),
}

#[derive(Args)]
struct RunArgs {
    /// Ends the command after so many seconds.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Runs on the machine itself if it has hardware virtualization.
    #[arg(long)]
    auto: bool,
    #[command(flatten)]
    host: HostArgs,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

#[derive(Args)]
struct TestArgs {
    /// Ends the tests after so many seconds.
    #[arg(long, default_value_t = 3400)]
    timeout: u64,
    /// Takes a nested host even if the machine has hardware virtualization.
    #[arg(long)]
    nested: bool,
    #[command(flatten)]
    host: HostArgs,
    /// The test binary, instead of the end-to-end tests, which cargo is asked to build.
    #[arg(long)]
    binary: Option<String>,
    /// Runs only tests whose names contain one of these.
    filters: Vec<String>,
}

#[derive(Args)]
struct DemoArgs {
    /// Takes a nested host even if the machine has hardware virtualization.
    #[arg(long)]
    nested: bool,
    #[command(flatten)]
    host: HostArgs,
}

#[derive(Args)]
struct SoakArgs {
    /// Lives in all.
    #[arg(long)]
    lives: u32,
    /// Lives in one nested host at most.
    #[arg(long, default_value_t = 25)]
    per_host: u32,
    /// containerd's name of the runtime.
    #[arg(long, default_value = "io.containerd.runc.v2")]
    runtime: String,
    /// The program `inlay`, for its runtime.
    #[arg(long)]
    shim: Option<String>,
    #[command(flatten)]
    host: HostArgs,
}

#[derive(Args)]
struct LivesArgs {
    #[arg(long)]
    count: u32,
    #[arg(long)]
    runtime: String,
    #[arg(long)]
    shim: Option<String>,
}

#[derive(Args)]
struct HostArgs {
    /// CPUs of the nested host.
    #[arg(long, default_value_t = 2)]
    smp: u32,
    /// Memory of the nested host.
    #[arg(long, default_value = "4G")]
    memory: String,
    /// QEMU's CPU model; docs/nested-host.md says why features are off and what was measured.
    #[arg(long, default_value = "max,+svm,-la57,-pku,-smap,-smep,-fsgsbase,-xsave")]
    cpu: String,
    /// QEMU's program, instead of the one that is built with corrections (tests/nested/qemu).
    #[arg(long)]
    qemu: Option<PathBuf>,
    /// QEMU's accelerator, with its options.
    #[arg(long, default_value = "tcg,thread=multi,tb-size=1024")]
    accel: String,
    /// More words for the kernel's command line; `kvm_amd.npt=0` and its like reach the modules.
    #[arg(long, default_value = "")]
    append: String,
    /// How often a run is tried again after a failure of the nested host itself.
    #[arg(long, default_value_t = 4)]
    host_retries: u32,
    /// Keeps console, logs and what the command writes to $INLAY_ARTEFACTS in this directory.
    #[arg(long)]
    artefacts: Option<PathBuf>,
}

impl HostArgs {
    /// Without a nested host there is no QEMU to build.
    fn session(self, on_machine: bool) -> Result<Session> {
        let Self { smp, memory, cpu, accel, append, .. } = self;
        let qemu = match self.qemu {
            Some(qemu) => qemu,
            None if on_machine => PathBuf::new(),
            None => nested::build_qemu()?,
        };
        Session::new(Shape { qemu, cpu, smp, memory, accel, append }, self.host_retries, self.artefacts)
    }
}

fn main() -> Result<ExitCode> {
    match Cli::parse().verb {
        Verb::Setup => setup(),
        Verb::Run(args) => run(args),
        Verb::Test(args) => test(args),
        Verb::Demo(args) => start_demo(args),
        Verb::Soak(args) => start_soak(args),
        Verb::Inside => nested::run_inside().map(|()| ExitCode::FAILURE),
        Verb::Room { request, artefacts } => machine::become_room(&request, &artefacts).map(exit_code),
        Verb::Lives(args) => live(args),
    }
}

fn setup() -> Result<ExitCode> {
    packages::install()?;
    let image = Image::prepare()?;
    println!("setup: kernel {}", image.kernel.display());
    println!("setup: initrd {}", image.initrd.display());
    if !machine::virtualization().0 {
        println!("setup: QEMU {}", nested::build_qemu()?.display());
    }
    println!("setup: image {} in {}", images::BUSYBOX, images::busybox()?.display());
    println!("setup: image {} in {}", images::DEBIAN, images::debian()?.display());
    Ok(ExitCode::SUCCESS)
}

fn run(args: RunArgs) -> Result<ExitCode> {
    let on_machine = args.auto && choose();
    run_to_the_end(args.host, on_machine, args.command, Duration::from_secs(args.timeout))
}

fn start_demo(args: DemoArgs) -> Result<ExitCode> {
    let on_machine = !args.nested && choose();
    let program = std::env::current_exe().context("Cannot find this program's own path")?;
    // Built beside this program.
    let demo = program.with_file_name("demo").to_string_lossy().into_owned();
    run_to_the_end(args.host, on_machine, vec![demo], DEMO_LIMIT)
}

fn run_to_the_end(host: HostArgs, on_machine: bool, command: Vec<String>, limit: Duration) -> Result<ExitCode> {
    nested::install_signals()?;
    let mut session = host.session(on_machine)?;
    if on_machine {
        return Ok(ended(&session.run_on_machine(command, limit)?));
    }
    let request = session.request(command)?;
    let run = session.run(&request, limit, &mut Pass)?;
    eprintln!("nested-host: {:?} after {:.1} s; {}", run.ending, run.wall.as_secs_f64(), session.summary());
    Ok(ended(&run.ending))
}

fn test(args: TestArgs) -> Result<ExitCode> {
    nested::install_signals()?;
    let on_machine = !args.nested && choose();
    let binary = args.binary.map_or_else(trial::build, Ok)?;
    let mut session = args.host.session(on_machine)?;
    let limit = Duration::from_secs(args.timeout);
    if on_machine {
        let mut command = vec![binary, "--test-threads=1".into()];
        command.extend(args.filters);
        return Ok(ended(&session.run_on_machine(command, limit)?));
    }
    Ok(match trial::run(&mut session, &binary, &args.filters, limit)? {
        Verdict::Passed => ExitCode::SUCCESS,
        Verdict::Failed => ExitCode::FAILURE,
        Verdict::HostsFailed => ExitCode::from(HOST_FAILED),
        Verdict::Interrupted(signal) => exit_code(128 + signal),
    })
}

fn start_soak(args: SoakArgs) -> Result<ExitCode> {
    nested::install_signals()?;
    let soak = Soak { lives: args.lives, per_host: args.per_host, runtime: args.runtime, shim: args.shim };
    let program = std::env::current_exe().context("Cannot find this program's own path")?;
    let well = soak::run(&mut args.host.session(false)?, &soak, &program.to_string_lossy())?;
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn live(args: LivesArgs) -> Result<ExitCode> {
    soak::live(&Soak { lives: args.count, per_host: args.count, runtime: args.runtime, shim: args.shim })?;
    Ok(ExitCode::SUCCESS)
}

/// Whether to run on the machine itself; says which and why.
fn choose() -> bool {
    let (able, why) = machine::virtualization();
    let room = if able { "this machine itself" } else { "a nested host" };
    eprintln!("nested-host: running on {room}: {why}");
    able
}

fn ended(ending: &Ending) -> ExitCode {
    match ending {
        Ending::Exited(code) => exit_code(*code),
        Ending::TimedOut => ExitCode::from(TIMED_OUT),
        Ending::HostFailed(_) => ExitCode::from(HOST_FAILED),
        Ending::Interrupted(signal) => exit_code(128 + signal),
    }
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

/// Passes output on as it comes.
struct Pass;

impl Output for Pass {
    fn stdout(&mut self, piece: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(piece)?;
        stdout.flush()
    }

    fn stderr(&mut self, piece: &[u8]) -> io::Result<()> {
        io::stderr().write_all(piece)
    }
}
