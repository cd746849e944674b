//! What makes a guest that was restored from a template a guest of its own.
//!
//! | what | by whom |
//! | --- | --- |
//! | random numbers | [`reseed`], before anything else is asked of the agent |
//! | wall clock | [`set_clock`], before the sandbox takes a container |
//! | host name | the agent's `CreateSandbox`, as in a guest that has booted |
//! | connections | the vsock device, which tells the guest that all of the template's are gone |
//! | boot id | the kernel, when it is first read: nothing reads it in a template |

use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant, SystemTime};

use super::agent::{Agent, AgentError};

/// Bytes of entropy: the kernel's pool has 256 bits, and the same again to spare.
const ENTROPY: usize = 64;
/// How far the guest's wall clock may be off.
const CLOCK_ACCURACY: Duration = Duration::from_millis(10);
/// How often setting it is tried: each attempt tells better how long a call takes.
const CLOCK_ATTEMPTS: u32 = 6;

/// Mixes fresh entropy into the guest's pool and has its generator take it up. What the guest draws from then on,
/// for its kernel or for a program, no other sandbox has.
pub async fn reseed(agent: &Agent) -> Result<(), AgentError> {
    let mut entropy = vec![0; ENTROPY];
    let read = File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut entropy));
    read.map_err(AgentError::Entropy)?;
    agent.reseed_random_dev(entropy).await
}

/// Sets the guest's wall clock to the host's.
///
/// The guest sets its clock at some time between the request and the answer. The time that is sent lies ahead by half of
/// what the quickest call took, so the error is at most the larger part of the whole. A call that took too long is
/// repeated.
pub async fn set_clock(agent: &Agent) -> Result<(), AgentError> {
    let mut quickest = Duration::MAX;
    let mut ahead = Duration::ZERO;
    let mut error = Duration::MAX;
    for _ in 0..CLOCK_ATTEMPTS {
        let (wall, asked) = (SystemTime::now(), Instant::now());
        agent.set_guest_date_time(wall.checked_add(ahead).unwrap_or(wall)).await?;
        let taken = asked.elapsed();
        error = largest_error(ahead, taken);
        if error <= CLOCK_ACCURACY {
            return Ok(());
        }
        quickest = quickest.min(taken);
        ahead = quickest.checked_div(2).unwrap_or_default();
    }
    tracing::warn!("The guest's wall clock may be off by {error:?}, as its agent is slow");
    Ok(())
}

/// How far off a clock is at most that was set `ahead` of the request, by a call that took `taken`.
fn largest_error(ahead: Duration, taken: Duration) -> Duration {
    ahead.max(taken.saturating_sub(ahead))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_the_larger_part_of_the_call() {
        let error =
            |ahead, taken| largest_error(Duration::from_millis(ahead), Duration::from_millis(taken)).as_millis();
        assert_eq!((error(0, 7), error(5, 10), error(5, 30), error(5, 2)), (7, 5, 25, 5));
    }
}
