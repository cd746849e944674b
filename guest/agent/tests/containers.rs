//! The life of containers, through the agent's own door.

mod harness;

use std::sync::Arc;
use std::time::Duration;

use agent_proto::{agent, oci};
use harness::{Agent, can_run, deadline, process, wait_until};
use protobuf::MessageField;
use tokio::io::AsyncWriteExt;

/// The text and code of an error.
fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (String, ttrpc::Code) {
    match result.expect_err("Refused") {
        ttrpc::Error::RpcStatus(status) => (status.message.clone(), status.code()),
        other => panic!("Not a status: {other:?}"),
    }
}

#[tokio::test]
async fn an_exit_code_passes_through_and_nothing_is_left() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let mut request = agent.request("c1", "echo out; echo err >&2; hostname; pwd; echo $HOME; id -u; exit 7");
    let (code, out, err) = agent.output(&mut request).await;
    assert_eq!((code, out.as_str(), err.as_str()), (7, "out\ninside\n/\n/root\n0\n", "err\n"));
    agent.remove("c1").await;
    assert!(agent.others().is_empty(), "Processes are left: {:?}", agent.others());
    assert!(!agent.inside("/run/inlay/containers/c1").exists());
    assert!(!agent.inside("/run/inlay/state/c1").exists());
    assert!(!agent.inside("/sys/fs/cgroup/inlay").exists());
    // The id is free again.
    let (code, ..) = agent.output(&mut agent.request("c1", "exit 3")).await;
    assert_eq!(code, 3);
}

#[tokio::test]
async fn a_missing_entry_point_is_worded_as_users_know_it_and_leaves_nothing() {
    if !can_run() {
        return;
    }
    let mut agent = Agent::start().await;
    let cases = [
        ("nope", r#"unable to start container process: exec: "nope": executable file not found in $PATH"#),
        (
            "/bin/nope",
            r#"unable to start container process: exec: "/bin/nope": stat /bin/nope: no such file or directory"#,
        ),
        ("/etc/passwd", r#"unable to start container process: exec: "/etc/passwd": permission denied"#),
    ];
    for (entry, expected) in cases {
        let mut request = agent.request("c1", "");
        request.OCI.mut_or_insert_default().Process = MessageField::some(process(&[entry]));
        let (text, _) = refusal(agent.api.create_container(deadline(), &request).await);
        assert_eq!(text, expected);
    }
    wait_until("the attempts are gone", || agent.others().is_empty()).await;
    assert!(!agent.inside("/run/inlay/containers/c1").exists());
    assert!(!agent.inside("/sys/fs/cgroup/inlay").exists(), "{}", agent.logged().await);
}

#[tokio::test]
async fn what_cannot_be_honoured_is_refused_by_name() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let mut request = agent.request("c1", "true");
    let hook = oci::Hook { Path: "/usr/bin/prepare".into(), ..Default::default() };
    request.OCI.mut_or_insert_default().Hooks =
        MessageField::some(oci::Hooks { Prestart: vec![hook], ..Default::default() });
    let (text, code) = refusal(agent.api.create_container(deadline(), &request).await);
    assert!(text.contains("prestart hook \"/usr/bin/prepare\""), "{text}");
    assert_eq!(code, ttrpc::Code::UNIMPLEMENTED);

    let (text, code) = refusal(agent.api.create_container(deadline(), &agent.request("../x", "true")).await);
    assert!(text.contains("../x"), "{text}");
    assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);

    let mut request = agent.request("c1", "true");
    request.OCI.mut_or_insert_default().Root.mut_or_insert_default().Path = "/nowhere".into();
    let (text, _) = refusal(agent.api.create_container(deadline(), &request).await);
    assert!(text.contains("/nowhere"), "{text}");
    assert!(!agent.inside("/sys/fs/cgroup/inlay").exists(), "what is above the cgroup is left");

    let (text, code) = refusal(agent.api.get_metrics(deadline(), &agent::GetMetricsRequest::new()).await);
    assert_eq!((text.as_str(), code), ("GetMetrics is not implemented by this agent", ttrpc::Code::UNIMPLEMENTED));
}

#[tokio::test]
async fn limits_of_a_process_are_applied() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let mut request =
        agent.request("c1", "id; grep -E '^(NoNewPrivs|CapEff|CapBnd):' /proc/self/status; ulimit -n; pwd");
    let process = request.OCI.mut_or_insert_default().Process.mut_or_insert_default();
    process.User =
        MessageField::some(oci::User { UID: 1000, GID: 1001, AdditionalGids: vec![7, 8], ..Default::default() });
    process.Cwd = "/made/for/it".into();
    let limit = oci::POSIXRlimit { Type: "RLIMIT_NOFILE".into(), Hard: 99, Soft: 99, ..Default::default() };
    process.Rlimits = vec![limit];
    let (code, out, err) = agent.output(&mut request).await;
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(code, 0, "{err}");
    assert!(lines[0].starts_with("uid=1000(user) gid=1001 groups=7,8"), "{out}");
    // CAP_CHOWN 0, CAP_KILL 5, CAP_SETGID 6, CAP_SETUID 7; none is effective for a user that is not root.
    assert_eq!(
        &lines[1..],
        ["CapEff:\t0000000000000000", "CapBnd:\t00000000000000e1", "NoNewPrivs:\t1", "99", "/made/for/it"]
    );
}

#[tokio::test]
async fn masked_and_readonly_paths_and_a_readonly_root() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let script =
        "cat /proc/keys | grep -c .; echo 1 > /proc/sys/vm/swappiness; mkdir /new; mkdir /tmp/new && echo made";
    let mut request = agent.request("c1", script);
    let spec = request.OCI.mut_or_insert_default();
    spec.Root.mut_or_insert_default().Readonly = true;
    spec.Mounts.push(harness::mount("/tmp", "tmpfs", &["nosuid"]));
    let (_, out, err) = agent.output(&mut request).await;
    assert_eq!(out, "0\nmade\n", "{err}");
    assert!(err.contains("swappiness: Read-only file system"), "{err}");
    assert!(err.contains("'/new': Read-only file system"), "{err}");
}

fn deny_mkdir() -> oci::LinuxSeccomp {
    let rule = |names: &[&str], action: &str| oci::LinuxSyscall {
        Names: names.iter().map(|&name| name.to_owned()).collect(),
        Action: action.into(),
        ..Default::default()
    };
    oci::LinuxSeccomp {
        DefaultAction: "SCMP_ACT_ALLOW".into(),
        Architectures: vec!["SCMP_ARCH_X86_64".into()],
        Syscalls: vec![rule(&["mkdir", "mkdirat"], "SCMP_ACT_ERRNO")],
        ..Default::default()
    }
}

#[tokio::test]
async fn the_seccomp_profile_denies_and_also_to_further_processes() {
    if !can_run() {
        return;
    }
    for no_new_privileges in [true, false] {
        let agent = Agent::start().await;
        let mut request = agent.request("c1", "mkdir /tmp/x; grep Seccomp: /proc/self/status; sleep 100");
        let (stdout_port, stdout) = agent.connect();
        let (stderr_port, stderr) = agent.connect();
        (request.stdout_port, request.stderr_port) = (stdout_port, stderr_port);
        let spec = request.OCI.mut_or_insert_default();
        spec.Linux.mut_or_insert_default().Seccomp = MessageField::some(deny_mkdir());
        spec.Process.mut_or_insert_default().NoNewPrivileges = no_new_privileges;
        agent.run(&request).await;
        assert_eq!(harness::line(stdout).await, "Seccomp:\t2\n");
        assert_eq!(harness::line(stderr).await, "mkdir: can't create directory '/tmp/x': Operation not permitted\n");

        let mut exec =
            agent.exec_request("c1", "e1", "mkdir /tmp/y; grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status");
        exec.process.mut_or_insert_default().NoNewPrivileges = no_new_privileges;
        let (_, out, err) = agent.exec_output(&mut exec).await;
        assert!(err.contains("Operation not permitted"), "{err}");
        assert_eq!(out, format!("NoNewPrivs:\t{}\nSeccomp:\t2\n", u8::from(no_new_privileges)));
    }
}

#[tokio::test]
async fn further_processes_run_in_the_container_and_end_on_their_own() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let request = agent.request("c1", "exec sleep 100");
    agent.run(&request).await;
    let mut exec = agent.exec_request("c1", "e1", "hostname; cat /proc/1/comm; id -u; echo $HOME; exit 9");
    exec.process.mut_or_insert_default().User.mut_or_insert_default().UID = 1000;
    assert_eq!(agent.exec_output(&mut exec).await, (9, "inside\nsleep\n1000\n/home/user\n".into(), String::new()));
    // The id of an ended process can be used again; that of a running one cannot.
    assert_eq!(agent.exec_output(&mut agent.exec_request("c1", "e1", "exit 4")).await.0, 4);
    let sleeper = agent.exec_request("c1", "e2", "sleep 100");
    agent.api.exec_process(deadline(), &sleeper).await.expect("Started");
    let (_, code) = refusal(agent.api.exec_process(deadline(), &sleeper).await);
    assert_eq!(code, ttrpc::Code::ALREADY_EXISTS);
    agent.signal("c1", "e2", libc::SIGTERM).await.expect("Sent");
    assert_eq!(agent.wait("c1", "e2").await, 128 + libc::SIGTERM);

    let mut missing = agent.exec_request("c1", "e3", "");
    missing.process = MessageField::some(process(&["nope"]));
    let (text, _) = refusal(agent.api.exec_process(deadline(), &missing).await);
    assert_eq!(text, r#"unable to start container process: exec: "nope": executable file not found in $PATH"#);
    let mut lost = agent.exec_request("c1", "e4", "true");
    lost.process.mut_or_insert_default().Cwd = "/etc/passwd".into();
    let (text, _) = refusal(agent.api.exec_process(deadline(), &lost).await);
    assert!(text.contains(r#"chdir to cwd ("/etc/passwd") set in config.json failed: not a directory"#), "{text}");

    agent.signal("c1", "", libc::SIGKILL).await.expect("Sent");
    assert_eq!(agent.wait("c1", "").await, 128 + libc::SIGKILL);
    let (_, code) = refusal(agent.api.exec_process(deadline(), &agent.exec_request("c1", "e5", "true")).await);
    assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn killing_what_has_ended_is_success_and_unknown_things_are_not_found() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    agent.run(&agent.request("c1", "true")).await;
    assert_eq!(agent.wait("c1", "").await, 0);
    agent.signal("c1", "", libc::SIGKILL).await.expect("No error");
    agent.signal("c1", "", libc::SIGTERM).await.expect("No error");
    assert_eq!(agent.wait("c1", "").await, 0, "Waiting again answers the same");
    assert_eq!(refusal(agent.signal("c2", "", libc::SIGKILL).await).1, ttrpc::Code::NOT_FOUND);
    assert_eq!(refusal(agent.signal("c1", "e1", libc::SIGKILL).await).1, ttrpc::Code::NOT_FOUND);
    assert_eq!(refusal(agent.signal("c1", "", 65).await).1, ttrpc::Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn a_thousand_children_are_killed_with_their_container_and_reaped() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let (stdout_port, stdout) = agent.connect();
    let mut request =
        agent.request("c1", "i=0; while [ $i -lt 1000 ]; do sleep 1000 & i=$((i+1)); done; echo ready; sleep 1000");
    request.stdout_port = stdout_port;
    agent.run(&request).await;
    assert_eq!(harness::line(stdout).await, "ready\n");
    assert!(agent.others().len() > 1000);
    agent.signal("c1", "", libc::SIGKILL).await.expect("Sent");
    assert_eq!(agent.wait("c1", "").await, 128 + libc::SIGKILL);
    agent.remove("c1").await;
    wait_until("all are reaped", || agent.others().is_empty()).await;
}

#[tokio::test]
async fn in_a_shared_pid_namespace_the_end_of_a_container_is_the_end_of_its_processes() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let mut holder = agent.request("pause", "sleep 1000; true");
    holder.sandbox_pidns = true;
    agent.run(&holder).await;
    let mut second = agent.request("c2", "cat /proc/1/comm; sleep 1000 & exit 5");
    second.sandbox_pidns = true;
    // The background process keeps the output open, so reading to the end shows that it was killed.
    let (code, out, _) = agent.output(&mut second).await;
    assert_eq!((code, out.as_str()), (5, "sh\n"));
    wait_until("only the holder's two are left", || agent.others().len() == 2).await;
}

#[tokio::test]
async fn a_paused_container_stands_still_and_can_be_killed() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    agent.run(&agent.request("c1", "while true; do true; done")).await;
    let pause = agent::PauseContainerRequest { container_id: "c1".into(), ..Default::default() };
    agent.api.pause_container(deadline(), &pause).await.expect("Paused");
    let events = agent.inside("/sys/fs/cgroup/inlay/c1/cgroup.events");
    assert!(std::fs::read_to_string(&events).expect("There").contains("frozen 1"));
    let (text, code) = refusal(agent.api.pause_container(deadline(), &pause).await);
    assert_eq!(
        (text.as_str(), code),
        ("Container \"c1\" is paused, so it cannot be paused", ttrpc::Code::FAILED_PRECONDITION)
    );
    let (_, code) = refusal(agent.api.exec_process(deadline(), &agent.exec_request("c1", "e1", "true")).await);
    assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION);

    let resume = agent::ResumeContainerRequest { container_id: "c1".into(), ..Default::default() };
    agent.api.resume_container(deadline(), &resume).await.expect("Resumed");
    assert!(std::fs::read_to_string(&events).expect("There").contains("frozen 0"));
    agent.api.pause_container(deadline(), &pause).await.expect("Paused");
    agent.signal("c1", "", libc::SIGKILL).await.expect("Sent");
    assert_eq!(agent.wait("c1", "").await, 128 + libc::SIGKILL);
    agent.remove("c1").await;
}

#[tokio::test]
async fn a_created_container_can_be_removed_without_a_start() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    agent.api.create_container(deadline(), &agent.request("c1", "true")).await.expect("Created");
    let (_, code) = refusal(agent.api.create_container(deadline(), &agent.request("c1", "true")).await);
    assert_eq!(code, ttrpc::Code::ALREADY_EXISTS);
    agent.remove("c1").await;
    wait_until("it is gone", || agent.others().is_empty()).await;
    let start = agent::StartContainerRequest { container_id: "c1".into(), ..Default::default() };
    assert_eq!(refusal(agent.api.start_container(deadline(), &start).await).1, ttrpc::Code::NOT_FOUND);
}

#[tokio::test]
async fn slow_calls_do_not_hold_up_others() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    agent.run(&agent.request("c1", "exec sleep 1000")).await;
    let stats = agent::StatsContainerRequest { container_id: "c1".into(), ..Default::default() };
    let (done, _) = tokio::join!(
        tokio::time::timeout(Duration::from_secs(10), async {
            // The sandbox's end waits behind none of these.
            agent.signal("c1", "", libc::SIGKILL).await.expect("Sent");
            agent.wait("c1", "").await
        }),
        async {
            for _ in 0..50 {
                let answer = agent.api.stats_container(deadline(), &stats).await.expect("Figures");
                assert!(answer.cgroup_stats.is_some());
            }
        }
    );
    assert_eq!(done.expect("In time"), 128 + libc::SIGKILL);
}

#[tokio::test]
async fn many_lives_at_once_leave_nothing() {
    if !can_run() {
        return;
    }
    let agent = Arc::new(Agent::start().await);
    let descriptors = |agent: &Agent| std::fs::read_dir(format!("/proc/{}/fd", agent.pid())).expect("Readable").count();
    let life = |agent: Arc<Agent>, number: usize| async move {
        let id = format!("c{number}");
        let mut request = agent.request(&id, "read line; echo $line; exit 5");
        let (stdin_port, mut stdin) = agent.connect();
        request.stdin_port = stdin_port;
        let exec = async {
            // The container waits for its line, so it is there for the exec once it runs.
            let mut exec = agent.exec_request(&id, "e", "exit 6");
            loop {
                match agent.api.exec_process(deadline(), &exec).await {
                    Ok(_) => break,
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
                exec.exec_id.push('x');
            }
            assert_eq!(agent.wait(&id, &exec.exec_id).await, 6);
            stdin.write_all(b"line\n").await.expect("Open");
        };
        let ((code, out, _), ()) = tokio::join!(agent.output(&mut request), exec);
        assert_eq!((code, out.as_str()), (5, "line\n"));
        agent.remove(&id).await;
    };
    // Once, so that what the agent opens on first use is open.
    life(Arc::clone(&agent), 0).await;
    let before = descriptors(&agent);
    for round in 0..5 {
        let lives = (0..20).map(|number| tokio::spawn(life(Arc::clone(&agent), round * 20 + number)));
        for life in lives.collect::<Vec<_>>() {
            life.await.expect("It went as it should");
        }
    }
    wait_until("all descriptors are closed", || descriptors(&agent) <= before).await;
    assert!(agent.others().is_empty(), "Processes are left: {:?}", agent.others());
    assert!(!agent.inside("/sys/fs/cgroup/inlay").exists());
}
