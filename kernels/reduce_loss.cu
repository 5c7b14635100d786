// The scalar outputs: the sum of all losses over the denominator, and the accuracy. Sums in f64, in a fixed order.
#include "block_scan.cuh"

namespace {

constexpr u32 THREADS = 1024;

struct Smem { block::SumSpace<THREADS> sum; };

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) lce_reduce_loss(const __grid_constant__ LceArgs a) {
    Smem& smem = prim::shared_memory<Smem>();
    f64 loss = 0;
    for (u32 token = threadIdx.x; token < a.problem.tokens; token += THREADS) loss += a.outputs.losses[token];   // 0 where ignored
    loss = block::sum<THREADS>(smem.sum, loss);

    const u32 num_rows = a.saved.header->num_rows;
    f64 correct = 0;
    if (a.outputs.accuracy) {
        for (u32 row = threadIdx.x; row < num_rows; row += THREADS) {
            const u32 y = a.saved.row_class[row];
            correct += y != NONE && y == a.saved.statistics[row].argmax;
        }
        correct = block::sum<THREADS>(smem.sum, correct);
    }
    if (threadIdx.x == 0) {
        const f64 denominator = a.saved.header->denominator;
        // The mean over nothing is 0; over targets that are all out of range it is not nothing.
        const bool nothing = denominator == 0.0 && a.saved.header->bad_target_token == NONE;
        *a.outputs.loss = nothing ? 0.0f : float(loss / denominator);
        if (a.outputs.accuracy) *a.outputs.accuracy = float(correct) / float(num_rows > 0 ? num_rows : 1);
    }
}
