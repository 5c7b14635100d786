//! Prints the folder to put into `LD_LIBRARY_PATH`.

#[cfg(target_os = "linux")]
fn main() {
    println!("{}", cut_cross_entropy_emulator::library_dir().display());
}

#[cfg(not(target_os = "linux"))]
fn main() -> Result<(), &'static str> {
    Err("the emulated driver is built on Linux only")
}
