//! Kernel parameters that concern the agent.

use tracing::Level;

/// What the kernel's command line says to the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    /// `agent.log=LEVEL`: the least severe record that is written.
    pub log_level: Level,
    /// `agent.log_vport=PORT`: port on the host that takes the log.
    pub log_port: u32,
    /// `agent.server_addr=vsock://-1:PORT`: port of the agent API.
    pub agent_port: u32,
    /// `agent.passfd_listener_port=PORT`: port of the standard streams.
    pub stdio_port: u32,
    /// `agent.debug_console`: a shell for whoever connects to `agent.debug_console_vport`.
    pub debug_console: bool,
    /// `agent.debug_console_vport=PORT`.
    pub debug_console_port: u32,
    /// What could not be understood, one sentence each: there is no log yet when parameters are read.
    pub warnings: Vec<String>,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            log_level: Level::INFO,
            log_port: agent_proto::LOG_PORT,
            agent_port: agent_proto::AGENT_PORT,
            stdio_port: agent_proto::STDIO_PORT,
            debug_console: false,
            debug_console_port: agent_proto::DEBUG_CONSOLE_PORT,
            warnings: Vec::new(),
        }
    }
}

impl Params {
    /// Reads `/proc/cmdline`; a guest without it gets the defaults.
    pub fn from_kernel() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    /// Reads a command line. Only words that begin with `agent.` are the agent's.
    pub fn parse(command_line: &str) -> Self {
        let mut params = Self::default();
        for word in command_line.split_whitespace() {
            let Some(word) = word.strip_prefix("agent.") else { continue };
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            if let Err(reason) = params.set(key, value) {
                params.warnings.push(format!("Kernel parameter agent.{word} is ignored: {reason}"));
            }
        }
        params
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        match key {
            "log" => self.log_level = level(value)?,
            "log_vport" => self.log_port = port(value)?,
            "passfd_listener_port" => self.stdio_port = port(value)?,
            "debug_console_vport" => self.debug_console_port = port(value)?,
            "debug_console" => self.debug_console = flag(value)?,
            "server_addr" => {
                let port_part = value.strip_prefix("vsock://-1:").ok_or("only vsock://-1:PORT is served")?;
                self.agent_port = port(port_part)?;
            }
            _ => return Err("unknown key"),
        }
        Ok(())
    }
}

fn level(value: &str) -> Result<Level, &'static str> {
    match value {
        "trace" => Ok(Level::TRACE),
        "debug" => Ok(Level::DEBUG),
        "info" => Ok(Level::INFO),
        "warn" | "warning" => Ok(Level::WARN),
        "error" | "critical" => Ok(Level::ERROR),
        _ => Err("levels are trace, debug, info, warn and error"),
    }
}

fn port(value: &str) -> Result<u32, &'static str> {
    match value.parse() {
        Ok(0 | u32::MAX) | Err(_) => Err("not a vsock port"),
        Ok(port) => Ok(port),
    }
}

fn flag(value: &str) -> Result<bool, &'static str> {
    match value {
        "" | "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err("neither true nor false"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_read() {
        let params = Params::parse(
            "console=ttyS0 agent.log=debug agent.log_vport=7 agent.server_addr=vsock://-1:9 agent.debug_console \
             agent.debug_console_vport=8 agent.passfd_listener_port=6 quiet",
        );
        let expected = Params {
            log_level: Level::DEBUG,
            log_port: 7,
            agent_port: 9,
            stdio_port: 6,
            debug_console: true,
            debug_console_port: 8,
            warnings: Vec::new(),
        };
        assert_eq!(params, expected);
    }

    #[test]
    fn what_is_not_understood_is_warned_about_and_changes_nothing() {
        let params = Params::parse("agent.lgo=debug agent.log=loud agent.log_vport=0 agent.server_addr=tcp://x");
        assert_eq!(params.warnings.len(), 4, "{:?}", params.warnings);
        assert!(params.warnings[0].contains("agent.lgo=debug"));
        assert_eq!(Params { warnings: Vec::new(), ..params }, Params::default());
    }

    #[test]
    fn words_of_others_are_left_alone() {
        assert_eq!(Params::parse("panic=-1 reagent.log=debug agent"), Params::default());
    }
}
