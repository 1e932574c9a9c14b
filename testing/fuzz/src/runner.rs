//! Runs targets: replays, mutates, and says which input was too much.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use underlay_sim::Rng;

use crate::Target;

/// How long one input may take; they take milliseconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// Memory that the process may have, in bytes of addresses: most of it is what threads reserve and never use.
const MEMORY: u64 = 4 << 30;
/// Most changes of one input.
const CHANGES: u64 = 5;

/// An input that was too much.
#[derive(Debug)]
pub struct Crash {
    /// Where the input was written to.
    pub input: PathBuf,
    /// How to have it again.
    pub again: String,
}

/// Bounds what the process may allocate from now on: more is a crash.
pub fn limit_memory() {
    let old = getrlimit(Resource::As);
    let new =
        Rlimit { current: Some(old.current.map_or(MEMORY, |now| now.min(MEMORY))), maximum: old.maximum };
    // Where it cannot be bounded, it is not.
    let _ = setrlimit(Resource::As, new);
}

/// The inputs that are kept for a target, by name.
pub fn corpus(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
        .unwrap_or_default();
    files.sort();
    files.into_iter().filter_map(|file| Some((file.clone(), std::fs::read(file).ok()?))).collect()
}

/// Replays the corpus and the target's own seeds, then runs `count` mutated inputs; `crashes` is where an input
/// goes that is too much.
pub fn run(target: &Target, seed: u64, count: u64, crashes: &Path) -> Result<(), Crash> {
    let watch = Watch::new(target.name, crashes);
    let mut inputs: Vec<Vec<u8>> = (target.seeds)();
    for (at, input) in inputs.iter().enumerate() {
        let again = format!("the target's own seed {at}");
        one(target, input, &watch, crashes, again)?;
    }
    for (file, input) in corpus(target) {
        one(target, &input, &watch, crashes, file.display().to_string())?;
        inputs.push(input);
    }
    for round in 0..count {
        let input = mutated(target, &inputs, seed.wrapping_add(round));
        let again = format!(
            "cargo run -p underlay-fuzz -- --target {} --seed {} --count 1",
            target.name,
            seed.wrapping_add(round)
        );
        one(target, &input, &watch, crashes, again)?;
    }
    Ok(())
}

/// The input of a seed.
fn mutated(target: &Target, inputs: &[Vec<u8>], seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut input = if inputs.is_empty() { Vec::new() } else { inputs[rng.index(inputs.len())].clone() };
    for _ in 0..=rng.below(CHANGES) {
        (target.mutate)(&mut input, &mut rng);
    }
    input
}

fn one(target: &Target, input: &[u8], watch: &Watch, crashes: &Path, again: String) -> Result<(), Crash> {
    watch.begin(input, &again);
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    watch.end();
    outcome.map_err(|_| Crash { input: keep(crashes, target.name, input), again })
}

/// Writes an input to a file that its content names.
fn keep(crashes: &Path, target: &str, input: &[u8]) -> PathBuf {
    let hash = input.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let file = crashes.join(format!("{target}-{hash:016x}"));
    let written = std::fs::create_dir_all(crashes).and_then(|()| std::fs::write(&file, input));
    if let Err(error) = written {
        eprintln!("{}: {error}", file.display());
    }
    file
}

/// Ends the process when an input takes too long: nothing else gets a thread out of a loop.
struct Watch(Sender<Option<(Vec<u8>, String)>>);

impl Watch {
    fn new(target: &'static str, crashes: &Path) -> Self {
        let (sender, receiver) = mpsc::channel::<Option<(Vec<u8>, String)>>();
        let crashes = crashes.to_owned();
        std::thread::spawn(move || {
            while let Ok(begun) = receiver.recv() {
                let Some((input, again)) = begun else { continue };
                if receiver.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    let file = keep(&crashes, target, &input);
                    eprintln!("{target}: no end with {} ({again})", file.display());
                    std::process::abort();
                }
            }
        });
        Self(sender)
    }

    fn begin(&self, input: &[u8], again: &str) {
        let _ = self.0.send(Some((input.to_vec(), again.to_owned())));
    }

    fn end(&self) {
        let _ = self.0.send(None);
    }
}
