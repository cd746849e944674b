//! What goes in and comes out.

use std::time::Duration;

use inlay_tests::cache::hex;
use inlay_tests::harness::{Runtime, Scene};
use inlay_tests::images;
use sha2::{Digest, Sha256};

crate::for_both_runtimes!(
    carries_100_mb_in_and_out,
    sees_the_end_of_its_input,
    loses_nothing_of_a_late_output,
    talks_on_a_terminal,
    talks_on_the_terminal_of_an_exec,
);

/// The issue's amount, in bytes.
const AMOUNT: usize = 100_000_000;

/// The anchor's: that the test is right shows with less.
const ANCHOR_AMOUNT: usize = AMOUNT / 10;

/// Emulated, Inlay carries it in a minute.
const AMOUNT_LIMIT: Duration = Duration::from_secs(400);

/// Bytes that compress badly and are the same each time (xorshift64), as text so that they can be compared as such.
fn noise(size: usize) -> Vec<u8> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+\n";
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes().iter().map(|byte| DIGITS[usize::from(byte % 64)]));
    }
    bytes.truncate(size);
    bytes
}

fn carries_100_mb_in_and_out(scene: &Scene) {
    let amount = if scene.runtime == Runtime::Runc { ANCHOR_AMOUNT } else { AMOUNT };
    let input = noise(amount);
    let digest = hex(&Sha256::digest(&input));
    let output = scene.run_fed(input, "cat", AMOUNT_LIMIT).ok();
    assert_eq!(output.stdout.len(), amount);
    assert_eq!(hex(&Sha256::digest(&output.stdout)), digest);
    println!("{amount} bytes in and out in {:.1} s", output.wall.as_secs_f64());
}

fn sees_the_end_of_its_input(scene: &Scene) {
    let output = scene.run_fed(b"three\nlines\nlong\n".to_vec(), "wc -l", AMOUNT_LIMIT).ok();
    assert_eq!(output.stdout.trim(), "3");
}

/// The process has ended before its output is read: nothing of it may be lost.
fn loses_nothing_of_a_late_output(scene: &Scene) {
    let output = scene.run(&["sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' x; echo; echo end"]).ok();
    assert_eq!(output.stdout.len(), 1_000_005);
    assert!(output.stdout.ends_with("x\nend\n"));
}

fn talks_on_a_terminal(scene: &Scene) {
    let id = scene.id("tty");
    let args = ["run", "--rm", "--tty", "--runtime", scene.runtime.name(), images::BUSYBOX, &id, "sh"];
    let dialogue = [("# ", "tty; stty size\n"), ("# ", "echo $((6 * 7))\n"), ("# ", "exit 4\n")];
    let (seen, code) = scene.converse(&args, (33, 111), &dialogue);
    assert!(seen.contains("/dev/pts/0"), "{seen}");
    assert!(seen.contains("33 111"), "{seen}");
    assert!(seen.contains("\n42\r"), "{seen:?}");
    assert_eq!(code, Some(4), "{seen}");
}

fn talks_on_the_terminal_of_an_exec(scene: &Scene) {
    let id = scene.start(&["sleep", "1000"]);
    let args = ["task", "exec", "--tty", "--exec-id", "terminal", &id, "sh"];
    let (seen, code) = scene.converse(&args, (24, 80), &[("# ", "tty\n"), ("# ", "exit 6\n")]);
    assert!(seen.contains("/dev/pts/"), "{seen}");
    assert_eq!(code, Some(6), "{seen}");
    scene.remove(&id);
}
