//! The commands: one table that requests are served from, that `query-commands` lists, and that the documentation's table is
//! made of.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::arguments::{BlockdevAdd, DeviceAdd, NetdevAdd, Nothing};
use super::connection::Connection;
use super::error::CommandError;
use super::monitor::Monitor;
use super::{block, queries, types};

/// What a command returns.
pub type Answer = Result<Value, CommandError>;

/// How a command compares with StratoVirt's microvm machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The same.
    Compatible,
    /// More than there.
    Extended,
    /// An answer without content, there as here, for clients that want one.
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

/// Reads arguments, without those that change nothing.
fn read_without<A: DeserializeOwned>(arguments: Option<Value>, ignored: &[&str]) -> Result<A, CommandError> {
    let mut arguments = arguments.unwrap_or_else(|| json!({}));
    if let Some(arguments) = arguments.as_object_mut() {
        arguments.retain(|name, _| !ignored.contains(&name.as_str()));
    }
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
    Command::new(
        "system_powerdown",
        Compatible,
        "Ends the machine, with a POWERDOWN event: its guest has no power button.",
        |monitor, _, arguments| {
            none(arguments)?;
            monitor.system_powerdown()
        },
    ),
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
    Command::new("query-balloon", Compatible, "How many bytes the guest has kept.", |monitor, _, _| {
        monitor.query_balloon()
    }),
    Command::new(
        "set-viomem",
        Compatible,
        "Asks the guest to have so many bytes of its virtio-mem device.",
        |monitor, _, arguments| monitor.set_viomem(read(arguments)?),
    ),
    Command::new("get-viomem", Compatible, "What the guest has of its virtio-mem device.", |monitor, _, arguments| {
        monitor.get_viomem(read(arguments)?)
    }),
    Command::empty("query-mem", object),
    Command::new("query-mem-gpa", Extended, "The four bytes at a guest physical address.", |monitor, _, arguments| {
        monitor.query_mem_gpa(read(arguments)?)
    }),
    Command::refused("query-vcpu-reg", "The registers of an x86 processor have no numbers to ask for."),
    // Devices.
    Command::new("blockdev-add", Extended, "Opens a drive for device_add.", |monitor, _, arguments| {
        monitor.blockdev_add(read_without(arguments, BlockdevAdd::WITHOUT_EFFECT)?)
    }),
    Command::new("blockdev-del", Extended, "Closes a drive that is not plugged.", |monitor, _, arguments| {
        monitor.blockdev_del(read(arguments)?)
    }),
    Command::new("netdev_add", Compatible, "Opens a tap interface for device_add.", |monitor, _, arguments| {
        monitor.netdev_add(read_without(arguments, NetdevAdd::WITHOUT_EFFECT)?)
    }),
    Command::new("netdev_del", Extended, "Closes an interface that is not plugged.", |monitor, _, arguments| {
        monitor.netdev_del(read(arguments)?)
    }),
    Command::new("device_add", Compatible, "Plugs a drive or an interface into a slot.", |monitor, _, arguments| {
        monitor.device_add(read_without(arguments, DeviceAdd::WITHOUT_EFFECT)?)
    }),
    Command::new("device_del", Compatible, "Takes a device out of its slot and closes it.", |monitor, _, arguments| {
        monitor.device_del(read(arguments)?)
    }),
    Command::new("getfd", Compatible, "Names the file descriptor that came with it.", |monitor, client, arguments| {
        monitor.getfd(client, read(arguments)?)
    }),
    Command::new("query-block", Extended, "The plugged drives.", |monitor, _, _| Ok(block::devices(&monitor.front))),
    Command::new("query-named-block-nodes", Extended, "The drives, plugged or not.", |monitor, _, _| {
        Ok(block::nodes(&monitor.front))
    }),
    Command::new("query-blockstats", Extended, "What guests have done with the drives.", |monitor, _, _| {
        Ok(block::statistics(&monitor.front))
    }),
    Command::empty("query-block-jobs", objects),
    Command::empty("block-commit", object),
    Command::new("query-chardev", Extended, "The streams of the command line.", |monitor, _, _| {
        Ok(queries::chardevs(&monitor.front))
    }),
    Command::new("query-iothreads", Compatible, "The event loop, by each iothread's name.", |monitor, _, _| {
        Ok(queries::iothreads(&monitor.front))
    }),
    // Snapshots.
    Command::new(
        "migrate",
        Extended,
        "Stops the machine and saves it to a directory; with `background-snapshot`, saves it while it runs.",
        |monitor, _, arguments| monitor.migrate(read(arguments)?),
    ),
    Command::new("query-migrate", Extended, "How the last snapshot went, or how far it is.", |monitor, _, _| {
        Ok(monitor.query_migrate())
    }),
    Command::new("migrate_cancel", Extended, "Gives up a snapshot of a machine that runs.", |monitor, _, _| {
        monitor.migrate_cancel()
    }),
    Command::new(
        "migrate-set-capabilities",
        Extended,
        "Whether the machine is saved while it runs: `background-snapshot`.",
        |monitor, _, arguments| monitor.migrate_set_capabilities(read(arguments)?),
    ),
    Command::new(
        "query-migrate-capabilities",
        Extended,
        "Whether the machine is saved while it runs.",
        |monitor, _, _| Ok(monitor.query_migrate_capabilities()),
    ),
    // What libvirt asks.
    Command::constant("query-target", Compatible, "The processors' architecture.", queries::target),
    Command::constant("query-kvm", Compatible, "That KVM is there.", queries::kvm),
    Command::constant("query-machines", Compatible, "The machine type.", queries::machines),
    Command::constant("qom-list-types", Compatible, "The kinds of devices and objects.", types::list),
    Command::new("device-list-properties", Extended, "The properties of a kind of device.", |_, _, arguments| {
        Ok(types::properties(&read(arguments)?))
    }),
    Command::new(
        "query-command-line-options",
        Extended,
        "The options of the command line that are lists, and their properties.",
        |_, _, arguments| Ok(types::options(&read(arguments)?)),
    ),
    Command::empty("query-qmp-schema", object),
    Command::empty("query-gic-capabilities", objects),
    Command::empty("query-sev-capabilities", object),
    Command::empty("query-tpm-models", objects),
    Command::empty("query-tpm-types", objects),
    Command::empty("qom-list", objects),
    Command::empty("qom-get", objects),
    Command::empty("trace-get-state", objects),
    Command::empty("input_event", object),
    // Not for a microvm machine.
    Command::refused("chardev-add", "Character devices cannot be added to a machine that runs."),
    Command::refused("chardev-remove", "Character devices cannot be removed from a machine that runs."),
    Command::refused("cameradev_add", "The machine has no cameras."),
    Command::refused("cameradev_del", "The machine has no cameras."),
    Command::refused("netdev_replace", "A network device is replaced by device_del and device_add."),
    Command::refused("blockdev-snapshot-internal-sync", "A raw drive has no snapshots."),
    Command::refused("blockdev-snapshot-delete-internal-sync", "A raw drive has no snapshots."),
    Command::refused("trace-set-state", "There are no trace points to switch."),
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
