"""The clock and the memory of what is measured: a GPU's, or a processor's. PyTorch is imported where it is needed."""

import pathlib
import re
import time

# How often the flush buffer is written before a step: by estimate 1 ms of work for the device, so that the host, which launches a peer's
# kernels from Python, is ahead of it when the clock starts. `cce bench` gives itself as much.
HEAD_START = 15


class Gpu:
    # In a turn all is run once before the clock: what was given back is allocated there, and not in what is timed.
    warms_up = True

    def __init__(self):
        import torch

        self.cuda = torch.cuda
        self.name = torch.cuda.get_device_name()
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def timed(self, work):
        for _ in range(HEAD_START):
            self.flush.zero_()
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak(self, work):
        """Bytes beyond those held before."""
        held = self.cuda.memory_allocated()
        self.cuda.reset_peak_memory_stats()
        work()
        return self.cuda.max_memory_allocated() - held

    def give_back(self):
        self.cuda.empty_cache()


class Processor:
    # Seconds a step, and nothing is kept from one to the next: a second one would change nothing but the duration.
    warms_up = False
    name = "processor"

    def timed(self, work):
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    def peak(self, work):
        """Resident bytes beyond those before, at the highest; None where the system does not tell."""
        try:
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            before = resident("VmRSS")
        except OSError:
            before = None
        work()
        return None if before is None else resident("VmHWM") - before

    def give_back(self):
        pass


def resident(key):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s*(\d+) kB", status, re.M)[1]) << 10
