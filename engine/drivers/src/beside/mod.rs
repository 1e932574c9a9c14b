//! The persistent bitmaps of a raw disk, in a file beside it: a qcow2 image without anything but them, which keeps them
//! as it keeps its own ([`underlay_qcow2`]), crash and all.
//!
//! What is missing then is that the bitmaps and the disk are one file: somebody may write to the disk who does not know
//! of the other. So the file beside is tied to the disk ([`tie`]), and when it is opened and the tie does not hold, all
//! its bitmaps are inconsistent. While it is open:
//!
//! * When somebody begins to write, the image marks the bitmaps as in use and takes notes; when that is durable the
//!   stamp says that he has begun.
//! * When he has ended, how the disk's file is then goes into the stamp; when that is durable the image calls its
//!   bitmaps valid. A crash in between leaves bitmaps with notes, which are good as well, and tied.
//! * File systems count time in steps of some milliseconds. So that whatever is written later shows in the times of the
//!   disk, the stamp is written anew until the file beside has a later time than the disk.
//!
//! The file is made with the first bitmap and goes with the last.

pub mod home;
#[cfg(test)]
mod tests;
pub mod tie;

use std::fmt::Display;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use underlay_graph::bitmaps::{BitmapStore, PlanBitmap};
use underlay_graph::{
    Access, ByteRange, Cx, GraphError, IoError, Node, Perms, Preallocation, Result, Role, View, WriteFlags,
};
use underlay_qcow2::{CreateOptions, Header, OpenOptions, Qcow2, check_new_bitmap, create, tie_place};
use underlay_sys::witness::PAGE;
use underlay_sys::{Iov, rt};

use home::Home;
use tie::{Mark, Note, Stamp};

/// For so long writes are announced, in nanoseconds. After half of it they are announced again.
const ANNOUNCED: i64 = 10_000_000_000;
/// Clocks that are as far apart as this, in nanoseconds, are not the same.
const OTHER_CLOCK: i64 = 1_000_000_000;
/// How often is looked for the time to go on, and how many times: file systems that count in seconds are among those
/// that count two.
const TICK: Duration = Duration::from_millis(4);
const TICKS: usize = 750;

/// A disk, and what is beside it.
#[derive(Debug)]
pub struct Beside {
    home: Arc<dyn Home>,
    side: RwLock<Option<Arc<Side>>>,
    /// Why there can be no bitmaps: something else is in their place.
    obstacle: Option<String>,
    /// One change at a time.
    turn: tokio::sync::Mutex<()>,
}

/// The file beside, open.
#[derive(Debug)]
struct Side {
    home: Arc<dyn Home>,
    file: Arc<View>,
    image: Arc<Qcow2>,
    view: Arc<View>,
    place: ByteRange,
    tied: Mutex<Tied>,
    /// [`Stamp::until`].
    until: AtomicI64,
    /// Who announces writes.
    announcing: tokio::sync::Mutex<()>,
}

#[derive(Clone, Copy, Debug)]
struct Tied {
    /// What the place of the tie has.
    stamp: Option<Stamp>,
    /// The disk when it was last looked at.
    seen: Mark,
    /// Somebody writes.
    open: bool,
}

/// What is at the place of the tie.
async fn read_tie(file: &View, place: ByteRange) -> Result<(Option<Stamp>, Option<Note>)> {
    let into = Iov::scratch(place.buffer_len());
    file.cx().read(place, into.clone()).await?;
    let bytes = into.to_vec();
    let (stamp, note) = bytes.split_at(PAGE);
    Ok((Stamp::parse(stamp), Note::parse(note)))
}

impl Beside {
    /// Looks what there is beside a disk of `length` bytes.
    pub async fn open(home: Arc<dyn Home>, length: u64) -> Self {
        let found = match home.open().await {
            Ok(None) => Ok(None),
            Ok(Some(file)) => Side::open(&home, file, length).await.map(Some),
            Err(error) => Err(error.to_string()),
        };
        let (side, obstacle) = match found {
            Ok(side) => (side.map(Arc::new), None),
            Err(why) => {
                let name = home.name();
                tracing::warn!(file = name, why, "this is not taken for the bitmaps of the disk beside");
                (None, Some(format!("'{name}' is in the way: {why}")))
            }
        };
        Self { home, side: RwLock::new(side), obstacle, turn: tokio::sync::Mutex::default() }
    }

    fn side(&self) -> Option<Arc<Side>> {
        self.side.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_side(&self, side: Option<Arc<Side>>) {
        *self.side.write().unwrap_or_else(PoisonError::into_inner) = side;
    }

    /// The file beside, made if need be, for a disk that is open for writing.
    async fn made(&self, length: u64) -> Result<Arc<Side>> {
        if let Some(side) = self.side() {
            return Ok(side);
        }
        let could_not = |error: IoError| error.context(format!("Could not create '{}'", self.home.name()));
        let file = self.home.create().await.map_err(could_not)?;
        match self.make(&file, length).await {
            Ok(side) => Ok(side),
            Err(error) => {
                if let Err(second) = self.home.remove(&file).await {
                    tracing::warn!(error = %second, "a file that came to nothing could not be removed");
                }
                close(&file).await;
                Err(could_not(error))
            }
        }
    }

    async fn make(&self, file: &Arc<View>, length: u64) -> Result<Arc<Side>> {
        let options = CreateOptions { tied: true, ..CreateOptions::new(length) };
        create(&file.cx(), &options).await.map_err(|error| IoError::EINVAL.with(error.to_string()))?;
        self.home.publish(file).await?;
        let side =
            Side::open(&self.home, file.clone(), length).await.map_err(|why| IoError::EIO.with(why))?;
        side.begin().await?;
        let side = Arc::new(side);
        self.set_side(Some(side.clone()));
        Ok(side)
    }

    /// The file beside, as long as the disk, for bitmaps that it shall keep; none if there are none.
    async fn side_for(&self, cx: &Cx<'_>, bitmaps: &[PlanBitmap]) -> Result<Option<Arc<Side>>> {
        if bitmaps.is_empty() {
            self.remove_side().await?;
            return Ok(None);
        }
        let side = self.made(cx.length()).await?;
        side.follow(cx.length()).await?;
        Ok(Some(side))
    }

    /// Nothing is to be kept any more.
    async fn remove_side(&self) -> Result<()> {
        let Some(side) = self.side() else { return Ok(()) };
        self.home.remove(&side.file).await?;
        self.set_side(None);
        self.home.dismiss_witness();
        close(&side.file).await;
        Ok(())
    }

    /// To be held while the disk is written to, by anybody.
    pub async fn writing(&self) -> Result<Option<Writing>> {
        let Some(side) = self.side() else { return Ok(None) };
        if !side.is_announced() {
            side.announce().await?;
        }
        self.home.begin_write();
        Ok(Some(Writing(self.home.clone())))
    }

    /// Whether the disk can be `size` bytes long.
    pub fn check_can_be_resized(&self, size: u64) -> Result<()> {
        match self.side() {
            Some(side) if side.tied().open => side.image.check_bitmaps_can_be_resized(size),
            _ => Ok(()),
        }
    }

    /// The disk is closed.
    pub async fn close(&self) {
        let Some(side) = self.side() else { return };
        if side.tied().open {
            tracing::warn!(file = self.home.name(), "the bitmaps were not stored");
        }
        close(&side.view).await;
        close(&side.file).await;
    }
}

/// Somebody is writing to the disk.
#[derive(Debug)]
pub struct Writing(Arc<dyn Home>);

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.end_write();
    }
}

/// What cannot be closed as it should is as after a crash.
async fn close(view: &View) {
    if let Err(error) = view.node().close(&view.cx()).await {
        tracing::warn!(%error, "a file of bitmaps could not be closed cleanly");
    }
}

impl Side {
    /// Opens the image of a disk of `length` bytes that lies in `file`, for reading. Else why it is none.
    async fn open(home: &Arc<dyn Home>, file: Arc<View>, length: u64) -> std::result::Result<Self, String> {
        fn text(error: impl Display) -> String {
            error.to_string()
        }
        let header = Header::read(&file.cx()).await.map_err(text)?;
        let place = tie_place(header.cluster_size()).filter(|_| header.extensions.is_tied());
        let place = place.ok_or("It is an image of its own")?;
        let (mut stamp, mut note) = read_tie(&file, place).await.map_err(text)?;
        let boot = home.boot().map_err(text)?;
        if stamp.is_some_and(|stamp| stamp.awaits_witness(note.as_ref(), &boot)) {
            home.hear_witness(&file).await;
            (stamp, note) = read_tie(&file, place).await.map_err(text)?;
        }
        let seen = home.mark().map_err(text)?;
        let is_tied = header.virtual_size() == length
            && stamp.is_some_and(|stamp| stamp.holds(note.as_ref(), &seen, &boot));
        let options = OpenOptions { distrust_bitmaps: !is_tied, ..OpenOptions::default() };
        let image = Arc::new(Qcow2::open(&file.cx(), options).await.map_err(text)?);
        let view = View::detached(image.clone(), [(Role::File, file.clone())]);
        let tied = Mutex::new(Tied { stamp, seen, open: false });
        Ok(Self {
            home: home.clone(),
            file,
            image,
            view,
            place,
            tied,
            until: AtomicI64::new(i64::MAX),
            announcing: tokio::sync::Mutex::default(),
        })
    }

    fn tied(&self) -> MutexGuard<'_, Tied> {
        self.tied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn set_writable(&self, writable: bool) -> Result<()> {
        let required = if writable { Perms::CONSISTENT_READ | Perms::WRITE } else { Perms::NONE };
        let access = Access { writable, required, shared: Perms::CONSISTENT_READ, used: writable };
        if writable {
            self.file.node().set_access(&self.file.cx(), access).await?;
            return self.image.set_access(&self.view.cx(), access).await;
        }
        self.image.set_access(&self.view.cx(), access).await?;
        self.file.node().set_access(&self.file.cx(), Access { shared: Perms::ALL, ..access }).await
    }

    /// Somebody will write to the disk.
    async fn begin(&self) -> Result<()> {
        self.set_writable(true).await?;
        let begun = self.begin_writable().await;
        if begun.is_err()
            && let Err(error) = self.set_writable(false).await
        {
            tracing::warn!(%error, "a file of bitmaps could not be given up");
        }
        begun
    }

    async fn begin_writable(&self) -> Result<()> {
        let Tied { stamp, seen, .. } = *self.tied();
        let now = read_tie(&self.file, self.place).await?.0;
        if now != stamp || self.home.mark()? != seen {
            let text = "Somebody else has written to the disk since its bitmaps were read";
            return Err(IoError::new(16).with_hint(text, "Open the disk anew"));
        }
        self.image.begin(&self.view.cx()).await?;
        let stamp = self.stamp(true).await?;
        self.tied().open = true;
        let note = self.place.start() + PAGE as u64;
        self.home.call_witness(&self.file, note, stamp.session).await;
        Ok(())
    }

    async fn write(&self, bytes: &[u8]) -> Result<()> {
        let range = ByteRange::between(self.place.start(), self.place.start() + bytes.len() as u64);
        self.file.cx().write(range, Iov::copy_of(bytes), WriteFlags::default()).await
    }

    /// Writes the stamp, durably. Nobody writes to the disk meanwhile.
    async fn stamp(&self, open: bool) -> Result<Stamp> {
        self.home.sync().await?;
        let boot = self.home.boot()?.id;
        let before = self.tied().stamp.map_or(0, |stamp| stamp.session);
        let session = before.saturating_add(1).max(self.home.now().cast_unsigned());
        let mut stamp = Stamp { open, session, mark: self.home.mark()?, boot, until: i64::MIN };
        let mut is_later = false;
        for _ in 0..TICKS {
            self.write(&stamp.to_bytes()).await?;
            if self.home.written_at(&self.file)? > stamp.mark.last() {
                is_later = true;
                break;
            }
            rt::sleep(TICK).await;
        }
        if !is_later || self.home.mark()? != stamp.mark {
            tracing::warn!(file = self.home.name(), "the disk's times cannot be relied on");
            stamp.mark = Mark::NONE;
        }
        let now = self.home.now();
        if self.home.written_at(&self.file)?.abs_diff(now) < OTHER_CLOCK.unsigned_abs() {
            stamp.until = now.saturating_add(ANNOUNCED);
        }
        let mut bytes = stamp.to_bytes().to_vec();
        if open {
            // What the last witness has noted.
            bytes.resize(2 * PAGE, 0);
        }
        self.write(&bytes).await?;
        self.file.cx().flush().await?;
        let until = if stamp.until == i64::MIN { i64::MAX } else { stamp.until };
        self.until.store(until, Ordering::Relaxed);
        let mut tied = self.tied();
        (tied.stamp, tied.seen) = (Some(stamp), self.home.mark()?);
        Ok(stamp)
    }

    fn is_announced(&self) -> bool {
        let until = self.until.load(Ordering::Relaxed);
        until == i64::MAX || self.home.now() < until - ANNOUNCED / 2
    }

    /// Announces writes, durably.
    async fn announce(&self) -> Result<()> {
        let _turn = self.announcing.lock().await;
        let Some(stamp) = self.tied().stamp.filter(|_| !self.is_announced()) else { return Ok(()) };
        let stamp = Stamp { until: self.home.now().saturating_add(ANNOUNCED), ..stamp };
        self.write(&stamp.to_bytes()).await?;
        self.file.cx().flush().await?;
        self.tied().stamp = Some(stamp);
        self.until.store(stamp.until, Ordering::Relaxed);
        Ok(())
    }

    /// Makes the image's disk as long as the disk. Nobody writes to that meanwhile.
    async fn follow(&self, length: u64) -> Result<()> {
        if self.image.size() != length {
            self.image.resize(&self.view.cx(), length, Preallocation::Off).await?;
            let stamp = self.stamp(true).await?;
            self.home.call_witness(&self.file, self.place.start() + PAGE as u64, stamp.session).await;
        }
        Ok(())
    }

    /// Nobody writes any more.
    async fn store(&self, bitmaps: &[PlanBitmap]) -> Result<()> {
        self.stamp(false).await?;
        self.image.store(&self.view.cx(), bitmaps).await?;
        self.set_writable(false).await?;
        self.tied().open = false;
        self.home.dismiss_witness();
        Ok(())
    }
}

#[async_trait]
impl BitmapStore for Beside {
    fn loaded(&self) -> Vec<PlanBitmap> {
        self.side().map_or_else(Vec::new, |side| side.image.loaded())
    }

    fn check_new(
        &self,
        cx: &Cx<'_>,
        others: &[PlanBitmap],
        name: &str,
        granularity: u64,
    ) -> std::result::Result<(), GraphError> {
        let node = cx.view().name();
        match (&self.obstacle, self.side()) {
            (Some(why), _) => {
                Err(GraphError::new(format!("Can't store persistent bitmaps to {node}: {why}")))
            }
            (None, Some(side)) => {
                // Its own view has another name.
                check_new_bitmap(node, cx.length(), others, name, granularity)?;
                side.image.check_new(&side.view.cx(), others, name, granularity)
            }
            (None, None) => check_new_bitmap(node, cx.length(), others, name, granularity),
        }
    }

    async fn begin(&self, _cx: &Cx<'_>) -> Result<()> {
        let _turn = self.turn.lock().await;
        match self.side() {
            Some(side) => side.begin().await,
            None => Ok(()),
        }
    }

    async fn store(&self, cx: &Cx<'_>, bitmaps: &[PlanBitmap]) -> Result<()> {
        let _turn = self.turn.lock().await;
        match self.side_for(cx, bitmaps).await? {
            Some(side) => side.store(bitmaps).await,
            None => Ok(()),
        }
    }

    fn is_stored(&self) -> bool {
        self.side().is_none_or(|side| side.image.is_stored())
    }

    fn has(&self, name: &str) -> bool {
        self.side().is_some_and(|side| side.image.has(name))
    }

    async fn remove(&self, _cx: &Cx<'_>, name: &str) -> Result<()> {
        let _turn = self.turn.lock().await;
        match self.side() {
            Some(side) => side.image.remove(&side.view.cx(), name).await,
            None => Ok(()),
        }
    }

    async fn refresh(&self, cx: &Cx<'_>, bitmaps: &[PlanBitmap]) -> Result<()> {
        let _turn = self.turn.lock().await;
        match self.side_for(cx, bitmaps).await? {
            Some(side) => side.image.refresh(&side.view.cx(), bitmaps).await,
            None => Ok(()),
        }
    }

    fn is_worth_refreshing(&self) -> bool {
        self.side().is_some_and(|side| side.image.is_worth_refreshing())
    }

    fn covers(&self, range: ByteRange) -> bool {
        self.side().is_none_or(|side| side.image.covers(range))
    }

    async fn cover(&self, _cx: &Cx<'_>, range: ByteRange) -> Result<()> {
        match self.side() {
            Some(side) => side.image.cover(&side.view.cx(), range).await,
            None => Ok(()),
        }
    }
}
