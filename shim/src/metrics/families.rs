//! The metrics. `docs/metrics.md` has the same table, which a test compares with this one.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::{Figures, LazyFigures, Stage};
use crate::sandbox::trace::NANOSECONDS;

/// The label that names the sandbox.
const SANDBOX: &str = "sandbox";
/// What the text is: OpenMetrics 1.0.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What all sandboxes of a node are, beside their own figures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Node {
    /// Sandboxes that there are.
    pub sandboxes: u64,
    /// Those that are being started: they tell nothing yet.
    pub starting: u64,
    /// Those that do not answer.
    pub unreachable: u64,
}

/// A number of one metric, and what tells it from the others of the same sandbox.
struct Sample {
    label: Option<(&'static str, &'static str)>,
    value: Value,
}

#[derive(Clone, Copy)]
enum Value {
    Whole(u64),
    Real(f64),
}

/// One metric.
struct Family<T: 'static> {
    /// Without its unit and `_total`.
    name: &'static str,
    unit: &'static str,
    kind: MetricType,
    help: &'static str,
    samples: fn(&T) -> Vec<Sample>,
}

/// Of a node.
const NODE: &[Family<Node>] = &[
    Family {
        name: "inlay_sandboxes",
        unit: "",
        kind: MetricType::Gauge,
        help: "Sandboxes of the node, whatever their state",
        samples: |node| one(node.sandboxes),
    },
    Family {
        name: "inlay_sandboxes_starting",
        unit: "",
        kind: MetricType::Gauge,
        help: "Sandboxes that are being started and tell nothing yet",
        samples: |node| one(node.starting),
    },
    Family {
        name: "inlay_sandboxes_unreachable",
        unit: "",
        kind: MetricType::Gauge,
        help: "Sandboxes whose shim is gone, or did not answer in time",
        samples: |node| one(node.unreachable),
    },
];

/// Of a sandbox.
const SANDBOXES: &[Family<Figures>] = &[
    Family {
        name: "inlay_sandbox_state",
        unit: "",
        kind: MetricType::Gauge,
        help: "1 for the state in which the sandbox is",
        samples: |figures| {
            let states = [("running", Stage::Running), ("stopping", Stage::Stopping), ("stopped", Stage::Stopped)];
            states.iter().map(|(name, state)| labelled("state", name, u64::from(figures.state == *state))).collect()
        },
    },
    Family {
        name: "inlay_sandbox_containers",
        unit: "",
        kind: MetricType::Gauge,
        help: "Containers of the sandbox in each state",
        samples: |Figures { containers, .. }| {
            let states = [
                ("created", containers.created),
                ("running", containers.running),
                ("paused", containers.paused),
                ("stopped", containers.stopped),
            ];
            states.iter().map(|(name, count)| labelled("state", name, *count)).collect()
        },
    },
    Family {
        name: "inlay_start_restored",
        unit: "",
        kind: MetricType::Gauge,
        help: "1 if the guest was restored from a template, 0 if it has booted",
        samples: |figures| one(u64::from(figures.start.restored)),
    },
    Family {
        name: "inlay_start_moment",
        unit: "seconds",
        kind: MetricType::Gauge,
        help: "When the start had its turn and reached T1 to T6, counted from T0, the create request; without what it has not reached",
        samples: |figures| {
            let times = &figures.start;
            let moments = [
                ("turn", times.turn),
                ("T1", times.t1),
                ("T2", times.t2),
                ("T3", times.t3),
                ("T4", times.t4),
                ("T5", times.t5),
                ("T6", times.t6),
            ];
            let since = |at: u64| Value::Real(seconds(at.saturating_sub(times.t0)));
            let reached = moments.iter().filter_map(|(name, at)| at.map(|at| (name, since(at))));
            reached.map(|(name, value)| Sample { label: Some(("moment", name)), value }).collect()
        },
    },
    Family {
        name: "inlay_guest_memory",
        unit: "bytes",
        kind: MetricType::Gauge,
        help: "Memory that the guest has",
        samples: |figures| one(figures.guest_memory),
    },
    Family {
        name: "inlay_process_pss",
        unit: "bytes",
        kind: MetricType::Gauge,
        help: "What the sandbox's process takes of the host's memory, guest included: private to it, and its share of what it has in \
               common with others (proportional set size)",
        samples: |figures| {
            let parts =
                figures.process.iter().flat_map(|memory| [("private", memory.private), ("shared", memory.shared)]);
            parts.map(|(name, bytes)| labelled("part", name, bytes)).collect()
        },
    },
    Family {
        name: "inlay_memory_copied_ahead",
        unit: "bytes",
        kind: MetricType::Gauge,
        help: "Memory of a mapped template that was copied before the guest wrote to it",
        samples: |figures| one(figures.copied_ahead),
    },
    Family {
        name: "inlay_memory_lazy",
        unit: "",
        kind: MetricType::Gauge,
        help: "1 if the guest's memory comes from its template page by page; only then has the sandbox the metrics below",
        samples: |figures| one(u64::from(figures.lazy.is_some())),
    },
    counter("inlay_memory_faults", "", "Page faults that were served", |figures| {
        lazy(figures, |lazy| Value::Whole(lazy.faults))
    }),
    counter(
        "inlay_memory_fault",
        "seconds",
        "Time from reading a fault to having served it, all together",
        |figures| lazy(figures, |lazy| Value::Real(seconds(lazy.fault_nanoseconds))),
    ),
    counter("inlay_memory_copied", "bytes", "Memory that was copied from the template, asked for or not", |figures| {
        lazy(figures, |lazy| Value::Whole(lazy.copied_bytes))
    }),
    counter(
        "inlay_memory_prefetched",
        "bytes",
        "Memory of the working set that was brought before it was asked for",
        |figures| lazy(figures, |lazy| Value::Whole(lazy.prefetched_bytes)),
    ),
    counter("inlay_memory_zero_pages", "", "Pages of zeros that were given", |figures| {
        lazy(figures, |lazy| Value::Whole(lazy.zero_pages))
    }),
    counter("inlay_memory_returned", "bytes", "Memory that the guest has given back", |figures| {
        lazy(figures, |lazy| Value::Whole(lazy.returned_bytes))
    }),
    counter(
        "inlay_memory_working_set_late",
        "",
        "Faults for pages of the working set that were asked for before they were brought",
        |figures| lazy(figures, |lazy| Value::Whole(lazy.working_set_late)),
    ),
    counter("inlay_memory_working_set_misses", "", "Faults for pages that the working set does not have", |figures| {
        lazy(figures, |lazy| Value::Whole(lazy.working_set_misses))
    }),
    Family {
        name: "inlay_memory_working_set_hit",
        unit: "ratio",
        kind: MetricType::Gauge,
        help: "The part of the pages needed so far that the working set had; what was brought ahead counts as needed",
        samples: |figures| lazy(figures, |lazy| Value::Real(lazy.hit_ratio)),
    },
];

const fn counter(
    name: &'static str,
    unit: &'static str,
    help: &'static str,
    samples: fn(&Figures) -> Vec<Sample>,
) -> Family<Figures> {
    Family { name, unit, kind: MetricType::Counter, help, samples }
}

fn one(value: u64) -> Vec<Sample> {
    vec![Sample { label: None, value: Value::Whole(value) }]
}

fn labelled(label: &'static str, name: &'static str, value: u64) -> Sample {
    Sample { label: Some((label, name)), value: Value::Whole(value) }
}

fn lazy(figures: &Figures, value: fn(&LazyFigures) -> Value) -> Vec<Sample> {
    figures.lazy.iter().map(|figures| Sample { label: None, value: value(figures) }).collect()
}

#[allow(clippy::cast_precision_loss, reason = "53 bits of nanoseconds are 104 days")]
fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / NANOSECONDS
}

/// The text for Prometheus: each metric once, with the figures of all `sandboxes` in their order, and those of the node where
/// they are known.
pub fn text(node: Option<Node>, sandboxes: Vec<(String, Figures)>) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Exposition { node, sandboxes }));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = text::encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Exposition {
    node: Option<Node>,
    sandboxes: Vec<(String, Figures)>,
}

impl Collector for Exposition {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let nodes: Vec<_> = self.node.iter().map(|node| (None, node)).collect();
        let sandboxes: Vec<_> = self.sandboxes.iter().map(|(name, figures)| (Some(name.as_str()), figures)).collect();
        if self.node.is_some() {
            encode(&mut encoder, NODE, &nodes)?;
        }
        encode(&mut encoder, SANDBOXES, &sandboxes)
    }
}

fn encode<T>(encoder: &mut DescriptorEncoder<'_>, families: &[Family<T>], of: &[(Option<&str>, &T)]) -> fmt::Result {
    for family in families {
        let unit = match family.unit {
            "" => None,
            unit => Some(Unit::Other(unit.to_owned())),
        };
        let mut metric = encoder.encode_descriptor(family.name, family.help, unit.as_ref(), family.kind)?;
        for (sandbox, figures) in of {
            for Sample { label, value } in (family.samples)(figures) {
                let labels: Vec<(&str, &str)> = sandbox.map(|name| (SANDBOX, name)).into_iter().chain(label).collect();
                if labels.is_empty() {
                    write(&mut metric, family.kind, value)?;
                } else {
                    write(&mut metric.encode_family(&labels)?, family.kind, value)?;
                }
            }
        }
    }
    Ok(())
}

fn write(metric: &mut MetricEncoder<'_>, kind: MetricType, value: Value) -> fmt::Result {
    match (kind, value) {
        (MetricType::Counter, Value::Whole(value)) => metric.encode_counter::<NoLabelSet, _, u64>(&value, None),
        (MetricType::Counter, Value::Real(value)) => metric.encode_counter::<NoLabelSet, _, u64>(&value, None),
        (_, Value::Whole(value)) => metric.encode_gauge(&value),
        (_, Value::Real(value)) => metric.encode_gauge(&value),
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;
    use crate::metrics::process::ProcessMemory;
    use crate::sandbox::trace::StartTimes;

    fn figures() -> Figures {
        Figures {
            start: StartTimes { restored: true, t0: 1_000_000_000, t4: Some(1_250_000_000), ..StartTimes::default() },
            guest_memory: 256 << 20,
            process: Some(ProcessMemory { private: 4096, shared: 8192 }),
            copied_ahead: 12_288,
            lazy: Some(LazyFigures {
                faults: 3,
                fault_nanoseconds: 500_000_000,
                hit_ratio: 0.75,
                ..LazyFigures::default()
            }),
            ..Figures::default()
        }
    }

    fn names_with_unit() -> Vec<(String, &'static str, &'static str)> {
        fn of<T>(families: &'static [Family<T>]) -> impl Iterator<Item = (String, &'static str, &'static str)> {
            families.iter().map(|family| {
                let (kind, total) = match family.kind {
                    MetricType::Counter => ("counter", "_total"),
                    _ => ("gauge", ""),
                };
                let unit = if family.unit.is_empty() { String::new() } else { format!("_{}", family.unit) };
                (format!("{}{unit}{total}", family.name), kind, family.help)
            })
        }
        of(NODE).chain(of(SANDBOXES)).collect()
    }

    #[test]
    fn each_metric_is_there_once_with_all_sandboxes() {
        let node = Node { sandboxes: 3, starting: 0, unreachable: 1 };
        let text = text(Some(node), vec![("a".into(), figures()), ("b".into(), Figures::default())]);
        for line in [
            "inlay_sandboxes_unreachable 1",
            "inlay_sandbox_state{sandbox=\"a\",state=\"running\"} 1",
            "inlay_sandbox_containers{sandbox=\"b\",state=\"paused\"} 0",
            "inlay_start_moment_seconds{sandbox=\"a\",moment=\"T4\"} 0.25",
            "inlay_process_pss_bytes{sandbox=\"a\",part=\"shared\"} 8192",
            "inlay_memory_faults_total{sandbox=\"a\"} 3",
            "inlay_memory_fault_seconds_total{sandbox=\"a\"} 0.5",
            "inlay_memory_working_set_hit_ratio{sandbox=\"a\"} 0.75",
            "inlay_memory_copied_ahead_bytes{sandbox=\"a\"} 12288",
            "inlay_memory_lazy{sandbox=\"b\"} 0",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(
            !text.contains("inlay_memory_faults_total{sandbox=\"b\"}") && !text.contains("moment=\"T3\""),
            "{text}"
        );
        for (name, ..) in names_with_unit() {
            let family = name.trim_end_matches("_total");
            let heads = text.lines().filter(|line| line.starts_with(&format!("# TYPE {family} "))).count();
            assert_eq!(heads, 1, "{family} in\n{text}");
            let is_sample =
                |line: &str| line.starts_with(&format!("{name} ")) || line.starts_with(&format!("{name}{{"));
            assert!(text.lines().any(is_sample), "{name} in\n{text}");
        }
    }

    #[test]
    fn a_single_sandbox_says_nothing_of_the_node() {
        assert!(!super::text(None, vec![("a".into(), figures())]).contains("inlay_sandboxes"));
    }

    /// The documentation's table is this one. Where it is not, the message has the right one.
    #[test]
    fn the_documentation_has_every_metric() {
        let mut table = String::from("| metric | type | what |\n| --- | --- | --- |\n");
        for (name, kind, help) in names_with_unit() {
            writeln!(table, "| `{name}` | {kind} | {help} |").unwrap();
        }
        let document = include_str!("../../../docs/metrics.md");
        assert!(document.contains(&table), "docs/metrics.md must have this table:\n{table}");
    }
}
