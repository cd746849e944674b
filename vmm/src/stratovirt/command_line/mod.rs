//! The command line: from words to one typed value for each option.
//!
//! clap knows the options, serde the property lists behind them, and [`support`] what has no effect or is refused. Nothing
//! is opened here, and one option does not know of another.

pub mod backend;
pub mod device;
mod fields;
mod list;
pub mod machine;
mod support;
mod table;
#[cfg(test)]
mod tests;
pub mod values;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Args, Command, FromArgMatches};
use serde::de::DeserializeOwned;

use backend::{Chardev, Drive, Netdev, Serial};
use device::Device;
use machine::{Incoming, MachineOption, Memory, Mon, Numa, Object, Qmp, Smp};
use support::{Operand, Support};

pub use list::ListError;
pub use table::{catalogue, kinds, markdown};

/// Most words of a command line: each is kept, and no machine has that many devices.
pub const MAX_WORDS: usize = 4096;

/// What was asked for, option by option.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct CommandLine {
    /// Name of the machine
    #[arg(long, value_name = "NAME", help_heading = MACHINE)]
    pub name: Option<String>,
    /// Machine: microvm[,dump-guest-core=on|off][,mem-share=on|off]
    #[arg(long, value_name = "LIST", help_heading = MACHINE, value_parser = list::<MachineOption>("machine", Some("type")))]
    pub machine: Option<MachineOption>,
    /// Processors: [cpus=]N[,maxcpus=N][,sockets=N][,dies=N][,clusters=N][,cores=N][,threads=N]
    #[arg(long, value_name = "LIST", help_heading = MACHINE, value_parser = list::<Smp>("smp", Some("cpus")))]
    pub smp: Option<Smp>,
    /// Memory: [size=]N[M|G]; 256 MiB where it is missing
    #[arg(short, value_name = "LIST", help_heading = MACHINE, value_parser = list::<Memory>("m", Some("size")))]
    pub memory: Option<Memory>,
    /// Put guest memory in this file, or in one without a name in this directory, as on hugetlbfs
    #[arg(long, value_name = "PATH", help_heading = MACHINE)]
    pub mem_path: Option<PathBuf>,
    /// Make all of guest memory before the guest runs
    #[arg(long, help_heading = MACHINE)]
    pub mem_prealloc: bool,
    /// The one node: node[,memdev=ID]
    #[arg(long, value_name = "LIST", help_heading = MACHINE, value_parser = list::<Numa>("numa", None))]
    pub numa: Vec<Numa>,
    /// Something that devices use: memory-backend-ram|-memfd|-file, rng-random, iothread
    #[arg(long, value_name = "LIST", help_heading = MACHINE, value_parser = list::<Object>("object", None))]
    pub object: Vec<Object>,

    /// Kernel: vmlinux (ELF, with PVH where it has it) or bzImage
    #[arg(long, value_name = "FILE", required = true, help_heading = BOOT)]
    pub kernel: PathBuf,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE", help_heading = BOOT)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line; where the virtio devices are is appended to it
    #[arg(long, value_name = "TEXT", help_heading = BOOT)]
    pub append: Option<String>,
    /// Do not start the processors: QMP's `cont` does
    #[arg(short = 'S', help_heading = BOOT)]
    pub freeze: bool,
    /// Go on from a snapshot: file:DIR
    #[arg(long, value_name = "LIST", help_heading = BOOT, value_parser = list::<Incoming>("incoming", Some("from")))]
    pub incoming: Option<Incoming>,

    /// The guest's end of a device: virtio-blk-device,drive=ID,id=ID ...
    #[arg(long, value_name = "LIST", help_heading = DEVICES, value_parser = list::<Device>("device", None))]
    pub device: Vec<Device>,
    /// A disk's end on the host: id=ID,file=PATH[,readonly=on][,direct=off][,aio=...]
    #[arg(long, value_name = "LIST", help_heading = DEVICES, value_parser = list::<Drive>("drive", None))]
    pub drive: Vec<Drive>,
    /// An interface's end on the host: tap,id=ID,ifname=NAME ...
    #[arg(long, value_name = "LIST", help_heading = DEVICES, value_parser = list::<Netdev>("netdev", None))]
    pub netdev: Vec<Netdev>,
    /// A stream: stdio|pty|file|socket,id=ID ...
    #[arg(long, value_name = "LIST", help_heading = DEVICES, value_parser = list::<Chardev>("chardev", None))]
    pub chardev: Vec<Chardev>,
    /// Console on the serial port: stdio, pty, file,path=PATH, socket,path=PATH,server,nowait or chardev:ID
    #[arg(long, value_name = "LIST", help_heading = DEVICES, value_parser = serial)]
    pub serial: Option<Serial>,

    /// Listen for QMP: unix:PATH,server,nowait or tcp:IP:PORT,server,nowait
    #[arg(long, value_name = "LIST", help_heading = PROCESS, value_parser = list::<Qmp>("qmp", Some("address")))]
    pub qmp: Vec<Qmp>,
    /// Listen for QMP on the socket of a -chardev: chardev=ID,mode=control
    #[arg(long, value_name = "LIST", help_heading = PROCESS, value_parser = list::<Mon>("mon", None))]
    pub mon: Vec<Mon>,
    /// Leave the terminal: the command returns when the machine is built
    #[arg(long, help_heading = PROCESS)]
    pub daemonize: bool,
    /// Write the process's id to this file; with -daemonize only
    #[arg(long, value_name = "FILE", requires = "daemonize", help_heading = PROCESS)]
    pub pidfile: Option<PathBuf>,
    /// Let the machine's threads make every system call; the log says so loudly
    #[arg(long, help_heading = PROCESS)]
    pub disable_seccomp: bool,
    /// Log to a file, or to standard error where none is named; STRATOVIRT_LOG_LEVEL says how much
    #[arg(short = 'D', value_name = "FILE", num_args = 0..=1, help_heading = PROCESS)]
    pub log: Option<Option<PathBuf>>,
}

const MACHINE: &str = "Machine";
const BOOT: &str = "Boot";
const DEVICES: &str = "Devices";
const PROCESS: &str = "Process";

const ABOUT: &str = "Runs a virtual machine, with StratoVirt's options";
const AFTER_HELP: &str = "\
A machine with a console here, which ends when its guest does:

  inlay vm -machine microvm -m 256 -kernel vmlinux -initrd initrd -append 'console=ttyS0 reboot=k panic=-1' -serial stdio

With a disk, and QMP to control it by:

  inlay vm -machine microvm -kernel vmlinux -append 'console=ttyS0 root=/dev/vda' -serial stdio \\
    -drive id=root,file=root.img,direct=off -device virtio-blk-device,drive=root,id=root \\
    -qmp unix:/tmp/qmp.sock,server,nowait

The same program called `stratovirt` takes the options at once. docs/stratovirt.md has every option, device and property.";

/// What a command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// A text to print.
    Print(String),
    /// A machine.
    Run(Box<CommandLine>),
}

/// Why a command line is refused. Displayed with its source it is a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandLineError {
    /// There is no such option.
    #[error("There is no option {0}")]
    Unknown(String),
    /// Two dashes.
    #[error("There is no option {0}: options have one dash")]
    TwoDashes(String),
    /// Words that are not UTF-8.
    #[error("The command line has a word that is not UTF-8: {0:?}")]
    Encoding(OsString),
    /// More than [`MAX_WORDS`] words.
    #[error("The command line has more than {MAX_WORDS} words")]
    TooLong,
    /// An option that is known and refused.
    #[error("Option -{option} is not for this machine: {why}")]
    Refused {
        /// The option.
        option: &'static str,
        /// The sentence of the table.
        why: &'static str,
    },
    /// A value that cannot be.
    #[error("Option -{option} cannot be {value:?}")]
    Value {
        /// The option.
        option: String,
        /// Its value.
        value: String,
        /// Why not.
        #[source]
        source: ListError,
    },
    /// An option without a value, or with one too many; twice; or without another that it needs.
    #[error("Option {option} {problem}")]
    Use {
        /// The option.
        option: String,
        /// What is wrong.
        problem: &'static str,
    },
}

impl CommandLine {
    /// Reads `words`, without the program's name.
    pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Request, CommandLineError> {
        let mut command = command();
        let words = with_two_dashes(&command, words)?;
        let matches = match command.try_get_matches_from_mut(words) {
            Ok(matches) => matches,
            Err(error) if error.kind() == ErrorKind::DisplayHelp => return Ok(Request::Print(help(&mut command))),
            Err(error) if error.kind() == ErrorKind::DisplayVersion => return Ok(Request::Print(error.to_string())),
            Err(error) => return Err(explain(&error)),
        };
        for (option, _, support) in support::OPTIONS {
            if let (Support::Refused(why), Some(_)) = (support, matches.value_source(option)) {
                return Err(CommandLineError::Refused { option, why });
            }
        }
        CommandLine::from_arg_matches(&matches)
            .map(|line| Request::Run(Box::new(line)))
            .map_err(|error| explain(&error))
    }
}

/// The options of [`CommandLine`] and those of the table.
fn command() -> Command {
    let command = Command::new("inlay vm")
        .after_help(AFTER_HELP)
        .override_usage("inlay vm -kernel FILE [OPTIONS]\n       stratovirt -kernel FILE [OPTIONS]")
        .no_binary_name(true)
        .version(concat!("(StratoVirt's microvm) ", env!("CARGO_PKG_VERSION")))
        .disable_help_subcommand(true);
    // The comment on the type would be the text.
    let command = CommandLine::augment_args(command).about(ABOUT);
    support::OPTIONS.iter().fold(command, |command, (name, operand, support)| {
        let arg = Arg::new(*name).long(name).hide(*support != Support::Compatible).help_heading(MACHINE);
        command.arg(match operand {
            Operand::None => arg.action(ArgAction::SetTrue).default_value(None),
            Operand::Any => arg.action(ArgAction::Append).value_name("TEXT"),
            Operand::List(first) => arg
                .value_name("LIST")
                .help(format!("[{first}=]VALUE, of which there is one that is possible"))
                .value_parser(list::<NoFields>(name, Some(first))),
        })
    })
}

/// A list of which nothing is left.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct NoFields {}

/// The parser of an option's list.
fn list<T: DeserializeOwned>(
    option: &'static str,
    first: Option<&'static str>,
) -> impl Fn(&str) -> Result<T, ListError> + Clone + Send + Sync + 'static {
    move |text| list::parse(option, first, text)
}

fn serial(text: &str) -> Result<Serial, ListError> {
    match text.strip_prefix("chardev:") {
        Some(name) => Ok(Serial::Named(name.to_owned())),
        None => list::parse("serial", None, text).map(Serial::Own),
    }
}

/// Makes `-machine x` to `--machine=x`: clap's long options have two dashes, and a value may begin with one.
fn with_two_dashes(
    command: &Command,
    words: impl IntoIterator<Item = OsString>,
) -> Result<Vec<String>, CommandLineError> {
    let mut result = Vec::new();
    let mut words = words.into_iter().map(|word| word.into_string().map_err(CommandLineError::Encoding)).peekable();
    while let Some(word) = words.next().transpose()? {
        if result.len() >= MAX_WORDS {
            return Err(CommandLineError::TooLong);
        }
        if matches!(word.as_str(), "--help" | "--version" | "-h" | "-V") {
            result.push(word);
            continue;
        }
        let Some(name) = word.strip_prefix('-') else { return Err(CommandLineError::Unknown(word)) };
        if name.starts_with('-') {
            return Err(CommandLineError::TwoDashes(word));
        }
        let known = command
            .get_arguments()
            .find(|arg| arg.get_long() == Some(name) || arg.get_short().is_some_and(|short| name.chars().eq([short])));
        let is_short = name.chars().count() == 1;
        let dashed = if is_short { word.clone() } else { format!("-{word}") };
        let Some(arg) = known else {
            // `-help` and `-version` are clap's own.
            if !matches!(name, "help" | "version") {
                return Err(CommandLineError::Unknown(word));
            }
            result.push(dashed);
            continue;
        };
        let optional = arg.get_num_args().is_some_and(|number| number.min_values() == 0);
        let takes_value = arg.get_action().takes_values();
        let next_is_value =
            words.peek().is_some_and(|next| !optional || !matches!(next, Ok(next) if next.starts_with('-')));
        if takes_value && next_is_value {
            let value = words.next().transpose()?.unwrap_or_default();
            result.push(if is_short { format!("{dashed}{value}") } else { format!("{dashed}={value}") });
        } else {
            result.push(dashed);
        }
    }
    Ok(result)
}

/// clap's help, with options as they are written here.
fn help(command: &mut Command) -> String {
    command.render_help().to_string().replace("    --", "-").replace(" --", " -")
}

/// clap's error as a sentence of this program.
fn explain(error: &clap::Error) -> CommandLineError {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(texts)) => texts.join(", "),
        _ => String::new(),
    };
    // `--drive <LIST>`
    let option = context(ContextKind::InvalidArg);
    let option = option.split_once(' ').map_or(option.as_str(), |(name, _)| name).trim_start_matches('-').to_owned();
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<ListError>());
    if let (ErrorKind::ValueValidation, Some(source)) = (error.kind(), source) {
        return CommandLineError::Value { option, value: context(ContextKind::InvalidValue), source: source.clone() };
    }
    let option = format!("-{option}");
    let problem = match error.kind() {
        ErrorKind::ArgumentConflict => "is given twice",
        ErrorKind::MissingRequiredArgument => "is missing",
        ErrorKind::InvalidValue | ErrorKind::TooFewValues => "has no value",
        ErrorKind::TooManyValues | ErrorKind::WrongNumberOfValues => "has a value, and takes none",
        _ => return CommandLineError::Unknown(option),
    };
    CommandLineError::Use { option, problem }
}
