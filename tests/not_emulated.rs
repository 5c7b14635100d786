//! Says which tests are missing where there is no emulated GPU.
#![cfg(not(target_os = "linux"))]

#[test]
#[ignore = "the emulated GPU needs Linux: cuda_*, candle_cuda, the command's bench on a GPU and the emulator's own tests are left out"]
fn on_the_emulated_gpu() {}
