//! The emulated GPU as tests of the CUDA backend take it.

use cut_cross_entropy_emulator::{self as emulator, Async, Config, Order};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The settings of the emulator are those of the process: one test at a time.
pub fn lock() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    emulator::install().expect("the emulator is built with this test");
    guard
}

/// Whether tensor cores cut their sums off in this turn, in place of rounding them: half of the turns, out of step with whatever else
/// takes turns.
pub fn cuts(turn: usize) -> bool {
    turn.count_ones() % 2 == 1
}

/// In turn another order of threads and of asynchronous work.
pub fn schedule(turn: usize) -> Config {
    Config {
        order: [Order::Forward, Order::Reverse, Order::Random][turn % 3],
        async_: [Async::Lazy, Async::Eager, Async::Random][turn / 3 % 3],
        seed: turn as u64,
        workers: 2,
        ..Config::default()
    }
}
