//! Connections for standard streams: the host connects first and names the connection by its port afterwards.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::Error;
use crate::transport::{Connection, Listener};

/// Connections that no request has named yet. Three a process, and requests follow at once; more than this are a host
/// that forgot about them, and the oldest goes.
const MAX_UNCLAIMED: usize = 192;
/// How long a request waits for a connection that it names. The host's `connect` returns when the guest's kernel has
/// accepted, which may be before the agent has.
const DEADLINE: Duration = Duration::from_secs(5);

#[derive(Default)]
struct Table {
    /// With the number of the arrival, so that the oldest can be found.
    arrived: HashMap<u32, (u64, Connection)>,
    awaited: HashMap<u32, oneshot::Sender<Connection>>,
    arrivals: u64,
}

/// Connections by the peer's port. Cheap to clone.
#[derive(Clone, Default)]
pub struct Connections(Arc<Mutex<Table>>);

impl Connections {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes connections for as long as the agent runs.
    pub async fn accept_all(self, listener: Listener) {
        loop {
            match listener.accept().await {
                Ok((connection, port)) => self.put(port, connection),
                Err(error) => {
                    tracing::warn!(%error, "A stdio connection could not be accepted");
                    // Without a pause an exhausted descriptor table would make this a busy loop.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn put(&self, port: u32, connection: Connection) {
        let mut table = self.table();
        let connection = match table.awaited.remove(&port) {
            // A waiter that gave up in the meantime hands the connection back.
            Some(waiter) => match waiter.send(connection) {
                Ok(()) => return,
                Err(connection) => connection,
            },
            None => connection,
        };
        if table.arrived.len() >= MAX_UNCLAIMED {
            let oldest = table.arrived.iter().min_by_key(|(_, (arrival, _))| *arrival).map(|(port, _)| *port);
            if let Some(port) = oldest {
                tracing::warn!(port, "A stdio connection that no request named is closed");
                table.arrived.remove(&port);
            }
        }
        table.arrivals += 1;
        let arrival = table.arrivals;
        table.arrived.insert(port, (arrival, connection));
    }

    /// The connection from `port`, waiting for it if need be.
    pub async fn take(&self, port: u32) -> Result<Connection, Error> {
        let arrival = {
            let mut table = self.table();
            if let Some((_, connection)) = table.arrived.remove(&port) {
                return Ok(connection);
            }
            let (sender, receiver) = oneshot::channel();
            table.awaited.insert(port, sender);
            receiver
        };
        match tokio::time::timeout(DEADLINE, arrival).await {
            Ok(Ok(connection)) => Ok(connection),
            // Timed out, or a later request named the same port.
            Ok(Err(_)) | Err(_) => Err(Error::NoConnection(port)),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn connection_and_request_meet_in_either_order() {
        let connections = Connections::default();
        let (mut early, host_side) = duplex(8);
        connections.put(5, Box::new(host_side));
        let mut taken = connections.take(5).await.expect("It is there");
        early.write_all(b"x").await.expect("Open");
        assert_eq!(taken.read_u8().await.expect("Open"), b'x');

        let waiting = tokio::spawn({
            let connections = connections.clone();
            async move { connections.take(6).await.is_ok() }
        });
        tokio::task::yield_now().await;
        connections.put(6, Box::new(duplex(8).0));
        assert!(waiting.await.expect("No panic"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_never_comes_is_an_error_that_names_its_port() {
        let error = Connections::default().take(9).await.err().expect("None arrives");
        assert_eq!(error.to_string(), "No stdio connection from port 9 arrived");
    }

    #[tokio::test]
    async fn unclaimed_connections_are_bounded_and_the_oldest_goes() {
        let connections = Connections::default();
        for port in 1..=200 {
            connections.put(port, Box::new(duplex(8).0));
        }
        assert_eq!(connections.table().arrived.len(), MAX_UNCLAIMED);
        assert!(connections.table().arrived.contains_key(&200));
        assert!(!connections.table().arrived.contains_key(&1));
    }
}
