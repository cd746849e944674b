//! The demonstration: containers in microVMs, started by real containerd. Runs on a host with KVM;
//! `make demo` sees to that.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use inlay_tests::harness::trace::{STAGES, Start};
use inlay_tests::harness::{HOME, Pss, Runtime, Scene, configure, containerd, play};
use inlay_tests::images;

/// What is piped through a container, in bytes.
const AMOUNT: u64 = 100_000_000;
/// The template of the usual configuration file.
const TEMPLATE: &str = "default";

fn main() {
    play(Runtime::Inlay, |scene| {
        if let Err(error) = show(scene) {
            panic!("{error:#}");
        }
    });
    println!("\nNothing is left on the host: no process, mount, socket, cgroup or file.");
}

fn show(scene: &Scene) -> Result<()> {
    scene.import_debian();
    title("What Inlay says of this host");
    let check = containerd().environment(&mut Command::new(&scene.parts.shim)).arg("check").output();
    let check = check.context("Cannot run inlay")?;
    print!("$ inlay check\n{}", String::from_utf8_lossy(&check.stdout));
    title("The reference system's own command");
    print_run(scene, &["echo", "."]);
    title("The guest's kernel and memory");
    print_run(scene, &["uname", "-a"]);
    print_run(scene, &["free", "-m"]);

    title("An exit code passed through");
    let status = scene.run(&["sh", "-c", "exit 7"]).status;
    println!("$ ctr run … sh -c 'exit 7'; echo $?\n{}", status.code().context("ctr was killed")?);
    ensure!(status.code() == Some(7), "The exit code was lost");

    terminal(scene)?;
    exec_and_memory(scene)?;
    pipe(scene)?;

    title("An image of five layers, made from Debian's packages");
    let script = "import platform, sys; print('python', platform.python_version(), 'on', platform.release())";
    let output = scene.run_with(&[], images::DEBIAN, &["python3", "-c", script]).ok();
    print!("$ ctr run … {} python3 -c …\n{}", images::DEBIAN, output.stdout);

    template(scene)?;

    title("Sizes");
    for path in [&scene.parts.kernel, &scene.parts.initrd, &scene.parts.shim] {
        println!("{:<38} {:>9.2} MB", path.file_name().unwrap_or_default().to_string_lossy(), megabytes(path)?);
    }
    Ok(())
}

/// A dialogue on a terminal of 30 by 100.
fn terminal(scene: &Scene) -> Result<()> {
    title("A session on a terminal");
    let id = scene.id("demo-tty");
    let args = ["run", "--rm", "--tty", "--runtime", scene.runtime.name(), images::BUSYBOX, &id, "sh"];
    let (seen, code) = scene.converse(&args, (30, 100), &[("# ", "tty; stty size\n"), ("# ", "exit 4\n")]);
    println!("$ ctr run --tty … sh\n{}\n(exit code {})", seen.trim_end(), code.context("ctr was killed")?);
    ensure!(code == Some(4) && seen.contains("30 100"), "The terminal did not work");
    Ok(())
}

/// A program in a running container, and what that container's sandbox costs.
fn exec_and_memory(scene: &Scene) -> Result<()> {
    title("A program in a running container, and memory");
    let id = scene.start(&["sleep", "1000"]);
    print!("$ ctr task exec … ps\n{}", scene.exec(&id, &["ps"]).ok().stdout);
    let pss = Pss::of(scene.pid_of(&id))?;
    let free = scene.exec(&id, &["free", "-m"]).ok().stdout;
    let used = free.lines().find(|line| line.starts_with("Mem:")).and_then(|line| line.split_whitespace().nth(2));
    println!("PSS of the shim process without guest RAM: {} KiB", pss.own);
    println!("PSS of guest RAM:                          {} KiB", pss.guest);
    println!("used in the guest:                         {} MiB", used.unwrap_or("?"));
    scene.remove(&id);
    Ok(())
}

/// Bytes from a file through a container to another file.
fn pipe(scene: &Scene) -> Result<()> {
    title("100 MB through standard input and output");
    let (input, output) = (Path::new(HOME).join("demo-in"), Path::new(HOME).join("demo-out"));
    let mut source = std::io::Read::take(File::open("/dev/urandom")?, AMOUNT);
    std::io::copy(&mut source, &mut File::create(&input)?)?;
    let mut command = containerd().command();
    let id = scene.id("demo-pipe");
    command.args(["run", "--rm", "--runtime", scene.runtime.name(), images::BUSYBOX, &id, "cat"]);
    let status = command.stdin(File::open(&input)?).stdout(File::create(&output)?).stderr(Stdio::inherit()).status()?;
    ensure!(status.success(), "ctr ended with {status}");
    let sums = [checksum(&input)?, checksum(&output)?];
    println!("in  {}\nout {}", sums[0], sums[1]);
    fs::remove_file(input)?;
    fs::remove_file(output)?;
    ensure!(sums[0] == sums[1], "The bytes that came out are not those that went in");
    Ok(())
}

/// The demonstration's first start, one that boots while a template is made beside it, and one that is restored from that.
fn template(scene: &Scene) -> Result<()> {
    title("A template: the first start boots, the second is restored (in milliseconds)");
    configure(&format!("{}\n[factory]\nenable_template = true\n", scene.parts.configuration("")))?;
    let trace = Path::new(HOME).join("trace.jsonl");
    let alone = Start::read(&trace)?.into_iter().next().context("No start was traced")?;
    fs::remove_file(&trace)?;
    print_run(scene, &["echo", "."]);
    let mark = || {
        let shown = scene.inlay(&["template", "show", TEMPLATE]).stdout;
        let line = shown.lines().find(|line| line.starts_with("mark "))?;
        line.split_whitespace().nth(1).map(str::to_owned)
    };
    scene.wait_for("the template", || mark().is_some());
    let mark = mark().context("The template is gone again")?;
    print!("$ inlay template list\n{}", scene.inlay(&["template", "list"]).ok().stdout);

    // The nonce is in no file that the guest can see: its kernel's log has it if its memory is the template's.
    let log = scene.run_with(&["--privileged"], images::BUSYBOX, &["dmesg"]).ok().stdout;
    let seen = log.lines().find(|line| line.contains(&mark)).context("The second guest is not the template's")?;
    println!("$ ctr run --privileged … dmesg | grep {mark}\n{seen}\n");
    print_run(scene, &["echo", "."]);

    let starts = Start::read(&trace)?;
    let [making, .., restored] = starts.as_slice() else { bail!("Not all starts were traced") };
    ensure!(!making.restored && restored.restored, "The first start was to boot, and the last to be restored");
    let columns = [&alone, making, restored];
    println!("{:<38} {:>9} {:>15} {:>9}", "", "booted", "with the maker", "restored");
    for (index, stage) in STAGES.iter().enumerate() {
        print_times(stage, columns.map(|start| start.stages()[index]));
    }
    print_times("T0→T4 until the agent answers", columns.map(Start::to_agent));
    print_times("T0→T6 until the first output", columns.map(Start::to_output));
    scene.inlay(&["template", "remove", TEMPLATE]).ok();
    Ok(())
}

fn checksum(path: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(path).output().context("Cannot run sha256sum")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().next().map(str::to_owned).context("sha256sum printed nothing")
}

fn title(text: &str) {
    println!("\n=== {text}");
}

fn print_run(scene: &Scene, args: &[&str]) {
    println!("$ ctr run --rm --runtime {} {} demo {}", scene.runtime.name(), images::BUSYBOX, args.join(" "));
    print!("{}", scene.run(args).ok().stdout);
}

fn print_times(what: &str, times: [Duration; 3]) {
    let [alone, making, restored] = times.map(|time| time.as_secs_f64() * 1e3);
    println!("{what:<38} {alone:>9.1} {making:>15.1} {restored:>9.1}");
}

fn megabytes(path: &Path) -> Result<f64> {
    let size = fs::metadata(path).with_context(|| format!("Cannot read {}", path.display()))?.len();
    #[expect(clippy::cast_precision_loss, reason = "sizes of files, printed with two decimals")]
    Ok(size as f64 / 1e6)
}
