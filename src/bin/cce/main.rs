//! The `cce` command.
fn main() {}
