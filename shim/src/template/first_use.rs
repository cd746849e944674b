//! What a start does: restore, or boot and have a template made.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::io::Interest;
use vmm::Machine;

use super::create::fitting;
use super::{Chunks, Store, Template, TemplateError};
use crate::bootstrap::with_causes;
use crate::config::{self, Config};
use crate::ids::Id;
use crate::main_thread::{Ended, MainThread};
use crate::readiness;
use crate::run_dir::{RunDir, hex};

/// How long after a failure the next attempt is made, so that a node on which no template can be made does not boot two
/// guests for each sandbox.
const RETRY_AFTER: Duration = Duration::from_secs(60);
/// Longest part of a name that comes from the configuration's file name.
const MAX_STEM: usize = 40;
/// The name under which the operator's command runs, whatever the file is called.
const PROGRAM: &str = "inlay";

/// Where a sandbox's guest comes from.
#[derive(Debug)]
pub enum Plan {
    /// From the kernel, and the initrd or image.
    Boot,
    /// The same, while a template is made for others. Somebody should hear what comes of it.
    BootAndReport(Maker),
    /// From a template.
    Restore(Ready),
    /// From a template that was restored beforehand.
    Wake(Arc<Machine>),
}

/// A template that fits, and the way to its memory.
#[derive(Debug)]
pub struct Ready {
    /// The template.
    pub template: Arc<Template>,
    /// Its memory, where that is elsewhere.
    pub chunks: Option<Chunks>,
}

impl Ready {
    /// Finds the template `name` of the machine that `config` describes. To be called before the process is confined.
    pub fn find(store: &Store, name: &Id, config: &Config) -> Result<Self, TemplateError> {
        let template = fitting(store, name, config)?;
        let chunks = Chunks::find(&template, store, config)?;
        Ok(Self { template: Arc::new(template), chunks })
    }
}

/// Finds out where the guest of a sandbox comes from. A start never fails for lack of a template: without one that can
/// be used it boots, the log says why, and one is made meanwhile, or first, if the configuration says so.
///
/// To be called before the process joins its sandbox's control group and is confined: the maker of a template is a
/// process of the node, not of the sandbox. Files are read, and the maker is started, by the thread `main`. A process
/// that is confined already, for a spare or for a start that failed, looks for a template and leaves it at that.
pub async fn plan(
    config: &Config,
    config_path: Option<&Path>,
    run_dir: &RunDir,
    main: &MainThread,
) -> Result<Plan, Ended> {
    if !config.factory.enabled {
        return Ok(Plan::Boot);
    }
    let (store, name) = (Store::new(config, run_dir), name_for(config_path));
    let look = {
        let (store, name, config) = (store.clone(), name.clone(), config.clone());
        move || Ready::find(&store, &name, &config)
    };
    let unusable = match main.run(look.clone()).await? {
        Ok(ready) => return Ok(Plan::Restore(ready)),
        Err(error) => error,
    };
    match &unusable {
        // The first one, or the first after it was removed.
        TemplateError::Missing(_) => tracing::info!("{unusable} yet"),
        _ => tracing::warn!("The template is not used: {}", with_causes(&unusable)),
    }
    if seccomp::is_confined() || !unusable.is_curable() {
        return Ok(Plan::Boot);
    }
    if let Some(why) = store.recent_failure(&name, RETRY_AFTER) {
        tracing::warn!("No template is made, as this failed a short time ago: {why}");
        return Ok(Plan::Boot);
    }
    let start = {
        let (config_path, waits) = (config_path.map(Path::to_owned), config.factory.wait);
        move || Maker::start(store, name, config_path.as_deref(), waits)
    };
    let maker = match main.run(start).await? {
        Err(error) => {
            tracing::warn!(%error, "The maker of a template cannot be started");
            return Ok(Plan::Boot);
        }
        Ok(maker) => maker,
    };
    if !config.factory.wait {
        return Ok(Plan::BootAndReport(maker));
    }
    if tokio::time::timeout(config.agent.boot_deadline, maker.report()).await.is_err() {
        tracing::warn!("The sandbox boots: the template was not made within {:?}", config.agent.boot_deadline);
        return Ok(Plan::Boot);
    }
    Ok(match main.run(look).await? {
        Ok(ready) => Plan::Restore(ready),
        Err(error) => {
            tracing::warn!("The template is not used: {}", with_causes(&error));
            Plan::Boot
        }
    })
}

/// A process that makes a template. It outlives this one if need be: no guest shares it, and no sandbox pays for it.
#[derive(Debug)]
pub struct Maker {
    process: Child,
    /// Its standard output. Nobody else has the other end, so that it ends with the process.
    output: ChildStdout,
    store: Store,
    name: Id,
}

impl Maker {
    fn start(store: Store, name: Id, config_path: Option<&Path>, waits: bool) -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg0(PROGRAM).args(["template", "create", name.as_str(), "--if-needed"]);
        if !waits {
            command.arg("--no-wait");
        }
        if let Some(path) = config_path {
            command.arg("--config").arg(path);
        }
        command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
        let mut process = command.spawn()?;
        let output = process.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { process, output, store, name })
    }

    /// Waits for the end and says in the log what came of it.
    pub async fn report(self) {
        let Self { process, output, store, name } = self;
        match ended(process, output).await {
            Ok(status) if status.success() => tracing::debug!(template = %name, "The template's maker has ended well"),
            Ok(status) => {
                let why = store.recent_failure(&name, RETRY_AFTER);
                tracing::warn!(template = %name, %status, why, "The template was not made");
            }
            Err(error) => tracing::warn!(template = %name, %error, "Cannot wait for the template's maker"),
        }
    }
}

async fn ended(mut process: Child, output: ChildStdout) -> io::Result<ExitStatus> {
    let output = readiness::watch(output.into(), Interest::READABLE)?;
    let mut line = [0; 256];
    loop {
        let mut ready = output.readable().await?;
        match ready.try_io(|output| Ok(nix::unistd::read(output, &mut line)?)) {
            Ok(Ok(0)) => break,
            Ok(Err(error)) => return Err(error),
            // What it says is for people.
            Ok(Ok(_)) | Err(_) => {}
        }
    }
    // It has closed its files, so it is about to end, or has.
    process.wait()
}

/// The name of the template of a configuration: `default`, or the file's name and what tells it from others of that
/// name.
pub fn name_for(config_path: Option<&Path>) -> Id {
    const DEFAULT: &str = "default";
    let named = config_path.filter(|path| *path != Path::new(config::DEFAULT_PATH)).and_then(|path| {
        let stem: String = path.file_stem()?.to_string_lossy().chars().filter(char::is_ascii_alphanumeric).collect();
        let hash = hex(&Sha256::digest(path.as_os_str().as_encoded_bytes()));
        let stem = stem.get(..stem.len().min(MAX_STEM)).filter(|stem| !stem.is_empty()).unwrap_or("config");
        Id::try_from(format!("{stem}-{}", hash.get(..8)?)).ok()
    });
    named.unwrap_or_else(|| Id::of_literal(DEFAULT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_configuration_has_a_template_of_its_own() {
        let name = |path: &str| name_for(Some(Path::new(path))).to_string();
        assert_eq!(name_for(None).as_str(), "default");
        assert_eq!(name(config::DEFAULT_PATH), "default");
        assert!(name("/etc/a/big.toml").starts_with("big-"));
        assert_ne!(name("/etc/a/big.toml"), name("/etc/b/big.toml"));
        assert!(name("/etc/_.toml").starts_with("config-"));
        assert_eq!(name(&format!("/etc/{}.toml", "x".repeat(200))).len(), MAX_STEM + 9);
        assert!(name("/etc/größe.toml").starts_with("gre-"));
    }

    #[tokio::test]
    async fn without_the_factory_nothing_is_looked_at() {
        let run_dir = RunDir::at("/nonexistent".into());
        let (main, _work) = crate::main_thread::new();
        assert!(matches!(plan(&Config::default(), None, &run_dir, &main).await, Ok(Plan::Boot)));
    }

    #[tokio::test]
    async fn a_makers_end_is_seen_by_its_output() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; exec >&-; exit 3"]).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let output = process.stdout.take().unwrap();
        assert_eq!(ended(process, output).await.unwrap().code(), Some(3));
    }
}
