//! `inlay template`: machines that sandboxes are restored from.

mod serve;

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Subcommand;
use seccomp::Confinement;
use tracing_subscriber::filter::LevelFilter;
use vmm::memory::source::Address;
use vmm::memory::working_set::{WORKING_SET, WRITTEN_SET};

use crate::bootstrap::{raise_file_limit, with_causes};
use crate::config::Config;
use crate::ids::Id;
use crate::log;
use crate::main_thread::{self, Ended};
use crate::pool;
use crate::run_dir::RunDir;
use crate::template::create::{CreateError, Outcome, When, create};
use crate::template::transfer::{Server, export, import};
use crate::template::{Store, Template, TemplateError};

use serve::serve;

/// What is done with templates.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Boot a machine as a sandbox's and save it; one that has the name is replaced
    Create {
        /// Name of the template; sandboxes use `default`, or the one that `list` shows for their configuration file
        name: String,
        /// Do nothing if the template is there and fits
        #[arg(long)]
        if_needed: bool,
        /// Do nothing if somebody else is making it
        #[arg(long, requires = "if_needed")]
        no_wait: bool,
    },
    /// List the templates, and whether the configuration's machine can be restored from them
    List,
    /// Print what a template is
    Show {
        /// Name of the template
        name: String,
    },
    /// Compare all files of a template with the checksums that were taken when it was made; what is elsewhere is fetched
    Verify {
        /// Name of the template
        name: String,
    },
    /// Remove a template, and what is left of attempts to make it; sandboxes that come from it go on
    Remove {
        /// Name of the template
        name: String,
    },
    /// Write all that other nodes need of a template to a directory, its memory in packed chunks
    Export {
        /// Name of the template
        name: String,
        /// A new directory, or an empty one; any program may copy it
        directory: PathBuf,
    },
    /// Serve the chunks of an exported template until a signal ends this; to whoever connects, neither encrypted nor asked
    /// who it is
    Serve {
        /// The directory of the exported template
        directory: PathBuf,
        /// unix:PATH, from the root on, or tcp:ADDRESS:PORT
        #[arg(long, value_name = "ADDRESS")]
        listen: Address,
    },
    /// Make a template of what was exported on another node; one that has the name is replaced
    Import {
        /// Name of the template, which need not be the one that it had
        name: String,
        /// The directory of the exported template
        directory: PathBuf,
        /// Leave the memory where it is served: unix:PATH, from the root on, or tcp:ADDRESS:PORT. The directory needs no chunks then
        #[arg(long, value_name = "ADDRESS")]
        chunks: Option<Address>,
    },
}

/// Does what the command line asks for.
pub fn run(verb: Verb, config: Option<&Path>) -> ExitCode {
    match try_run(verb, config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("inlay: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

fn try_run(verb: Verb, config_path: Option<&Path>) -> Result<(), Box<dyn Error>> {
    let (config, _) = Config::load(config_path)?;
    let store = Store::new(&config, &RunDir::from_environment());
    match verb {
        Verb::Create { name, if_needed, no_wait } => {
            let when = match (if_needed, no_wait) {
                (false, _) => When::Always,
                (true, false) => When::Needed,
                (true, true) => When::NeededAndFree,
            };
            make(&store, &Id::try_from(name)?, &config, when)
        }
        Verb::List => list(&store, &config),
        Verb::Show { name } => show(&store, &Id::try_from(name)?, &config),
        Verb::Verify { name } => {
            let template = Template::open(&store, &Id::try_from(name)?)?;
            template.verify()?;
            let fetched = match &template.record().elsewhere {
                Some(elsewhere) => format!(", and so is its memory at {}", elsewhere.chunks),
                None => String::new(),
            };
            println!("The template {} is whole{fetched}", template.record().name);
            Ok(())
        }
        Verb::Remove { name } => {
            let name = Id::try_from(name)?;
            store.remove(&name)?;
            // They hold its files, and nobody gets them any more.
            Ok(pool::drain(&RunDir::from_environment(), Some(&name))?)
        }
        Verb::Export { name, directory } => {
            let template = Template::open(&store, &Id::try_from(name)?)?;
            confine(&config)?;
            let exported = export(&template, &directory)?;
            println!("The template {} is in {}", exported.name, directory.display());
            Ok(())
        }
        Verb::Serve { directory, listen } => serve(&directory, &listen, &config),
        Verb::Import { name, directory, chunks } => {
            let name = Id::try_from(name)?;
            let server = chunks.map(|address| Server::find(address, &directory)).transpose()?;
            confine(&config)?;
            let template = import(&store, &name, &config, &directory, server)?;
            println!("The template {name} takes {}; it is in {}", memory(&template)?, store.path(&name).display());
            Ok(())
        }
    }
}

/// For what comes from another node, or goes there: the process is confined as one that is a machine.
fn confine(config: &Config) -> Result<(), Box<dyn Error>> {
    log::init(None, config.runtime.log_level.min(LevelFilter::WARN));
    if config.runtime.confinement == Confinement::On {
        seccomp::confine_machine()?;
    }
    Ok(())
}

/// The process is confined as one that is a machine. Machines are made by its first thread, and what waits for a guest
/// waits in another one.
fn make(store: &Store, name: &Id, config: &Config, when: When) -> Result<(), Box<dyn Error>> {
    raise_file_limit();
    confine(config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (main, work) = main_thread::new();
    let made = std::thread::scope(|scope| {
        let maker = scope.spawn(|| {
            let made = runtime.block_on(create(store, name, config, when, &main));
            main.end();
            made
        });
        work.run();
        maker.join()
    });
    let outcome = made.unwrap_or_else(|_| Err(Ended.into()));
    if let Err(error) = &outcome
        && is_worth_remembering(error)
    {
        store.note_failure(name, &with_causes(error));
    }
    let text = match outcome? {
        Outcome::Made(template) => {
            format!("The template {name} takes {}; it is in {}", memory(&template)?, store.path(name).display())
        }
        Outcome::Present => format!("The template {name} is there and fits"),
        Outcome::Busy => format!("Somebody else is making the template {name}"),
    };
    // Whoever has started this may have ended meanwhile, and then nobody reads it.
    let _ = writeln!(std::io::stdout(), "{text}");
    Ok(())
}

/// A kernel that was replaced meanwhile says nothing about the next attempt.
fn is_worth_remembering(error: &CreateError) -> bool {
    !matches!(error, CreateError::Changed)
}

fn list(store: &Store, config: &Config) -> Result<(), Box<dyn Error>> {
    for name in store.names()? {
        let template = Template::open(store, &name);
        let state = match &template {
            Ok(template) => match template.check(config) {
                Ok(()) => match &template.record().elsewhere {
                    Some(elsewhere) => format!("fits; its memory is at {}", elsewhere.chunks),
                    None => "fits".to_owned(),
                },
                Err(error) => with_causes(&error),
            },
            Err(error) => with_causes(error),
        };
        let memory = template.ok().and_then(|template| memory(&template).ok()).unwrap_or_else(|| "?".to_owned());
        println!("{name:<24} {memory:>20}  {state}");
    }
    Ok(())
}

fn show(store: &Store, name: &Id, config: &Config) -> Result<(), Box<dyn Error>> {
    let template = Template::open(store, name)?;
    let record = template.record();
    let age = SystemTime::now().duration_since(UNIX_EPOCH)?.saturating_sub(Duration::from_secs(record.made));
    let images = record.images.describe();
    println!("name       {}", record.name);
    println!("directory  {}", store.path(name).display());
    println!("made       {} s ago", age.as_secs());
    println!("mark       {}", record.mark);
    println!("memory     {}", memory(&template)?);
    if let Some(elsewhere) = &record.elsewhere {
        println!("chunks     {}, by the index {}", elsewhere.chunks, elsewhere.index_sha256);
    }
    let (asked, written) = (template.working_set(WORKING_SET)?, template.working_set(WRITTEN_SET)?);
    if asked.is_none() && written.is_none() {
        println!("ahead      nothing: no start was recorded");
    }
    for (set, what) in [(asked, "asks for first"), (written, "writes to first")] {
        if let Some(set) = set {
            println!("ahead      {} KiB, which a start {what}", set.bytes() >> 10);
        }
    }
    println!("kernel     {}\nroot       {}", images[0], images[1]);
    println!("machine    {}", serde_json::to_string(&record.key)?);
    match template.check(config) {
        Ok(()) => println!("fits       yes"),
        Err(error) => println!("fits       no: {}", with_causes(&error)),
    }
    Ok(())
}

/// How much of a template's memory is not zero, and how much it stands for.
fn memory(template: &Template) -> Result<String, TemplateError> {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    template.size().map(|(filled, all)| format!("{} of {} MiB", mib(filled), mib(all)))
}
