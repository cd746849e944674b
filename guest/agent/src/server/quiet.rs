//! Making the guest ready to be saved as a template.
//!
//! A saved guest is restored many times, so it must hold nothing that belongs to one sandbox or to one host: no
//! connection, no page cache. What is free is made zero, so that it takes no room in the template. The template's mark
//! goes to the kernel's log, which is in memory alone: whoever reads it in a guest knows which template it is from.

use std::io;

use agent_proto::{MAX_MARK, QUIET};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;

use crate::sandbox::Sandbox;
use crate::transport::{Connection, Listener};
use crate::{guest, log};

/// Serves one maker after the other, for as long as the agent runs.
pub async fn serve(listener: Listener, sandbox: Sandbox, log: log::Connection) {
    loop {
        let mut connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(error) => {
                tracing::warn!(%error, "No template can be made any more");
                return;
            }
        };
        let answer = match quieten(&mut connection, &sandbox, &log).await {
            Ok(()) => QUIET.to_owned(),
            Err(error) => error.to_string(),
        };
        // Nothing is logged: that would open the log's connection again.
        let _ = connection.write_all(format!("{answer}\n").as_bytes()).await;
        let _ = connection.shutdown().await;
    }
}

async fn quieten(connection: &mut Connection, sandbox: &Sandbox, log: &log::Connection) -> io::Result<()> {
    let mark = read_mark(connection).await?;
    if let Some(id) = sandbox.id() {
        return Err(io::Error::other(format!("The guest already is sandbox {id:?}")));
    }
    log.close().await?;
    // On a thread that ends at once, and not among those that the runtime keeps for a while.
    let (done, freed) = oneshot::channel();
    std::thread::Builder::new().name("quiet".into()).spawn(move || done.send(guest::clear_free_memory()))?;
    freed.await.map_err(io::Error::other)??;
    log::note_in_kernel(&format!("template {mark}"));
    Ok(())
}

/// The line that the maker sends. It ends up in the kernel's log, so it is letters and digits alone.
async fn read_mark(connection: &mut Connection) -> io::Result<String> {
    let mut mark = String::new();
    loop {
        match connection.read_u8().await? {
            b'\n' if !mark.is_empty() => return Ok(mark),
            byte if byte.is_ascii_alphanumeric() && mark.len() < MAX_MARK => mark.push(char::from(byte)),
            _ => return Err(io::Error::other("A template's mark is a line of up to 64 letters and digits")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(bytes: &[u8]) -> io::Result<String> {
        let (mut host, guest) = tokio::io::duplex(128);
        host.write_all(bytes).await.expect("Room");
        drop(host);
        read_mark(&mut (Box::new(guest) as Connection)).await
    }

    #[tokio::test]
    async fn a_mark_is_one_short_line() {
        assert_eq!(read(b"0aF9\nrest").await.expect("A mark"), "0aF9");
        let longest = "x".repeat(MAX_MARK);
        assert_eq!(read(format!("{longest}\n").as_bytes()).await.expect("A mark"), longest);
        for wrong in [&b"\n"[..], b"a b\n", b"abc", b"", format!("{longest}x\n").as_bytes()] {
            assert!(read(wrong).await.is_err(), "{wrong:?}");
        }
    }
}
