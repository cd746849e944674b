//! The operator's command.

mod check;
mod metrics;
mod pool;
mod template;
mod vm;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

const AFTER_HELP: &str = "\
containerd starts Inlay by itself, under the name containerd-shim-inlay-v2, for containers of the runtime
io.containerd.inlay.v2. Try it:

  inlay check
  ctr run --rm --runtime io.containerd.inlay.v2 docker.io/library/busybox:latest demo uname -a

Configuration: /etc/inlay/configuration.toml, TOML with kata's key names; every key has a default.
State:         /run/inlay/sandboxes/<id>/, gone when the sandbox is.
Templates:     /run/inlay/templates/<name>/, used where the configuration has [factory] enable_template = true.
Pool:          /run/inlay/pool/, filled where [factory] has a pool_size.
Metrics:       inlay metrics, and /run/inlay/sandboxes/<id>/metrics for one sandbox.
Log:           containerd's own; records carry sandbox=<id>.";

/// Runs each container or pod in its own virtual machine, inlaid in containerd's shim
#[derive(Debug, Parser)]
#[command(name = "inlay", version, after_help = AFTER_HELP)]
struct Arguments {
    /// Configuration file to use instead of /etc/inlay/configuration.toml
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what this host has and lacks for running sandboxes, and what to do about it
    Check,
    /// Run a virtual machine, with StratoVirt's command line; `inlay vm -help` has its options
    #[command(disable_help_flag = true)]
    Vm {
        /// StratoVirt's options
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
        options: Vec<OsString>,
    },
    /// Make and look after templates: machines that sandboxes are restored from instead of being booted
    #[command(subcommand)]
    Template(template::Verb),
    /// Look after the pool: sandboxes that are restored before anybody asks for them
    #[command(subcommand)]
    Pool(pool::Verb),
    /// Print metrics of all sandboxes of this node, as text for Prometheus
    #[command(after_help = metrics::AFTER_HELP)]
    Metrics,
    /// Print the version
    Version,
}

/// Runs the machine that StratoVirt's command line describes.
pub fn stratovirt() -> ExitCode {
    vm::main(std::env::args_os().skip(1))
}

/// Runs the command that the command line names.
pub fn main() -> ExitCode {
    // A machine starts before the words of the other commands could be laid out.
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|verb| verb == "vm") {
        return vm::main(words);
    }
    let arguments = Arguments::parse();
    match arguments.command {
        Command::Check => check::run(arguments.config.as_deref()),
        Command::Vm { options } => vm::main(options.into_iter()),
        Command::Template(verb) => template::run(verb, arguments.config.as_deref()),
        Command::Pool(verb) => pool::run(&verb, arguments.config.as_deref()),
        Command::Metrics => metrics::run(),
        Command::Version => {
            println!("inlay {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
        let parsed = Arguments::try_parse_from(["inlay", "check", "--config", "/c"]).unwrap();
        assert_eq!(parsed.config, Some("/c".into()));
        assert!(matches!(parsed.command, Command::Check));
        let create = ["inlay", "template", "create", "default", "--if-needed", "--no-wait", "--config", "/c"];
        let parsed = Arguments::try_parse_from(create).unwrap();
        assert!(matches!(parsed.command, Command::Template(template::Verb::Create { no_wait: true, .. })));
        assert!(Arguments::try_parse_from(["inlay", "template", "create", "x", "--no-wait"]).is_err());
        let served = |address| Arguments::try_parse_from(["inlay", "template", "serve", "/d", "--listen", address]);
        assert!(served("unix:/socket").is_ok() && served("tcp:[::]:4711").is_ok());
        assert!(served("/socket").unwrap_err().to_string().contains("no address of a server of chunks"));
        assert!(matches!(Arguments::try_parse_from(["inlay", "metrics"]).unwrap().command, Command::Metrics));
    }
}
