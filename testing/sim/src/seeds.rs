//! Running a test with many seeds, each in a world of its own.
//!
//! `UNDERLAY_SEEDS=n` runs n seeds of each test, `UNDERLAY_SEED=s` just that one.

use crate::world::World;

/// Runs `test` with the seeds 0 to `default` - 1, or as the environment says. A seed that fails is printed.
pub fn run_seeds<F: Future<Output = ()>>(default: u64, test: impl Fn(u64) -> F + std::panic::RefUnwindSafe) {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let all = match number("UNDERLAY_SEED") {
        Some(seed) => seed..seed.saturating_add(1),
        None => 0..number("UNDERLAY_SEEDS").unwrap_or(default),
    };
    for seed in all {
        if let Err(panic) = std::panic::catch_unwind(|| World::new(seed).run(test(seed))) {
            eprintln!("UNDERLAY_SEED={seed} reproduces this");
            std::panic::resume_unwind(panic);
        }
    }
}
