//! Thread pools: one per thread count asked for, kept for the life of the process.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};

/// The pools of one process. After a fork the child's copy names threads that only the parent has.
struct Pools {
    process: u32,
    pools: Option<HashMap<usize, Arc<ThreadPool>>>,
}

static POOLS: Mutex<Pools> = Mutex::new(Pools { process: 0, pools: None });

/// Run `op` so that rayon's parallel iterators inside it use `threads` threads.
pub fn install<R: Send>(threads: usize, op: impl FnOnce() -> R + Send) -> Result<R> {
    Ok(pool(threads.max(1))?.install(op))
}

fn pool(threads: usize) -> Result<Arc<ThreadPool>> {
    let mut shared = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if shared.process != std::process::id() {
        shared.process = std::process::id();
        // Dropping a pool joins its threads, which this process does not have: leave the parent's alone.
        std::mem::forget(shared.pools.take());
    }
    let pools = shared.pools.get_or_insert_default();
    if let Some(pool) = pools.get(&threads) {
        return Ok(pool.clone());
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("oxiscan-{index}"))
        .build()
        .map_err(|error| Error::Internal(format!("starting {threads} threads: {error}")))?;
    let pool = Arc::new(pool);
    pools.insert(threads, pool.clone());
    Ok(pool)
}

#[cfg(test)]
mod tests {
    use super::install;

    #[test]
    fn iterators_run_on_the_threads_asked_for() {
        for threads in [1, 3, 2] {
            assert_eq!(install(threads, rayon::current_num_threads).unwrap(), threads);
        }
    }
}
