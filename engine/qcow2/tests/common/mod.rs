//! What the comparisons with qemu-img share: a disk in memory, and ways to run both sides.
#![allow(dead_code, clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::any::Any;
use std::collections::{BTreeMap, HashSet};
use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::thread::ThreadId;

use async_trait::async_trait;
use underlay_graph::{ByteRange, Cx, Kind, Node, Preallocation, Result, View, WriteFlags};
use underlay_sys::Iov;

const PAGE: u64 = 4096;

/// A sparse file in memory.
#[derive(Debug, Default)]
pub struct Memory {
    inner: Mutex<Inner>,
    /// Threads that have read it.
    pub readers: Mutex<HashSet<ThreadId>>,
}

#[derive(Debug, Default)]
struct Inner {
    pages: BTreeMap<u64, Vec<u8>>,
    len: u64,
}

impl Memory {
    pub fn view(self) -> (Arc<Memory>, Arc<View>) {
        let node = Arc::new(self);
        (node.clone(), View::detached(node, []))
    }

    pub fn from_bytes(bytes: &[u8]) -> Self {
        let memory = Self::default();
        {
            let mut inner = memory.inner.lock().unwrap();
            for (i, page) in bytes.chunks(PAGE as usize).enumerate() {
                if page.iter().any(|b| *b != 0) {
                    let mut page = page.to_vec();
                    page.resize(PAGE as usize, 0);
                    inner.pages.insert(i as u64, page);
                }
            }
            inner.len = bytes.len() as u64;
        }
        memory
    }

    pub fn load(path: &Path) -> Self {
        Self::from_bytes(&std::fs::read(path).unwrap())
    }

    pub fn save(&self, path: &Path) {
        use std::os::unix::fs::FileExt;
        let inner = self.inner.lock().unwrap();
        let file = std::fs::File::create(path).unwrap();
        file.set_len(inner.len).unwrap();
        for (page, bytes) in &inner.pages {
            let len = (inner.len.saturating_sub(page * PAGE)).min(PAGE) as usize;
            file.write_all_at(&bytes[..len], page * PAGE).unwrap();
        }
    }

    pub fn to_vec(&self) -> Vec<u8> {
        let inner = self.inner.lock().unwrap();
        let mut bytes = vec![0; inner.len as usize];
        for (page, from) in &inner.pages {
            let at = (page * PAGE) as usize;
            let len = bytes.len().saturating_sub(at).min(PAGE as usize);
            bytes[at..at + len].copy_from_slice(&from[..len]);
        }
        bytes
    }
}

#[async_trait]
impl Node for Memory {
    fn driver(&self) -> &'static str {
        "memory"
    }
    fn kind(&self) -> Kind {
        Kind::Protocol
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn length(&self, _cx: &Cx<'_>) -> u64 {
        self.inner.lock().unwrap().len
    }
    fn unwritten_is_zero(&self, _cx: &Cx<'_>) -> bool {
        true
    }
    async fn read(&self, _cx: &Cx<'_>, range: ByteRange, into: Iov) -> Result<()> {
        into.fill(0);
        self.readers.lock().unwrap().insert(std::thread::current().id());
        let inner = self.inner.lock().unwrap();
        for (page, bytes) in inner.pages.range(range.start() / PAGE..range.end().div_ceil(PAGE)) {
            let part = range.intersect(ByteRange::between(page * PAGE, (page + 1) * PAGE));
            let from = (part.start() - page * PAGE) as usize;
            into.write_at((part.start() - range.start()) as usize, &bytes[from..from + part.buffer_len()]);
        }
        Ok(())
    }
    async fn write(&self, _cx: &Cx<'_>, range: ByteRange, from: Iov, _flags: WriteFlags) -> Result<()> {
        let mut inner = self.inner.lock().unwrap();
        for page in range.start() / PAGE..range.end().div_ceil(PAGE) {
            let part = range.intersect(ByteRange::between(page * PAGE, (page + 1) * PAGE));
            let at = (part.start() - page * PAGE) as usize;
            let bytes = inner.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize]);
            from.read_at((part.start() - range.start()) as usize, &mut bytes[at..at + part.buffer_len()]);
        }
        inner.len = inner.len.max(range.end());
        Ok(())
    }
    async fn resize(&self, _cx: &Cx<'_>, size: u64, _preallocation: Preallocation) -> Result<()> {
        let mut inner = self.inner.lock().unwrap();
        inner.pages.retain(|page, _| page * PAGE < size);
        if let Some(last) = inner.pages.get_mut(&(size / PAGE)) {
            last[(size % PAGE) as usize..].fill(0);
        }
        inner.len = size;
        Ok(())
    }
}

/// Runs a future that needs no other task.
pub fn run<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(done) = future.as_mut().poll(&mut cx) {
            return done;
        }
    }
}

/// Whether there is a qemu-img to compare with; says so when not.
pub fn have_qemu_img() -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok_and(|o| o.status.success());
    if !there {
        println!("skipped: qemu-img is not installed");
    }
    there
}

/// Runs `qemu-img` in `dir`: exit status, stdout, stderr.
pub fn qemu_img(dir: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new("qemu-img").current_dir(dir).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// Runs `qemu-io` on an image in `dir`.
pub fn qemu_io(dir: &Path, image: &str, commands: &[&str]) {
    let mut arguments = vec!["-f", "qcow2"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(image);
    let output = Command::new("qemu-io").current_dir(dir).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
