//! `inlay pool`: sandboxes that are restored before anybody asks for them.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use clap::Subcommand;

use crate::bootstrap::with_causes;
use crate::config::Config;
use crate::pool::{drain, fill, has_a_pool, keep, occupants};
use crate::run_dir::RunDir;
use crate::template::name_for;

/// What is done with the pool.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Fill the pool up to the configuration's pool_size, and wait until it is full
    Fill,
    /// List the pool: each slot, its process, and whether it can be claimed
    List,
    /// End all spares and remove what they have; sandboxes that spares became go on
    Drain,
    /// Fill one slot and wait to be claimed; starts send this when their standard input ends
    #[command(hide = true)]
    Keep,
}

/// Does what the command line asks for.
pub fn run(verb: &Verb, config: Option<&Path>) -> ExitCode {
    match try_run(verb, config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("inlay: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

fn try_run(verb: &Verb, config_path: Option<&Path>) -> Result<(), Box<dyn Error>> {
    let run_dir = RunDir::from_environment();
    match verb {
        Verb::Keep => Ok(keep(config_path)?),
        Verb::Drain => Ok(drain(&run_dir, None)?),
        Verb::List => {
            for occupant in occupants(&run_dir, None) {
                let state = if occupant.ready { "ready" } else { "being filled, or left" };
                let process = occupant.process.map_or_else(|| "-".to_owned(), |process| process.pid.to_string());
                println!("{:<20} {process:>8}  {state}", occupant.slot);
            }
            Ok(())
        }
        Verb::Fill => {
            let (config, _) = Config::load(config_path)?;
            if !has_a_pool(&config) {
                return Err(
                    "The configuration has no pool: [factory] wants enable_template = true and a pool_size, and \
                            [agent.kata] no debug console"
                        .into(),
                );
            }
            let name = name_for(config_path);
            let ready = occupants(&run_dir, Some(&name)).iter().filter(|occupant| occupant.ready).count();
            let wanted = config.factory.pool_size.saturating_sub(u32::try_from(ready).unwrap_or(u32::MAX));
            let filled = fill(config_path, wanted)?;
            println!("{filled} spares were made, {ready} were there");
            Ok(())
        }
    }
}
