//! Keeping a copy in step with a disk that a guest writes to: what the active commit and the mirror have in common.
//!
//! The job goes through what is dirty, round by round. It is ready once it went through everything and little is left.
//! The guest may write faster than the job copies. The end closes the gates of all users and copies what is left then;
//! before that the job catches up until what is left is small, or gets no smaller by going on ([`Approach`]).

use std::time::Duration;

use async_trait::async_trait;
use underlay_sys::rt;

use crate::error::Stop;
use crate::job::Job;

/// So little may be left for the time when the guest has to wait, in bytes.
const LITTLE: u64 = 8 << 20;
/// How often the job goes through what is dirty before it takes what is left for the last step.
const ROUNDS: u32 = 6;
/// A round that leaves more than so many hundredths of what the one before left brings the job no nearer: the guest
/// writes as fast as it copies, and more rounds would only cost both of them time.
const HARDLY_LESS: u64 = 75;
/// How long it waits for the guest to write something, and before it tries again what failed.
pub(crate) const NAP: Duration = Duration::from_millis(50);
/// Once it is ready it waits so many times as long as its last round took: what the guest writes again and again need
/// not be copied as often, and the guest has the machine meanwhile.
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
    /// Makes what was copied durable, while the guest goes on. False: some of it was lost, and is to be copied once
    /// more.
    async fn flush(&self) -> Result<bool, Stop>;
}

/// How near the copy comes to the disk, round by round.
#[derive(Debug, Default)]
struct Approach {
    rounds: u32,
    /// Dirty bytes after the last round.
    before: Option<u64>,
}

impl Approach {
    /// After a round that left so much: whether this is as near as it gets.
    fn is_near(&mut self, left: u64) -> bool {
        self.rounds += 1;
        let before = self.before.replace(left);
        let no_nearer = before.is_some_and(|before| left / HARDLY_LESS >= before / 100);
        left <= LITTLE || no_nearer || self.rounds >= ROUNDS
    }
}

/// Follows until a client wants the end, and is in step then: whether the users shall be switched over.
pub(crate) async fn until_ended(job: &Job, copy: &impl Follow) -> Result<bool, Stop> {
    let (mut ready, mut approach) = (false, Approach::default());
    loop {
        let begun = rt::now();
        copy.round().await?;
        let rest = rt::now().saturating_sub(begun).saturating_mul(REST).clamp(NAP, LONGEST_REST);
        let near = approach.is_near(copy.left());
        if !ready && near && copy.flush().await? {
            job.becomes_ready().await?;
            (ready, approach) = (true, Approach::default());
        }
        match job.end_wanted() {
            Some(switch) if ready && near && copy.flush().await? => return Ok(switch),
            None if ready => {
                approach = Approach::default();
                job.doze(rest).await?;
            }
            _ => {}
        }
    }
}

/// Just before the last step: the guest may have written for long while the job was pending.
pub(crate) async fn catch_up(copy: &impl Follow) -> Result<(), Stop> {
    let mut approach = Approach::default();
    while copy.left() > LITTLE {
        copy.round().await?;
        if approach.is_near(copy.left()) {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// After how many rounds that leave so many MiB the copy is as near as it gets.
    fn rounds(left: &[u64]) -> usize {
        let mut approach = Approach::default();
        1 + left.iter().position(|left| approach.is_near(left * MIB)).expect("it gets near")
    }

    #[test]
    fn it_goes_on_as_long_as_that_helps() {
        assert_eq!(rounds(&[0]), 1);
        assert_eq!(rounds(&[1000, 100, 8]), 3);
        assert_eq!(rounds(&[1000, 700, 500, 400]), 4, "a fifth less is hardly less");
        assert_eq!(rounds(&[1000, 1000]), 2);
        assert_eq!(rounds(&[1000, 3000]), 2);
        assert_eq!(rounds(&[1000, 700, 500, 350, 250, 180, 120]), 6, "enough is enough");
    }
}
