//! The command line of a containerd shim: Go's flags, where a long name has one dash.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Flags that containerd gives. Without an action the process serves the socket it inherited.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "containerd-shim-inlay-v2",
    about = "containerd's shim for sandboxes in microVMs",
    disable_version_flag = true
)]
pub struct Flags {
    /// Namespace that owns the container
    #[arg(long, default_value = "")]
    pub namespace: String,
    /// Identifier of the container
    #[arg(long, default_value = "")]
    pub id: String,
    /// Address of containerd's gRPC socket
    #[arg(long, default_value = "")]
    pub address: String,
    /// Path of the binary that publishes events; events go over ttrpc, so it is not used
    #[arg(long, default_value = "")]
    pub publish_binary: String,
    /// Path of the bundle; the working directory is the bundle where it is missing
    #[arg(long)]
    pub bundle: Option<PathBuf>,
    /// Log in detail
    #[arg(long)]
    pub debug: bool,
    /// Print the version
    #[arg(short = 'v', long)]
    pub version: bool,
    /// Print what the runtime is, as containerd's protobuf message
    #[arg(long)]
    pub info: bool,
    /// What to do
    #[arg(value_enum)]
    pub action: Option<Action>,
}

/// Verbs of the shim protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Action {
    /// Start a shim, or find the one of the container's pod, and print its address
    Start,
    /// Remove everything that a container left
    Delete,
}

impl Flags {
    /// Parses `arguments`, the first of which is the program's name.
    pub fn parse_go_style(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        Self::try_parse_from(arguments.into_iter().map(with_two_dashes))
    }

    /// The flags that a serving process needs, in the form in which containerd gave them.
    pub fn to_arguments(&self) -> Vec<String> {
        let pairs = [
            ("-namespace", &self.namespace),
            ("-id", &self.id),
            ("-address", &self.address),
            ("-publish-binary", &self.publish_binary),
        ];
        let given = pairs.into_iter().filter(|(_, value)| !value.is_empty());
        let mut arguments: Vec<String> = given.flat_map(|(name, value)| [name.to_owned(), value.clone()]).collect();
        arguments.extend(self.debug.then(|| "-debug".to_owned()));
        arguments
    }
}

/// `-id`, `-id=x` become `--id`, `--id=x`. What follows one dash and is no single letter is a long name; containerd's
/// values never begin with a dash.
fn with_two_dashes(argument: OsString) -> OsString {
    match argument.to_str() {
        Some(text) if text.len() > 2 && text.starts_with('-') && !text.starts_with("--") => format!("-{text}").into(),
        _ => argument,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Flags {
        let all = std::iter::once("containerd-shim-inlay-v2").chain(arguments.iter().copied());
        Flags::parse_go_style(all.map(OsString::from)).unwrap()
    }

    #[test]
    fn reads_what_containerd_1_6_passes_to_start() {
        let flags = parse(&[
            "-namespace",
            "default",
            "-address",
            "/run/containerd/containerd.sock",
            "-publish-binary",
            "/usr/bin/containerd",
            "-id",
            "demo",
            "-debug",
            "start",
        ]);
        assert_eq!(flags.namespace, "default");
        assert_eq!(flags.address, "/run/containerd/containerd.sock");
        assert_eq!(flags.publish_binary, "/usr/bin/containerd");
        assert_eq!(flags.id, "demo");
        assert!(flags.debug);
        assert_eq!(flags.action, Some(Action::Start));
        assert_eq!(flags.bundle, None);
    }

    #[test]
    fn reads_what_containerd_passes_to_delete() {
        let flags = parse(&["-namespace", "k8s.io", "-id", "x", "-bundle", "/run/b", "delete"]);
        assert_eq!(flags.bundle, Some("/run/b".into()));
        assert_eq!(flags.action, Some(Action::Delete));
    }

    #[test]
    fn takes_every_go_spelling() {
        assert_eq!(parse(&["-id=a"]).id, "a");
        assert_eq!(parse(&["--id", "a"]).id, "a");
        assert_eq!(parse(&["--id=a"]).id, "a");
        assert!(parse(&["-v"]).version && parse(&["-version"]).version && parse(&["-info"]).info);
    }

    #[test]
    fn a_serving_process_gets_its_flags_back() {
        let flags = parse(&["-namespace", "n", "-id", "i", "-address", "a", "-publish-binary", "p", "-debug", "start"]);
        let arguments = flags.to_arguments();
        let again = parse(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(
            (again.namespace, again.id, again.address, again.publish_binary, again.debug, again.action),
            (flags.namespace, flags.id, flags.address, flags.publish_binary, true, None)
        );
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        let all = ["shim", "-frobnicate", "start"].map(OsString::from);
        assert!(Flags::parse_go_style(all).is_err());
    }
}
