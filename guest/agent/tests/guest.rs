//! Calls about the guest as a whole: sandbox, network, health.

mod harness;

use std::fs;
use std::time::{Duration, Instant};

use agent_proto::{agent, health, types};
use harness::{Agent, can_run, deadline, wait_until};
use protobuf::MessageField;

fn tmpfs(agent: &Agent) -> (agent::Storage, String) {
    let target = agent.directory().join("volume").display().to_string();
    let storage = agent::Storage {
        driver: "ephemeral".into(),
        source: "tmpfs".into(),
        fstype: "tmpfs".into(),
        options: vec!["size=1m".into(), "nosuid".into()],
        mount_point: target.clone(),
        ..Default::default()
    };
    (storage, target)
}

#[tokio::test]
async fn the_agent_is_healthy_and_says_who_it_is() {
    if !can_run() {
        return;
    }
    let mut agent = Agent::start().await;
    let check = agent.health.check(deadline(), &health::CheckRequest::new()).await.expect("Healthy");
    assert_eq!(check.status.enum_value(), Ok(health::health_check_response::ServingStatus::SERVING));
    let version = agent.health.version(deadline(), &health::CheckRequest::new()).await.expect("Answered");
    assert_eq!(version.agent_version, env!("CARGO_PKG_VERSION"));
    let details = agent.api.get_guest_details(deadline(), &agent::GuestDetailsRequest::new()).await.expect("Answered");
    assert!(details.agent_details.supports_seccomp && details.agent_details.init_daemon);
    assert!(details.agent_details.storage_handlers.contains(&"virtio-fs".to_owned()));
    let logged = agent.logged().await;
    let first: serde_json::Value = serde_json::from_str(logged.lines().next().expect("A line")).expect("JSON");
    assert_eq!(first["msg"], "The agent listens");
}

#[tokio::test]
async fn a_sandbox_has_a_name_and_storages_and_an_end() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let (storage, volume) = tmpfs(&agent);
    let request = agent::CreateSandboxRequest {
        sandbox_id: "s1".into(),
        hostname: "pod".into(),
        storages: vec![storage],
        ..Default::default()
    };
    agent.api.create_sandbox(deadline(), &request).await.expect("Created");
    assert!(agent.api.create_sandbox(deadline(), &request).await.is_err(), "One guest, one sandbox");
    let mounts = fs::read_to_string(format!("/proc/{}/mounts", agent.pid())).expect("Readable");
    assert!(mounts.contains(&format!("tmpfs {volume} tmpfs rw,nosuid")), "{mounts}");

    let mut request = agent.request("c1", "hostname");
    request.OCI.mut_or_insert_default().Hostname = String::new();
    assert_eq!(agent.output(&mut request).await.1, "pod\n", "The sandbox's name is its containers'");

    agent.run(&agent.request("c2", "sleep 1000")).await;
    // Calls that wait for something do not hold up the end.
    let (event, exit) = (agent.api.clone(), agent.api.clone());
    let event = tokio::spawn(async move { event.get_oom_event(deadline(), &agent::GetOOMEventRequest::new()).await });
    let wait = agent::WaitProcessRequest { container_id: "c2".into(), ..Default::default() };
    let exit = tokio::spawn(async move { exit.wait_process(deadline(), &wait).await });
    let begun = Instant::now();
    agent.api.destroy_sandbox(deadline(), &agent::DestroySandboxRequest::new()).await.expect("Answered");
    assert!(event.await.expect("No panic").is_err());
    assert_eq!(exit.await.expect("No panic").expect("Answered").status, 128 + libc::SIGKILL);
    wait_until("the agent has ended", || !agent.is_running()).await;
    assert!(begun.elapsed() < Duration::from_secs(4), "It took {:?}", begun.elapsed());
}

#[tokio::test]
async fn storages_of_a_container_come_and_go_with_it() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let (storage, volume) = tmpfs(&agent);
    let mut request = agent.request("c1", "grep ' /data ' /proc/mounts");
    request.storages = vec![storage];
    let bind = agent_proto::oci::Mount {
        destination: "/data".into(),
        source: volume.clone(),
        type_: "bind".into(),
        options: vec!["rbind".into(), "ro".into()],
        ..Default::default()
    };
    request.OCI.mut_or_insert_default().Mounts.push(bind);
    let (code, out, err) = agent.output(&mut request).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains(" ro,"), "{out}");
    agent.remove("c1").await;
    let mounts = fs::read_to_string(format!("/proc/{}/mounts", agent.pid())).expect("Readable");
    assert!(!mounts.contains(&volume), "{mounts}");

    let mut request = agent.request("c2", "true");
    request.storages =
        vec![agent::Storage { driver: "scsi".into(), mount_point: "/run/x".into(), ..Default::default() }];
    let error = agent.api.create_container(deadline(), &request).await.expect_err("Not served");
    assert!(error.to_string().contains("scsi"), "{error}");
}

#[tokio::test]
async fn a_root_file_system_can_be_an_overlay_of_storages() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let (layers, volume) = tmpfs(&agent);
    let merged = agent.directory().join("merged").display().to_string();
    let create = "io.katacontainers.volume.overlayfs.create_directory=";
    let overlay = agent::Storage {
        driver: "overlayfs".into(),
        driver_options: vec![format!("{create}{volume}/upper"), format!("{create}{volume}/work")],
        source: "overlay".into(),
        fstype: "overlay".into(),
        options: vec![
            format!("lowerdir={}", agent.rootfs().display()),
            format!("upperdir={volume}/upper"),
            format!("workdir={volume}/work"),
        ],
        mount_point: merged.clone(),
        ..Default::default()
    };
    let mut request = agent.request("c1", "echo x > /new && cat /new");
    request.storages = vec![layers, overlay];
    request.OCI.mut_or_insert_default().Root.mut_or_insert_default().Path = merged;
    assert_eq!(agent.output(&mut request).await, (0, "x\n".into(), String::new()));
    assert!(!agent.rootfs().join("new").exists(), "The lower layer is as it was");
    agent.remove("c1").await;
    let mounts = fs::read_to_string(format!("/proc/{}/mounts", agent.pid())).expect("Readable");
    assert!(!mounts.contains("overlay"), "{mounts}");
}

#[tokio::test]
async fn interfaces_can_swap_names() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let macs = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
    for (name, mac) in ["eth0", "eth1"].iter().zip(macs) {
        agent.in_network(&["ip", "tuntap", "add", "dev", name, "mode", "tap"]);
        agent.in_network(&["ip", "link", "set", name, "address", mac]);
    }
    for (name, mac) in ["eth1", "eth0"].iter().zip(macs) {
        let interface = types::Interface { name: (*name).into(), hwAddr: mac.into(), ..Default::default() };
        let request = agent::UpdateInterfaceRequest { interface: MessageField::some(interface), ..Default::default() };
        agent.api.update_interface(deadline(), &request).await.expect("Set");
    }
    let list = agent.api.list_interfaces(deadline(), &agent::ListInterfacesRequest::new()).await.expect("Listed");
    let mut names: Vec<_> = list.Interfaces.iter().map(|one| (one.hwAddr.as_str(), one.name.as_str())).collect();
    names.retain(|(mac, _)| macs.contains(mac));
    names.sort_unstable();
    assert_eq!(names, [(macs[0], "eth1"), (macs[1], "eth0")]);
}

#[tokio::test]
async fn the_network_is_what_the_host_says() {
    if !can_run() {
        return;
    }
    let agent = Agent::start().await;
    let mac = "02:00:00:00:00:07";
    agent.in_network(&["ip", "tuntap", "add", "dev", "tmp0", "mode", "tap"]);
    agent.in_network(&["ip", "link", "set", "tmp0", "address", mac]);
    let address = |address: &str| types::IPAddress { address: address.into(), mask: "24".into(), ..Default::default() };
    let interface = types::Interface {
        name: "eth0".into(),
        hwAddr: mac.to_uppercase(),
        mtu: 1400,
        IPAddresses: vec![address("10.1.2.3")],
        ..Default::default()
    };
    let request =
        agent::UpdateInterfaceRequest { interface: MessageField::some(interface.clone()), ..Default::default() };
    agent.api.update_interface(deadline(), &request).await.expect("Set");
    // Again with another address: the first goes.
    let moved = types::Interface { IPAddresses: vec![address("10.1.2.4")], ..interface };
    let request = agent::UpdateInterfaceRequest { interface: MessageField::some(moved), ..Default::default() };
    agent.api.update_interface(deadline(), &request).await.expect("Set");
    let list = agent.api.list_interfaces(deadline(), &agent::ListInterfacesRequest::new()).await.expect("Listed");
    let eth0 = list.Interfaces.iter().find(|interface| interface.name == "eth0").expect("There");
    assert_eq!((eth0.mtu, eth0.hwAddr.as_str()), (1400, mac));
    let v4: Vec<_> = eth0.IPAddresses.iter().filter(|ip| !ip.address.contains(':')).collect();
    assert_eq!(v4.iter().map(|ip| (ip.address.as_str(), ip.mask.as_str())).collect::<Vec<_>>(), [("10.1.2.4", "24")]);

    // The gateway's route comes after the default in the list, and is set before it.
    let default = types::Route { gateway: "10.9.9.1".into(), device: "eth0".into(), ..Default::default() };
    let link = types::Route { dest: "10.9.9.0/24".into(), device: "eth0".into(), scope: 253, ..Default::default() };
    let routes = |list: Vec<types::Route>| agent::UpdateRoutesRequest {
        routes: MessageField::some(agent::Routes { Routes: list, ..Default::default() }),
        ..Default::default()
    };
    agent.api.update_routes(deadline(), &routes(vec![default.clone(), link.clone()])).await.expect("Set");
    let list = agent.api.update_routes(deadline(), &routes(vec![default, link])).await.expect("Set again").Routes;
    assert!(list.iter().any(|route| route.dest.is_empty() && route.gateway == "10.9.9.1"), "{list:?}");
    assert!(list.iter().any(|route| route.dest == "10.9.9.0/24" && route.device == "eth0"), "{list:?}");
    assert!(list.iter().any(|route| route.dest == "10.1.2.0/24"), "The kernel's own stays: {list:?}");

    let neighbor = types::ARPNeighbor {
        toIPAddress: MessageField::some(address("10.1.2.9")),
        device: "eth0".into(),
        lladdr: "02:00:00:00:00:09".into(),
        ..Default::default()
    };
    let neighbors = agent::ARPNeighbors { ARPNeighbors: vec![neighbor], ..Default::default() };
    let request = agent::AddARPNeighborsRequest { neighbors: MessageField::some(neighbors), ..Default::default() };
    agent.api.add_arp_neighbors(deadline(), &request).await.expect("Set");
    let table = agent.in_network(&["ip", "neigh", "show", "dev", "eth0"]);
    assert!(table.contains("10.1.2.9 lladdr 02:00:00:00:00:09 PERMANENT"), "{table}");

    let unknown = types::Interface { hwAddr: "02:00:00:00:00:99".into(), ..Default::default() };
    let request = agent::UpdateInterfaceRequest { interface: MessageField::some(unknown), ..Default::default() };
    let error = agent.api.update_interface(deadline(), &request).await.expect_err("Not there");
    assert!(error.to_string().contains("No interface has the address 02:00:00:00:00:99"), "{error}");
}
