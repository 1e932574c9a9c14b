//! Keeping a copy in step with a disk that a guest writes to: what the active commit and the mirror have in common.
//!
//! The job goes through what is dirty, round by round. It is ready once it went through everything and little is left.
//! The guest may write faster than the job copies. The end closes the gates of all users and copies what is left then;
//! before that the job catches up until what is left is small, or until it has tried [`ROUNDS`] times.

use std::time::Duration;

use async_trait::async_trait;
use underlay_sys::rt;

use crate::error::Stop;
use crate::job::Job;

/// So little may be left for the time when the guest has to wait, in bytes.
const LITTLE: u64 = 8 << 20;
/// How often the job goes through what is dirty before it takes what is left for the last step.
const ROUNDS: u32 = 6;
/// How long it waits for the guest to write something, and before it tries again what failed.
pub(crate) const NAP: Duration = Duration::from_millis(50);
/// Once it is ready it waits so many times as long as its last round took: what the guest writes again and again need not
/// be copied as often, and the guest has the machine meanwhile.
const REST: u32 = 2;
/// But no longer than this, as all that was written meanwhile has to be copied at the end.
const LONGEST_REST: Duration = Duration::from_secs(1);

/// A copy that follows a disk.
#[async_trait]
pub(crate) trait Follow: Send + Sync {
    /// Goes once through what is dirty.
    async fn round(&self) -> Result<(), Stop>;
    /// Dirty bytes.
    fn left(&self) -> u64;
    /// Makes what was copied durable, while the guest goes on.
    async fn flush(&self) -> Result<(), Stop>;
}

/// Follows until a client wants the end, and is in step then: whether the users shall be switched over.
pub(crate) async fn until_ended(job: &Job, copy: &impl Follow) -> Result<bool, Stop> {
    let (mut ready, mut rounds) = (false, 0);
    loop {
        let begun = rt::now();
        copy.round().await?;
        let rest = rt::now().saturating_sub(begun).saturating_mul(REST).clamp(NAP, LONGEST_REST);
        rounds += 1;
        let near = copy.left() <= LITTLE || rounds >= ROUNDS;
        if !ready && near {
            copy.flush().await?;
            job.becomes_ready().await?;
            (ready, rounds) = (true, 0);
        }
        match job.end_wanted() {
            Some(switch) if ready && near => {
                copy.flush().await?;
                return Ok(switch);
            }
            None if ready => {
                rounds = 0;
                job.doze(rest).await?;
            }
            _ => {}
        }
    }
}

/// Just before the last step: the guest may have written for long while the job was pending.
pub(crate) async fn catch_up(copy: &impl Follow) -> Result<(), Stop> {
    for _ in 0..ROUNDS {
        if copy.left() <= LITTLE {
            break;
        }
        copy.round().await?;
    }
    Ok(())
}
