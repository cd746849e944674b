//! The commands: one table that requests are served from, that `query-commands` lists, and that the documentation's table is
//! made of.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::arguments::Nothing;
use super::connection::Connection;
use super::error::CommandError;
use super::monitor::Monitor;
use super::queries;

/// What a command returns.
pub type Answer = Result<Value, CommandError>;

/// How a command compares with StratoVirt's microvm machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The same.
    Compatible,
    /// More than there.
    Extended,
    /// An answer without content, for clients that want one.
    Empty,
    /// Refused, there as here.
    Refused,
}

/// A command.
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// How it compares.
    pub standing: Standing,
    /// What it does, or why it is refused; one sentence.
    pub summary: &'static str,
    serve: Serve,
}

enum Serve {
    With(fn(&mut Monitor, &mut Connection, Option<Value>) -> Answer),
    Constant(fn() -> Value),
    Refuse,
}

impl Command {
    const fn new(
        name: &'static str,
        standing: Standing,
        summary: &'static str,
        serve: fn(&mut Monitor, &mut Connection, Option<Value>) -> Answer,
    ) -> Self {
        Self { name, standing, summary, serve: Serve::With(serve) }
    }

    const fn constant(name: &'static str, standing: Standing, summary: &'static str, value: fn() -> Value) -> Self {
        Self { name, standing, summary, serve: Serve::Constant(value) }
    }

    const fn empty(name: &'static str, value: fn() -> Value) -> Self {
        Self::constant(name, Standing::Empty, "Nothing to tell.", value)
    }

    const fn refused(name: &'static str, reason: &'static str) -> Self {
        Self { name, standing: Standing::Refused, summary: reason, serve: Serve::Refuse }
    }
}

/// Serves a request.
pub fn serve(monitor: &mut Monitor, client: &mut Connection, name: &str, arguments: Option<Value>) -> Answer {
    let command =
        COMMANDS.iter().find(|command| command.name == name).ok_or_else(|| CommandError::Unknown(name.to_owned()))?;
    match command.serve {
        Serve::With(serve) => serve(monitor, client, arguments),
        // QEMU's clients pass arguments that change nothing about an empty answer.
        Serve::Constant(value) => Ok(value()),
        Serve::Refuse => Err(CommandError::refused(command.summary.trim_end_matches('.'))),
    }
}

/// Reads arguments; none are as good as an empty object.
fn read<A: DeserializeOwned>(arguments: Option<Value>) -> Result<A, CommandError> {
    let arguments = arguments.unwrap_or_else(|| json!({}));
    serde_json::from_value(arguments).map_err(CommandError::Arguments)
}

fn none(arguments: Option<Value>) -> Result<(), CommandError> {
    read::<Nothing>(arguments).map(|Nothing {}| ())
}

fn objects() -> Value {
    json!([])
}

fn object() -> Value {
    json!({})
}

use Standing::{Compatible, Extended};

/// All commands, by what they are about.
pub const COMMANDS: &[Command] = &[
    Command::new("qmp_capabilities", Compatible, "Begins the conversation; nothing depends on it.", |_, _, _| {
        Ok(object())
    }),
    Command::new("query-commands", Compatible, "Lists these commands.", |_, _, arguments| {
        none(arguments)?;
        Ok(COMMANDS.iter().map(|command| json!({"name": command.name})).collect())
    }),
    Command::constant("query-version", Compatible, "The version in the greeting.", queries::version),
    Command::constant("query-events", Compatible, "Names of the events.", queries::events),
    // The machine's life.
    Command::new("stop", Compatible, "Stops the processors.", |monitor, _, arguments| {
        none(arguments)?;
        monitor.stop()
    }),
    Command::new("cont", Compatible, "Lets the processors run.", |monitor, _, arguments| {
        none(arguments)?;
        monitor.cont()
    }),
    Command::new("quit", Compatible, "Ends the machine.", |monitor, _, arguments| {
        none(arguments)?;
        monitor.quit()
    }),
    Command::new("system_reset", Compatible, "Ends the machine, with a RESET event.", |monitor, _, arguments| {
        none(arguments)?;
        monitor.system_reset()
    }),
    Command::refused("system_powerdown", "The machine has no power button."),
    Command::new("query-status", Compatible, "Whether the processors run.", |monitor, _, arguments| {
        none(arguments)?;
        Ok(monitor.query_status())
    }),
    // Processors and memory.
    Command::new("query-cpus", Compatible, "The processors and their threads.", |monitor, _, arguments| {
        none(arguments)?;
        Ok(queries::cpus(monitor.machine()))
    }),
    Command::new("query-hotpluggable-cpus", Compatible, "The processors' places.", |monitor, _, arguments| {
        none(arguments)?;
        Ok(queries::hotpluggable_cpus(monitor.machine()))
    }),
    Command::new("balloon", Compatible, "Asks the guest to keep so many bytes.", |monitor, _, arguments| {
        monitor.balloon(read(arguments)?)
    }),
    Command::new("query-balloon", Compatible, "How many bytes the guest has kept.", |monitor, _, arguments| {
        none(arguments)?;
        monitor.query_balloon()
    }),
    Command::refused("query-mem", "The memory of a microvm machine does not change."),
    Command::refused("query-mem-gpa", "The memory of the guest is not shown."),
    Command::refused("set-viomem", "The size of a virtio-mem device is not set over QMP."),
    Command::refused("get-viomem", "The size of a virtio-mem device is not told over QMP."),
    Command::refused("query-vcpu-reg", "The registers of an x86 processor have no numbers to ask for."),
    // Devices.
    Command::new("blockdev-add", Extended, "Opens a drive for device_add.", |monitor, _, arguments| {
        monitor.blockdev_add(read(arguments)?)
    }),
    Command::new("blockdev-del", Extended, "Closes a drive that is not plugged.", |monitor, _, arguments| {
        monitor.blockdev_del(read(arguments)?)
    }),
    Command::new("netdev_add", Extended, "Opens a tap interface for device_add.", |monitor, _, arguments| {
        monitor.netdev_add(read(arguments)?)
    }),
    Command::new("netdev_del", Extended, "Closes an interface that is not plugged.", |monitor, _, arguments| {
        monitor.netdev_del(read(arguments)?)
    }),
    Command::new("device_add", Extended, "Plugs a drive or an interface into a slot.", |monitor, _, arguments| {
        monitor.device_add(read(arguments)?)
    }),
    Command::new("device_del", Compatible, "Takes a device out of its slot and closes it.", |monitor, _, arguments| {
        monitor.device_del(read(arguments)?)
    }),
    Command::new("getfd", Compatible, "Names the file descriptor that came with it.", |monitor, client, arguments| {
        monitor.getfd(client, read(arguments)?)
    }),
    Command::refused("chardev-add", "Character devices cannot be added to a machine that runs."),
    Command::refused("chardev-remove", "Character devices cannot be removed from a machine that runs."),
    Command::refused("block-commit", "A raw drive has nothing below it to commit to."),
    Command::refused("cameradev_add", "The machine has no cameras."),
    Command::refused("cameradev_del", "The machine has no cameras."),
    Command::refused("netdev_replace", "A network device is replaced by device_del and device_add."),
    Command::refused("blockdev-snapshot-internal-sync", "A raw drive has no snapshots."),
    Command::refused("blockdev-snapshot-delete-internal-sync", "A raw drive has no snapshots."),
    // Snapshots.
    Command::new("migrate", Compatible, "Stops the machine and saves it to a directory.", |monitor, _, arguments| {
        monitor.migrate(read(arguments)?)
    }),
    Command::new("query-migrate", Compatible, "How the last snapshot went.", |monitor, _, arguments| {
        none(arguments)?;
        Ok(json!({"status": monitor.migration()}))
    }),
    Command::empty("migrate_cancel", object),
    // What libvirt asks.
    Command::empty("query-chardev", objects),
    Command::empty("query-block", objects),
    Command::empty("query-named-block-nodes", objects),
    Command::empty("query-blockstats", objects),
    Command::empty("query-block-jobs", objects),
    Command::empty("query-iothreads", objects),
    Command::empty("query-gic-capabilities", objects),
    Command::empty("query-tpm-models", objects),
    Command::empty("query-tpm-types", objects),
    Command::empty("query-command-line-options", objects),
    Command::empty("query-migrate-capabilities", objects),
    Command::empty("query-qmp-schema", objects),
    Command::empty("query-sev-capabilities", object),
    Command::empty("qom-list", objects),
    Command::empty("qom-get", object),
    Command::empty("device-list-properties", objects),
    Command::empty("trace-get-state", objects),
    Command::constant("query-target", Compatible, "The processors' architecture.", queries::target),
    Command::constant("query-kvm", Compatible, "That KVM is there.", queries::kvm),
    Command::constant("query-machines", Compatible, "The machine type.", queries::machines),
    Command::constant("qom-list-types", Compatible, "The kinds of devices.", queries::types),
    // Not for a microvm machine.
    Command::refused("trace-set-state", "There are no trace points to switch."),
    Command::refused("input_event", "The machine has no input devices."),
    Command::refused("update_region", "The machine has no test device."),
    Command::refused("query-vnc", "The machine has no display."),
    Command::refused("query-display-image", "The machine has no display."),
    Command::refused("switch-audio-record", "The machine has no sound."),
    Command::refused("detect-silent-audio", "The machine has no sound."),
    Command::refused("netlink_set", "The machine does not configure the host's network."),
    Command::refused("human-monitor-command", "There is no human monitor."),
    Command::refused("query-ohui-status", "The machine has no display."),
    Command::refused("query-workloads", "The machine does not know its workloads."),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_one_name_and_one_sentence() {
        let mut names: Vec<_> = COMMANDS.iter().map(|command| command.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), COMMANDS.len());
        for command in COMMANDS {
            assert!(command.summary.ends_with('.'), "{}", command.name);
            let refused = matches!(command.serve, Serve::Refuse);
            assert_eq!(refused, command.standing == Standing::Refused, "{}", command.name);
        }
    }
}
