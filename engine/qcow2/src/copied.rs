//! The COPIED flags of the active tables: set exactly where the refcount is one.

use std::collections::HashSet;

use underlay_graph::IoError;

use crate::check::{CheckError, Checker, Fix, words};
use crate::entry::{COMPRESSED, COPIED, OFFSET};
use crate::refblocks::RefcountBlocks;

impl Checker<'_, '_> {
    /// Compares every flag with its refcount, and corrects it when that is asked for.
    pub(crate) async fn check_copied(&mut self, blocks: &mut RefcountBlocks) -> Result<(), CheckError> {
        // The flags are derived from the refcounts; they are worth repairing along with leaks only when those are
        // right.
        let repair = match self.fix {
            Fix::None => false,
            Fix::Leaks => self.outcome.corruptions == 0,
            Fix::All => true,
        };
        let (at, entries) = (self.header.l1_offset, self.header.l1_entries);
        if entries == 0 {
            return Ok(());
        }
        let mut l1 = self.read(at, u64::from(entries) * 8).await?;
        let mut changed = false;
        let mut sound = HashSet::new();
        for index in 0..l1.len() / 8 {
            let slot = &mut l1[index * 8..index * 8 + 8];
            let entry = words(slot).next().unwrap_or(0);
            let table = entry & OFFSET;
            if table == 0 {
                continue;
            }
            let Some(refcount) = blocks.get(table / self.header.cluster_size()) else { continue };
            if (refcount == 1) != (entry & COPIED != 0) {
                let what = format!(
                    "OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}"
                );
                self.flag(repair, &what);
                slot.copy_from_slice(&with_flag(entry, refcount == 1).to_be_bytes());
                changed = true;
            }
            // One that was in order, or is now, need not be looked at again.
            if table < self.file_len
                && !sound.contains(&table)
                && self.check_copied_l2(blocks, table, repair).await?
            {
                sound.insert(table);
            }
        }
        if changed && repair {
            self.write(at, &l1).await?;
            self.file.flush().await?;
        }
        Ok(())
    }

    /// Looks at one table; whether all its flags are right now.
    async fn check_copied_l2(
        &mut self,
        blocks: &RefcountBlocks,
        table: u64,
        repair: bool,
    ) -> Result<bool, IoError> {
        self.spend(self.header.l2_entries())?;
        let repair = repair && self.may_repair(table);
        let cluster = self.header.cluster_size();
        let stride = usize::try_from(self.header.l2_entry_size()).map_err(|_| IoError::EIO)?;
        let mut bytes = self.read(table, cluster).await?;
        let mut changed = false;
        for slot in bytes.chunks_exact_mut(stride) {
            let entry = words(slot).next().unwrap_or(0);
            let offset = entry & OFFSET;
            if entry & COMPRESSED != 0 || offset == 0 {
                continue;
            }
            let Some(refcount) = blocks.get(offset / cluster) else { continue };
            if (refcount == 1) != (entry & COPIED != 0) {
                self.flag(
                    repair,
                    &format!("OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}"),
                );
                slot[..8].copy_from_slice(&with_flag(entry, refcount == 1).to_be_bytes());
                changed = true;
            }
        }
        if changed && repair {
            self.write(table, &bytes).await?;
        }
        Ok(repair || !changed)
    }

    fn flag(&mut self, repair: bool, what: &str) {
        if repair {
            self.say(format!("Repairing {what}"));
            self.outcome.corruptions_fixed += 1;
        } else {
            self.wrong(format!("ERROR {what}"));
        }
    }
}

fn with_flag(entry: u64, set: bool) -> u64 {
    if set { entry | COPIED } else { entry & !COPIED }
}
