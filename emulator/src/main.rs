//! Prints the folder to put into `LD_LIBRARY_PATH`.

fn main() {
    println!("{}", cut_cross_entropy_emulator::library_dir().display());
}
