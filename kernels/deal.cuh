// Who takes which items of a list, where each must know it beforehand: dealt out in turn, as even as if they were drawn.
#pragma once

#include "abi.h"

namespace share {

// The list: items that take longest, then others. Of the long ones some workers have one more than the rest; the rest begin with as many
// others as one of these takes, then all go on in turn. 3 workers, 4 long items of 2 steps, 5 others of 1:
//
//   worker 0  │ long 0            │ long 3            │         │
//   worker 1  │ long 1            │ other 0 │ other 2 │ other 4 │
//   worker 2  │ long 2            │ other 1 │ other 3 │         │   here other 5 would be, then worker 0's other 6
struct Deal {
    u32 worker, workers;
    u32 longs, long_steps;                   // items, and the most that each takes
    u32 other_steps;                         // most of the others: not more than that, and not 0

    // Position in the list of a worker's item of that turn; beyond the end of the list: there is none, nor later.
    __device__ __forceinline__ u32 item(u32 turn) const {
        const u32 more = longs % workers, fewer = workers - more;            // workers with one long item more, and the others
        const u32 own = longs / workers + (worker < more);
        if (turn < own) return worker + turn * workers;
        turn -= own;
        const u32 ahead = more > 0 ? long_steps / other_steps : 0;
        const u32 position = worker < more ? worker + fewer : worker - more; // those with fewer come first
        if (position < fewer) {
            if (turn < ahead) return longs + position + turn * fewer;
            turn -= ahead;
        }
        return longs + ahead * fewer + position + turn * workers;
    }
};

}  // namespace share
