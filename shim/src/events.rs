//! Events for containerd: in order, through a bounded queue, tried again until containerd takes them.

use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::protobuf::MessageFull;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::context;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::lock::lock;
use crate::run_dir::address_of;

/// Where containerd says that it takes events.
const ADDRESS_VARIABLE: &str = "TTRPC_ADDRESS";
/// A container makes some ten events in its life; this is enough for a pod while containerd restarts.
const QUEUE_LENGTH: usize = 1024;
/// Longest time that containerd may take for one event.
const FORWARD_DEADLINE: Duration = Duration::from_secs(5);
/// Pauses between attempts double from the first to the last; with the number of attempts they span a restart of
/// containerd: 0.1 + 0.2 + ... + 3.2 s, then 3.2 s each, a minute and a half together.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_millis(3200);
const ATTEMPTS: u32 = 30;

/// Where containerd takes events, as it tells what it starts.
pub fn address_from_environment() -> Option<String> {
    std::env::var(ADDRESS_VARIABLE).ok().filter(|address| !address.is_empty())
}

/// Takes events and sends them in the background.
pub struct Publisher {
    namespace: String,
    queue: Mutex<Option<mpsc::Sender<Envelope>>>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl Publisher {
    /// A publisher for containerd's namespace. Without an address events are logged and go nowhere.
    pub fn new(namespace: &str, address: Option<String>) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE_LENGTH);
        let worker = tokio::spawn(send_all(address, receiver));
        Self { namespace: namespace.to_owned(), queue: Mutex::new(Some(sender)), worker: Mutex::new(Some(worker)) }
    }

    /// Queues an event. It never waits: when the queue is full, the event is lost, and the log says so.
    pub fn publish<M: MessageFull>(&self, topic: &'static str, event: &M) {
        let Ok(value) = event.write_to_bytes() else { return };
        // The bare name, as containerd's Go registry has it, not a URL.
        let any = Any { type_url: M::descriptor().full_name().to_owned(), value, ..Any::default() };
        let envelope = Envelope {
            timestamp: Some(SystemTime::now().into()).into(),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: Some(any).into(),
            ..Envelope::default()
        };
        tracing::debug!(topic, "Event");
        let queue = lock(&self.queue).clone();
        if queue.is_none_or(|queue| queue.try_send(envelope).is_err()) {
            tracing::error!(topic, "An event is lost: the queue is full or closed");
        }
    }

    /// Takes no more events and waits, at most `patience`, until those queued are sent.
    pub async fn close(&self, patience: Duration) {
        *lock(&self.queue) = None;
        let Some(worker) = lock(&self.worker).take() else { return };
        if tokio::time::timeout(patience, worker).await.is_err() {
            tracing::warn!("Events are lost: containerd did not take them in time");
        }
    }
}

async fn send_all(address: Option<String>, mut queue: mpsc::Receiver<Envelope>) {
    let mut client = None;
    while let Some(envelope) = queue.recv().await {
        let Some(address) = &address else { continue };
        let topic = envelope.topic.clone();
        if let Err(error) = send(&mut client, address, envelope).await {
            tracing::error!(topic, %error, "An event is lost");
        }
    }
}

async fn send(client: &mut Option<EventsClient>, address: &str, envelope: Envelope) -> Result<(), ttrpc::Error> {
    let request = ForwardRequest { envelope: Some(envelope).into(), ..ForwardRequest::default() };
    let mut pause = FIRST_PAUSE;
    let mut attempt = 1;
    loop {
        match forward(client, address, &request).await {
            Err(error) if attempt < ATTEMPTS => {
                tracing::debug!(%error, attempt, "An event was not taken");
                *client = None;
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                attempt += 1;
            }
            done => return done,
        }
    }
}

async fn forward(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> Result<(), ttrpc::Error> {
    let connected = match client {
        Some(connected) => connected,
        None => {
            let address = if address.contains("://") { address.to_owned() } else { address_of(address.as_ref()) };
            client.insert(EventsClient::new(Client::connect(&address).await?))
        }
    };
    connected.forward(context::with_duration(FORWARD_DEADLINE), request).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::events::task::{TaskOOM, TaskStart};
    use containerd_shim_protos::protobuf::Message;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use containerd_shim_protos::topics;
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    struct Containerd(mpsc::UnboundedSender<Envelope>);

    #[async_trait::async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            self.0.send(request.envelope.unwrap()).unwrap();
            Ok(Empty::default())
        }
    }

    #[tokio::test]
    async fn events_arrive_in_order_even_if_containerd_comes_late() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ttrpc");
        let publisher = Publisher::new("ns", Some(path.to_str().unwrap().to_owned()));
        publisher.publish(topics::TASK_START_EVENT_TOPIC, &TaskStart { pid: 7, ..TaskStart::default() });
        publisher.publish(topics::TASK_OOM_EVENT_TOPIC, &TaskOOM::default());
        tokio::time::sleep(FIRST_PAUSE).await;
        let (sender, mut received) = mpsc::unbounded_channel();
        let mut server = Server::new()
            .bind(&address_of(&path))
            .unwrap()
            .register_service(create_events(Arc::new(Containerd(sender))));
        server.start().await.unwrap();
        publisher.close(Duration::from_secs(10)).await;
        let first = received.recv().await.unwrap();
        assert_eq!((first.topic.as_str(), first.namespace.as_str()), ("/tasks/start", "ns"));
        assert_eq!(first.event.type_url, "containerd.events.TaskStart");
        assert_eq!(TaskStart::parse_from_bytes(&first.event.value).unwrap().pid, 7);
        assert_eq!(received.recv().await.unwrap().topic, "/tasks/oom");
        publisher.publish(topics::TASK_OOM_EVENT_TOPIC, &TaskOOM::default());
        assert!(received.try_recv().is_err());
    }
}
