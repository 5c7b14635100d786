// Every item of every worker of the Hopper forward's schedule, as kernels/hopper_schedule.cuh shares them out: a thread a worker.
#include "hopper_schedule.cuh"

namespace {

struct Params {
    hopper::Schedule schedule;
    u32 room;                                // items that each worker may have
    hopper::Item* items;                     // [workers, room]
    u32* counts;                             // [workers]
};

}  // namespace

extern "C" __global__ void __launch_bounds__(32) example_schedule(const __grid_constant__ Params a) {
    hopper::Schedule schedule = a.schedule;
    schedule.worker = blockIdx.x * 32 + threadIdx.x;
    if (schedule.worker >= schedule.workers) return;
    u32 count = 0;
    schedule.for_each_item([&](const hopper::Item& item) {
        if (count < a.room) a.items[u64(schedule.worker) * a.room + count] = item;
        ++count;
    });
    a.counts[schedule.worker] = count;
}
