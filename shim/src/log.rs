//! The shim's log: one line a record in logfmt, the form that containerd's own log has.
//!
//! containerd makes a FIFO named `log` in the bundle and copies what it reads there to its own log. The FIFO is opened
//! for reading and writing: then neither a containerd that has not opened it yet nor one that was restarted makes a
//! write fail, and what is written meanwhile waits in the pipe. It never blocks: a record that does not fit is dropped.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::SystemTime;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::reload;

use crate::ids::Id;

/// Name of containerd's FIFO in the bundle directory.
const FIFO: &str = "log";

static FIFO_OF_THE_BUNDLE: OnceLock<File> = OnceLock::new();
/// One process serves one sandbox, so its id is the process's.
static SANDBOX: OnceLock<Id> = OnceLock::new();
static LEVEL: OnceLock<Box<dyn Fn(LevelFilter) + Send + Sync>> = OnceLock::new();

/// Names the sandbox in every record from now on. The first call counts.
pub fn set_sandbox(id: &Id) {
    let _ = SANDBOX.set(id.clone());
}

/// Changes which records are written.
pub fn set_level(level: LevelFilter) {
    if let Some(change) = LEVEL.get() {
        change(level);
    }
}

/// Sends records to containerd's FIFO in `bundle`, or to stderr where there is none.
pub fn init(bundle: Option<&Path>, level: LevelFilter) {
    if let Some(bundle) = bundle {
        send_to(bundle);
    }
    let (filter, handle) = reload::Layer::new(level);
    let lines = tracing_subscriber::fmt::layer().event_format(Logfmt).with_writer(Output);
    if tracing::subscriber::set_global_default(tracing_subscriber::registry().with(filter).with(lines)).is_ok() {
        let _ = LEVEL.set(Box::new(move |level| {
            let _ = handle.reload(level);
        }));
    }
    std::panic::set_hook(Box::new(|panic| tracing::error!("The shim panicked: {panic}")));
}

/// Sends records to containerd's FIFO in `bundle` from now on, if there is one. The first call counts.
pub fn send_to(bundle: &Path) {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(bundle.join(FIFO));
    if let Ok(fifo) = opened {
        // Open as long as the process lives.
        seccomp::report_to(FIFO_OF_THE_BUNDLE.get_or_init(|| fifo).as_raw_fd());
    }
}

#[derive(Clone)]
struct Output;

impl Write for Output {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        match FIFO_OF_THE_BUNDLE.get() {
            // A record is at most PIPE_BUF long or may be cut; a full pipe drops it.
            Some(mut fifo) => fifo.write(record).or(Ok(record.len())),
            None => io::stderr().write(record),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Output {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

struct Logfmt;

impl<S, N> FormatEvent<S, N> for Logfmt
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        let mut fields = Fields::default();
        event.record(&mut fields);
        write!(
            writer,
            "time={} level={} msg={:?}",
            timestamp(SystemTime::now()),
            name(*metadata.level()),
            fields.message
        )?;
        writer.write_str(&fields.rest)?;
        if let Some(id) = SANDBOX.get() {
            write!(writer, " sandbox={id}")?;
        }
        writeln!(writer, " runtime=inlay target={}", metadata.target())
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else if text.contains([' ', '=', '"', '\n']) && !text.starts_with('"') {
            let _ = write!(self.rest, " {}={text:?}", field.name());
        } else {
            let _ = write!(self.rest, " {}={text}", field.name());
        }
    }
}

fn name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// RFC 3339 in UTC with nanoseconds.
fn timestamp(now: SystemTime) -> String {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "\"{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z\"",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    )
}

/// Days since 1970-01-01 to a date of the Gregorian calendar. Years are counted from March, so that a leap day is the
/// last of its year; 719,468 days lie between 0000-03-01 and the epoch, 146,097 in 400 years.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn timestamps_are_rfc_3339() {
        let at = |seconds| timestamp(SystemTime::UNIX_EPOCH + Duration::new(seconds, 5));
        assert_eq!(at(0), "\"1970-01-01T00:00:00.000000005Z\"");
        assert_eq!(at(951_782_400), "\"2000-02-29T00:00:00.000000005Z\"");
        assert_eq!(at(1_709_251_199), "\"2024-02-29T23:59:59.000000005Z\"");
        assert_eq!(at(1_735_689_600), "\"2025-01-01T00:00:00.000000005Z\"");
    }
}
