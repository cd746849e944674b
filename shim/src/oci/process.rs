//! A process: the part of the specification that `exec` carries alone.

use std::collections::HashSet;

use agent_proto::oci;
use oci_spec::runtime::{Capability, LinuxCapabilities, Process};

use super::word;

/// The process as the guest gets it. Labels of the host's security modules stay behind: the guest has none of them.
pub fn process(process: &Process) -> oci::Process {
    let user = process.user();
    let guest_user = oci::User {
        UID: user.uid(),
        GID: user.gid(),
        AdditionalGids: user.additional_gids().clone().unwrap_or_default(),
        Username: user.username().clone().unwrap_or_default(),
        ..oci::User::default()
    };
    let rlimits = process.rlimits().iter().flatten().map(|limit| oci::POSIXRlimit {
        Type: word(&limit.typ()),
        Hard: limit.hard(),
        Soft: limit.soft(),
        ..oci::POSIXRlimit::default()
    });
    oci::Process {
        Terminal: process.terminal().unwrap_or(false),
        ConsoleSize: process.console_size().as_ref().map(console_size).into(),
        User: Some(guest_user).into(),
        Args: process.args().clone().unwrap_or_default(),
        Env: process.env().clone().unwrap_or_default(),
        Cwd: process.cwd().to_string_lossy().into_owned(),
        Capabilities: process.capabilities().as_ref().map(capabilities).into(),
        Rlimits: rlimits.collect(),
        NoNewPrivileges: process.no_new_privileges().unwrap_or(false),
        OOMScoreAdj: process.oom_score_adj().map_or(0, i64::from),
        ..oci::Process::default()
    }
}

fn console_size(size: &oci_spec::runtime::Box) -> oci::Box {
    let cells = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
    oci::Box { Height: cells(size.height()), Width: cells(size.width()), ..oci::Box::default() }
}

fn capabilities(sets: &LinuxCapabilities) -> oci::LinuxCapabilities {
    oci::LinuxCapabilities {
        Bounding: names(sets.bounding()),
        Effective: names(sets.effective()),
        Inheritable: names(sets.inheritable()),
        Permitted: names(sets.permitted()),
        Ambient: names(sets.ambient()),
        ..oci::LinuxCapabilities::default()
    }
}

/// Sorted, so that the same specification always makes the same message.
fn names(set: &Option<HashSet<Capability>>) -> Vec<String> {
    let mut names: Vec<String> = set.iter().flatten().map(word).collect();
    names.sort_unstable();
    names
}
