// What kernels/deal.cuh deals out to each worker: a thread a worker.
#include "deal.cuh"

namespace {

struct Params {
    share::Deal deal;
    u32 turns;
    u32* items;                              // [workers, turns]
};

}  // namespace

extern "C" __global__ void __launch_bounds__(32) example_deal(const __grid_constant__ Params a) {
    share::Deal deal = a.deal;
    deal.worker = blockIdx.x * 32 + threadIdx.x;
    if (deal.worker >= deal.workers) return;
    for (u32 turn = 0; turn < a.turns; ++turn) a.items[u64(deal.worker) * a.turns + turn] = deal.item(turn);
}
