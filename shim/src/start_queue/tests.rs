use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);
/// Long enough for a turn to come that should not.
const MOMENT: Duration = Duration::from_millis(100);

fn node() -> (tempfile::TempDir, RunDir) {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = RunDir::at(dir.path().join("inlay"));
    fs::create_dir_all(run_dir.starts()).unwrap();
    (dir, run_dir)
}

fn entries(run_dir: &RunDir) -> usize {
    fs::read_dir(run_dir.starts()).unwrap().count()
}

fn most(number: u32) -> NonZeroU32 {
    NonZeroU32::new(number).unwrap()
}

/// A process that holds a file of the queue as a shim does, until it is killed.
fn holder(run_dir: &RunDir, name: &str) -> Child {
    let path = run_dir.starts().join(name);
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "exec 9<>\"$1\"; flock 9; echo; exec sleep 1000", "sh"]).arg(&path).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    child
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn who_comes_first_starts_first() {
    const WAITERS: usize = 10;
    let (_dir, run_dir) = node();
    let under_way = turn(&run_dir, most(1), PATIENCE).await.unwrap();
    let order = std::sync::Arc::new(Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for number in 0..WAITERS {
        let (run_dir, order) = (run_dir.clone(), std::sync::Arc::clone(&order));
        tasks.push(tokio::spawn(async move {
            let turn = turn(&run_dir, most(1), PATIENCE).await.unwrap();
            order.lock().unwrap().push(number);
            drop(turn);
        }));
        // One slot, and a ticket for each.
        tokio::task::yield_now().await;
    }
    assert_eq!(entries(&run_dir), 1 + WAITERS);
    drop(under_way);
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(*order.lock().unwrap(), (0..WAITERS).collect::<Vec<_>>());
    assert_eq!(entries(&run_dir), 0);
}

#[test]
fn so_many_start_at_a_time_and_none_is_lost() {
    let (_dir, run_dir) = node();
    let (inside, highest) = (AtomicU32::new(0), AtomicU32::new(0));
    thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                for _ in 0..20 {
                    let turn = runtime.block_on(turn(&run_dir, most(3), PATIENCE)).unwrap();
                    highest.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    thread::sleep(Duration::from_micros(200));
                    inside.fetch_sub(1, Ordering::SeqCst);
                    drop(turn);
                }
            });
        }
    });
    assert_eq!(highest.into_inner(), 3);
    assert_eq!(entries(&run_dir), 0);
}

#[tokio::test]
async fn a_process_that_dies_while_it_starts_or_waits_holds_nobody_up() {
    let (_dir, run_dir) = node();
    let starting = holder(&run_dir, "slot-0");
    let waiting = holder(&run_dir, "ticket-00000000000000000001");
    let mut next = std::pin::pin!(turn(&run_dir, most(1), PATIENCE));
    assert!(tokio::time::timeout(MOMENT, &mut next).await.is_err());
    // The one that waits is the first now, and there still is no slot.
    end(waiting);
    assert!(tokio::time::timeout(MOMENT, &mut next).await.is_err());
    end(starting);
    drop(next.await.unwrap());
    assert_eq!(entries(&run_dir), 0);
}

#[tokio::test]
async fn what_dead_processes_have_left_is_taken_over() {
    let (_dir, run_dir) = node();
    for name in ["slot-0", "ticket-00000000000000000001", "ticket-00000000000000000002"] {
        end(holder(&run_dir, name));
    }
    assert_eq!(entries(&run_dir), 3);
    drop(turn(&run_dir, most(1), MOMENT).await.unwrap());
    assert_eq!(entries(&run_dir), 0);
}

#[tokio::test]
async fn who_waits_too_long_is_told_why_and_leaves_the_queue() {
    let (_dir, run_dir) = node();
    let starting = holder(&run_dir, "slot-0");
    let waiting = holder(&run_dir, "ticket-00000000000000000001");
    let error = turn(&run_dir, most(1), MOMENT).await.unwrap_err().to_string();
    assert_eq!(
        error,
        "No turn came within 100 ms: at most 1 may start at a time (simultaneous_starts), and 1 waited before this one"
    );
    assert_eq!(entries(&run_dir), 2);
    // One that gives up lets the next one through.
    let patient = tokio::spawn({
        let run_dir = run_dir.clone();
        async move { turn(&run_dir, most(1), PATIENCE).await.map(drop) }
    });
    tokio::task::yield_now().await;
    end(starting);
    end(waiting);
    patient.await.unwrap().unwrap();
    assert_eq!(entries(&run_dir), 0);
}

#[tokio::test]
async fn a_queue_that_cannot_be_kept_is_an_error() {
    let run_dir = RunDir::at("/proc/version".into());
    let error = turn(&run_dir, most(1), MOMENT).await.unwrap_err();
    assert_eq!(error.to_string(), "Cannot make /proc/version/starts");
}
