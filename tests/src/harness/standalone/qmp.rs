//! A client of a machine's QMP socket.

use std::cell::{Cell, RefCell};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// The longest that a reply may take: a snapshot writes all of guest memory before it answers.
const REPLY_LIMIT: Duration = Duration::from_secs(120);

/// A connection.
pub struct Qmp {
    stream: UnixStream,
    messages: Receiver<Value>,
    /// Events that nobody has asked for yet.
    events: RefCell<Vec<Value>>,
    number: Cell<u64>,
}

impl Qmp {
    /// Talks over `stream`, and waits for the greeting.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let (sender, messages) = mpsc::channel();
        let from = BufReader::new(stream.try_clone()?);
        thread::spawn(move || {
            for line in from.lines().map_while(io::Result::ok) {
                let message = serde_json::from_str(&line).unwrap_or(Value::String(line));
                let _ = sender.send(message);
            }
        });
        let qmp = Self { stream, messages, events: RefCell::default(), number: Cell::new(0) };
        qmp.wait_for(REPLY_LIMIT, |message| message.get("QMP").is_some()).context("There is no greeting")?;
        qmp.execute("qmp_capabilities", &json!({}))?.ok().context("The greeting is not accepted")?;
        Ok(qmp)
    }

    /// Executes a command: what it returns, or the error that it answers.
    pub fn execute(&self, command: &str, arguments: &Value) -> Result<Result<Value, Value>> {
        let number = self.number.get() + 1;
        self.number.set(number);
        let request = json!({"execute": command, "arguments": arguments, "id": number});
        (&self.stream).write_all(request.to_string().as_bytes()).context("QMP takes no more commands")?;
        let reply = self.wait_for(REPLY_LIMIT, |message| message["id"] == number);
        let mut reply = reply.with_context(|| format!("{command} has no reply"))?;
        Ok(match reply.get_mut("error") {
            Some(error) => Err(error.take()),
            None => Ok(reply["return"].take()),
        })
    }

    /// Waits for an event, which may have come before.
    pub fn event(&self, name: &str, limit: Duration) -> Result<Value> {
        let mut events = self.events.borrow_mut();
        if let Some(index) = events.iter().position(|event| event["event"] == name) {
            return Ok(events.remove(index));
        }
        drop(events);
        self.wait_for(limit, |message| message["event"] == name).with_context(|| format!("There is no event {name}"))
    }

    /// The next message that `wanted` says yes to; other events are kept for later.
    fn wait_for(&self, limit: Duration, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self.messages.recv_timeout(left).context("The machine says nothing")?;
            if wanted(&message) {
                return Ok(message);
            }
            self.events.borrow_mut().push(message);
        }
    }
}
