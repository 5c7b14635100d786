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
