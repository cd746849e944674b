//! The shim protocol of containerd: `start`, `delete`, and the serving process between them.

mod delete;
mod flags;
mod info;
mod process;
mod serve;
mod start;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use flags::{Action, Flags};

pub use process::ProcessIdentity;
pub use serve::{ServeError, Service, divided, in_runtime, raise_file_limit, serve_until_told};

/// Runs the verb that the command line names. Errors go to stderr, which containerd shows.
pub fn main() -> ExitCode {
    let flags = match Flags::parse_go_style(std::env::args_os()) {
        Ok(flags) => flags,
        Err(error) => error.exit(),
    };
    let done = if flags.version {
        println!("{}", info::version_text());
        Ok(())
    } else if flags.info {
        print_bytes(&info::runtime_info())
    } else {
        match flags.action {
            Some(Action::Start) => {
                start::run(&flags).map_err(Box::from).and_then(|address| print_bytes(address.as_bytes()))
            }
            Some(Action::Delete) => delete::run(&flags).map_err(Box::from).and_then(|reply| print_bytes(&reply)),
            None => serve::run(&flags).map_err(Box::from),
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

fn print_bytes(bytes: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
    std::io::stdout().write_all(bytes)?;
    Ok(())
}

/// An error and its causes on one line.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// The bundle: named on the command line, or the working directory.
fn bundle(flags: &Flags) -> std::io::Result<PathBuf> {
    flags.bundle.clone().map_or_else(std::env::current_dir, Ok)
}
