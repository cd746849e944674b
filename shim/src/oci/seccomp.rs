//! The seccomp profile.

use agent_proto::oci;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompArg, LinuxSyscall};

use super::word;

/// The profile as the guest gets it.
pub fn seccomp(profile: &LinuxSeccomp) -> oci::LinuxSeccomp {
    oci::LinuxSeccomp {
        DefaultAction: word(&profile.default_action()),
        Architectures: profile.architectures().iter().flatten().map(word).collect(),
        Flags: profile.flags().iter().flatten().map(word).collect(),
        Syscalls: profile.syscalls().iter().flatten().map(rule).collect(),
        ..oci::LinuxSeccomp::default()
    }
}

fn rule(rule: &LinuxSyscall) -> oci::LinuxSyscall {
    oci::LinuxSyscall {
        Names: rule.names().clone(),
        Action: word(&rule.action()),
        ErrnoRet: rule.errno_ret().map(oci::linux_syscall::ErrnoRet::Errnoret),
        Args: rule.args().iter().flatten().map(argument).collect(),
        ..oci::LinuxSyscall::default()
    }
}

fn argument(argument: &LinuxSeccompArg) -> oci::LinuxSeccompArg {
    oci::LinuxSeccompArg {
        Index: u64::try_from(argument.index()).unwrap_or(u64::MAX),
        Value: argument.value(),
        ValueTwo: argument.value_two().unwrap_or(0),
        Op: word(&argument.op()),
        ..oci::LinuxSeccompArg::default()
    }
}
