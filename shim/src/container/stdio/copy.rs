//! Output into a file. A file cannot be waited for, which the muxer must do, so a pipe stands between.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use super::StdioError;

/// Starts to append to `path` what is written to the returned pipe. The task ends with the last writer.
pub fn to_file(path: &Path) -> Result<(JoinHandle<()>, OwnedFd), StdioError> {
    let open = |source| StdioError::Open { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(open)?;
    }
    let file = std::fs::OpenOptions::new().create(true).append(true).mode(0o640).open(path).map_err(open)?;
    let (write, read) = pipe::pipe().map_err(StdioError::Pipe)?;
    let write = write.into_nonblocking_fd().map_err(StdioError::Pipe)?;
    let path = path.to_owned();
    let task = tokio::spawn(async move {
        let (mut read, mut file) = (read, tokio::fs::File::from_std(file));
        let copied = tokio::io::copy(&mut read, &mut file).await;
        if let Err(error) = copied.and(file.flush().await) {
            tracing::warn!(file = %path.display(), %error, "Output was lost");
        }
    });
    Ok((task, write))
}
