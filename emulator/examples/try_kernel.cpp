// The smallest test of a kernel: allocate, launch, look. Run by examples/try_kernel.sh, and a place to start from.
#include <cmath>
#include <cstdio>
#include <vector>

#include "host.hpp"
#include "types.cuh"

struct LseParams { const float* x; float *out, *total; int cols; };
struct OrderParams { float* data; prim::u32* flags; float* out; int mode; };
struct GemmParams80 { const prim::bf16 *a, *b; float* c; int m, n, k; };

static int failures = 0;
static void expect(const char* name, bool good, const emu::Report& r) {
    printf("%-50s %s\n%s", name, good ? "ok" : "FAILED", r.text.c_str());
    failures += !good;
}

int main() {
    const int rows = 16, cols = 1000;
    float *x = emu::device_alloc_n<float>(rows * cols), *out = emu::device_alloc_n<float>(rows * 64), *total = emu::device_alloc_n<float>(1);
    for (int i = 0; i < rows * cols; ++i) x[i] = float(i * 7919 % 1000) / 250 - 2;
    *total = 0;
    emu::device_written(x, rows * cols * sizeof(float));
    emu::device_written(total, sizeof(float));
    auto options = emu::options_from_env();
    auto r = emu::launch(options, "example_row_lse", dim3(rows), dim3(256), 64, LseParams{x, out, total, cols});
    double want = 0;
    for (int c = 0; c < cols; ++c) want += std::exp(double(x[c]));
    expect("row_lse", r.ok() && std::fabs(out[0] - std::log(want)) < 1e-4, r);

    prim::u32* flags = emu::device_alloc_n<prim::u32>(1);
    float* data = emu::device_alloc_n<float>(rows * 64);
    auto order = [&](const char* kernel, int mode, bool cooperative) {
        *flags = 0;
        emu::device_written(flags, 4);
        options.cooperative = cooperative;
        return emu::launch(options, kernel, dim3(8), dim3(64), 256, OrderParams{data, flags, out, mode});
    };
    r = order("example_last_block", 0, false);
    expect("last block, fenced", r.ok() && out[0] == 36, r);
    r = order("example_last_block", 1, false);
    expect("last block, no fence before the count: reported", !r.ok(), r);
    r = order("example_last_block", 2, false);
    expect("last block, no fence after the count: reported", !r.ok(), r);
    r = order("example_grid_barrier", 0, true);
    expect("grid barrier", r.ok() && out[7 * 64] == 0 && out[0] == 1, r);
    r = order("example_grid_barrier", 1, true);
    expect("grid barrier that does not release: reported", !r.ok(), r);
    r = order("example_neighbour", 0, false);
    expect("neighbour", r.ok() && out[0] == 1, r);
    r = order("example_neighbour", 1, false);
    expect("neighbour without a barrier: reported", !r.ok(), r);
    return failures != 0;
}
