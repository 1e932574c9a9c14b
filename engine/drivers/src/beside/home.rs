//! Where a disk is, and the file beside it: what the bitmaps of a raw disk need to know of the world.

use std::ffi::OsString;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use underlay_graph::{Access, IoError, Node, NodeOptions, Perms, Result, View};
use underlay_sys::file::{File, OpenOptions};
use underlay_sys::rt;
use underlay_sys::stat::{self, Boot};
use underlay_sys::witness::{Record, Witness};

use super::tie::{Mark, Told};
use crate::error::OpenError;
use crate::options::FileSpec;
use crate::protocol::file::{Aio, FileNode, Locking};

/// What is behind the name of a disk in that of the file beside it.
const SUFFIX: &str = ".bitmaps";
/// And while that file is being made.
const UNFINISHED: &str = ".new";
/// The byte of the file beside that is locked while there is a witness.
const WITNESS: u64 = 300;
/// The byte of it that is locked by whoever keeps the bitmaps.
const WRITER: u64 = 101;
/// How often a witness is looked for, and how many times.
const PAUSE: Duration = Duration::from_millis(10);
const PATIENCE: usize = 200;
/// So many times somebody who seems to be alive may be dying.
const DYING: usize = 20;
/// How often is looked whether he has come, and how many times.
const START: Duration = Duration::from_millis(1);
const STARTS: usize = 2000;

/// See the module. The file beside is a node of its own, in no graph.
#[async_trait]
pub trait Home: Debug + Send + Sync {
    /// What the file beside is called.
    fn name(&self) -> String;
    /// Opens the file beside; `None` if there is none.
    async fn open(&self) -> Result<Option<Arc<View>>>;
    /// Makes one, empty and writable, that nobody finds before it is published.
    async fn create(&self) -> Result<Arc<View>>;
    /// It is the file beside from now on, durably. EEXIST if there is one already.
    async fn publish(&self, beside: &View) -> Result<()>;
    /// Takes the file beside away, published or not, durably.
    async fn remove(&self, beside: &View) -> Result<()>;

    /// The disk's file as it is now.
    fn mark(&self) -> Result<Mark>;
    /// Makes durable how it is now, its times too.
    async fn sync(&self) -> Result<()>;
    /// When the file beside was last written to, by the clock that marks have their times from.
    fn written_at(&self, beside: &View) -> Result<i64>;
    /// The run of the kernel.
    fn boot(&self) -> Result<Boot>;
    /// Now, in nanoseconds since the beginning of 1970.
    fn now(&self) -> i64;

    /// Has somebody note at byte `at` of the file beside how the disk was when this process died; nobody else any more.
    async fn call_witness(&self, beside: &View, at: u64, session: u64);
    /// There is nothing to note any more.
    fn dismiss_witness(&self);
    /// A write to the disk begins: that a witness may know.
    fn begin_write(&self);
    /// It has ended.
    fn end_write(&self);
    /// Waits while the witness of one who has died may be writing.
    async fn hear_witness(&self, beside: &View);
}

/// A disk in a file of the host.
#[derive(Debug)]
pub struct FileHome {
    disk: Arc<dyn Node>,
    path: PathBuf,
    witness: Mutex<Option<Witness>>,
    /// For the witness, once there has been one.
    record: OnceLock<Record>,
    /// Writes under way.
    writing: Mutex<u64>,
}

fn file_of(node: &dyn Node) -> Result<&FileNode> {
    node.as_any().downcast_ref().ok_or_else(|| IoError::ENOTSUP.with("not a file"))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

impl FileHome {
    /// Of a disk that is all of a file which can be locked. Else why that cannot be: a reason to be shown.
    pub fn of(file: &View) -> std::result::Result<Self, String> {
        let disk = file.node().clone();
        let Ok(own) = file_of(&*disk) else {
            return Err(format!("'{}' is not a file of this host", disk.driver()));
        };
        if own.spec().driver != "file" {
            return Err(format!("'{}' is not a regular file", own.spec().filename));
        }
        if !own.is_locking() {
            return Err(format!("'{}' is not locked against other programs", own.spec().filename));
        }
        let lost = |error: &dyn std::fmt::Display| {
            format!("the folder of '{}' is not known: {error}", own.spec().filename)
        };
        // Whatever names lead to the disk, the file beside is the same.
        let path = std::fs::canonicalize(&own.spec().filename).map_err(|error| lost(&error))?;
        let named = File::open(&path, OpenOptions::default()).and_then(|file| file.stat());
        let (named, stat) = (named.map_err(|e| lost(&e))?, own.handle().stat().map_err(|e| lost(&e))?);
        if (named.device, named.inode) != (stat.device, stat.inode) {
            return Err(lost(&"it was replaced"));
        }
        Ok(Self {
            disk,
            path: with_suffix(&path, SUFFIX),
            witness: Mutex::default(),
            record: OnceLock::new(),
            writing: Mutex::default(),
        })
    }

    fn disk(&self) -> Result<Arc<File>> {
        Ok(file_of(&*self.disk)?.handle())
    }

    fn unfinished(&self) -> PathBuf {
        with_suffix(&self.path, UNFINISHED)
    }

    fn witness(&self) -> MutexGuard<'_, Option<Witness>> {
        self.witness.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn node(&self, path: &Path, read_only: bool) -> Result<Arc<View>> {
        let filename = path.to_str().ok_or_else(|| IoError::EINVAL.with("The name is not UTF-8"))?.to_owned();
        let spec = FileSpec { driver: "file", filename, locking: Locking::On, aio: Aio::default() };
        let options = NodeOptions { discard: true, ..NodeOptions::default() };
        let node = FileNode::open(&spec, &options, read_only, false).await.map_err(|error| match error {
            OpenError::Io(error) => error,
            other => IoError::EINVAL.with(other.to_string()),
        })?;
        Ok(View::detached(Arc::new(node), []))
    }

    fn writing(&self) -> MutexGuard<'_, u64> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the witness. While this happens there are writes under way, as far as he knows.
    fn tell(record: &Record, told: Told) {
        let now = told.to_words();
        let words = record.words();
        for (word, now) in words.iter().zip(now).skip(1) {
            word.store(now, Ordering::Release);
        }
        words[0].store(now[0], Ordering::SeqCst);
    }

    fn try_witness(&self, beside: &View, at: u64, session: u64) -> Result<Witness> {
        // Open files of its own, so that no lock of ours outlives us.
        let book = file_of(&**beside.node())?.handle();
        let book = book.reopen(OpenOptions { write: true, ..OpenOptions::default() })?;
        book.lock_shared(WITNESS)?;
        let disk = self.disk()?.reopen(OpenOptions::default())?;
        let record = match self.record.get() {
            Some(record) => record,
            None => {
                let new = Record::new()?;
                self.record.get_or_init(|| new)
            }
        };
        Self::tell(record, Told { writing: *self.writing(), began: self.now(), still: self.mark()? });
        Ok(Witness::start(&disk, &book, at, session, record)?)
    }
}

#[async_trait]
impl Home for FileHome {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    async fn open(&self) -> Result<Option<Arc<View>>> {
        // Not what a link leads to: whoever may write to the folder could have any file changed.
        match std::fs::symlink_metadata(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
            Ok(found) if !found.is_file() => Err(IoError::EINVAL.with("It is not a regular file")),
            Ok(_) => self.node(&self.path, true).await.map(Some),
        }
    }

    async fn create(&self) -> Result<Arc<View>> {
        let path = self.unfinished();
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let options = OpenOptions { write: true, create_new: true, ..OpenOptions::default() };
        let made = File::open(&path, options)?;
        made.set_mode(self.disk()?.stat()?.mode)?;
        if made.stat()?.device != self.disk()?.stat()?.device {
            let _ = std::fs::remove_file(&path);
            return Err(IoError::ENOTSUP.with("The disk is mounted into another file system's folder"));
        }
        let view = self.node(&path, false).await?;
        let access = Access {
            writable: true,
            required: Perms::CONSISTENT_READ | Perms::WRITE,
            shared: Perms::CONSISTENT_READ,
            used: true,
        };
        view.node().set_access(&view.cx(), access).await?;
        Ok(view)
    }

    async fn publish(&self, _beside: &View) -> Result<()> {
        if std::fs::symlink_metadata(&self.path).is_ok() {
            return Err(IoError::new(17).with(format!("'{}' exists already", self.name())));
        }
        std::fs::rename(self.unfinished(), &self.path)?;
        Ok(File::sync_folder(&self.path).await?)
    }

    async fn remove(&self, beside: &View) -> Result<()> {
        use std::os::unix::fs::MetadataExt;
        let own = file_of(&**beside.node())?.handle().stat()?;
        for path in [self.path.clone(), self.unfinished()] {
            let is_own = |found: &std::fs::Metadata| (found.dev(), found.ino()) == (own.device, own.inode);
            if std::fs::symlink_metadata(&path).is_ok_and(|found| is_own(&found)) {
                std::fs::remove_file(&path)?;
            }
        }
        Ok(File::sync_folder(&self.path).await?)
    }

    fn mark(&self) -> Result<Mark> {
        Ok(Mark::of(&self.disk()?.stat()?))
    }

    async fn sync(&self) -> Result<()> {
        file_of(&*self.disk)?.sync().await
    }

    fn written_at(&self, beside: &View) -> Result<i64> {
        Ok(file_of(&**beside.node())?.handle().stat()?.modified)
    }

    fn boot(&self) -> Result<Boot> {
        Ok(Boot::this()?)
    }

    fn now(&self) -> i64 {
        stat::now()
    }

    async fn call_witness(&self, beside: &View, at: u64, session: u64) {
        self.dismiss_witness();
        match self.try_witness(beside, at, session) {
            Ok(witness) => *self.witness() = Some(witness),
            Err(error) => {
                tracing::debug!(file = self.name(), %error, "nobody is there to see whether the bitmaps are good");
                return;
            }
        }
        let is_there = || self.record.get().is_some_and(Record::has_witness);
        for _ in 0..STARTS {
            if is_there() {
                return;
            }
            rt::sleep(START).await;
        }
        tracing::warn!(file = self.name(), "the witness does not come");
    }

    fn dismiss_witness(&self) {
        if let Some(witness) = self.witness().take() {
            witness.dismiss();
        }
    }

    fn begin_write(&self) {
        let mut writing = self.writing();
        *writing += 1;
        if let Some(record) = self.record.get() {
            let words = record.words();
            words[0].store(*writing, Ordering::SeqCst);
            words[1].store(self.now().cast_unsigned(), Ordering::Release);
        }
    }

    fn end_write(&self) {
        let mut writing = self.writing();
        *writing -= 1;
        let (0, Some(record)) = (*writing, self.record.get()) else { return };
        if let Ok(still) = self.mark() {
            Self::tell(record, Told { writing: 0, began: self.now(), still });
        }
    }

    async fn hear_witness(&self, beside: &View) {
        let Ok(beside) = file_of(&**beside.node()) else { return };
        let is_locked = |byte| beside.handle().is_locked_by_others(byte).unwrap_or(false);
        for waited in 0..PATIENCE {
            // If both are there nobody has died: but the locks of the dead go only when the kernel has taken their
            // requests down.
            if !is_locked(WITNESS) || waited > DYING && is_locked(WRITER) {
                return;
            }
            rt::sleep(PAUSE).await;
        }
    }
}
