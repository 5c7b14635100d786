// Streams, events, captured graphs. Work runs when it is submitted, so a stream that is not being captured is always idle.
#include <chrono>
#include <set>

#include "driver.hpp"

namespace drv {

static std::mutex streams_mutex;
static std::set<Stream*> streams;
static thread_local int capturing_here = 0;           // captures begun by this thread in a mode that forbids synchronising

Stream* stream(void* handle) {
    static Stream legacy;
    static thread_local Stream mine;
    if (handle == nullptr || handle == (void*)1) return &legacy;
    if (handle == (void*)2) return &mine;
    std::lock_guard<std::mutex> lock(streams_mutex);
    return streams.count((Stream*)handle) ? (Stream*)handle : nullptr;
}
bool capture_forbids() { return capturing_here > 0; }

CUresult submit(void* handle, std::function<CUresult()> op) {
    Stream* s = stream(handle);
    if (!s) return CUDA_ERROR_INVALID_HANDLE;
    if (!s->capturing) return op();
    if (s->capturing->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    s->capturing->ops.push_back(std::move(op));
    return CUDA_SUCCESS;
}

struct Event { std::chrono::steady_clock::time_point when; bool recorded = false, timed = true; Graph* captured = nullptr; };

}  // namespace drv
using namespace drv;

// ---- streams -----------------------------------------------------------------------------------------------------------
API cuStreamCreateWithPriority(void** out, unsigned flags, int priority) {
    if (flags > 1) return CUDA_ERROR_INVALID_VALUE;
    auto* s = new Stream;
    s->flags = flags;
    s->priority = priority;
    std::lock_guard<std::mutex> lock(streams_mutex);
    streams.insert(s);
    *out = s;
    return CUDA_SUCCESS;
}
API cuStreamCreate(void** out, unsigned flags) { return cuStreamCreateWithPriority(out, flags, 0); }
API cuStreamDestroy_v2(void* h) {
    std::lock_guard<std::mutex> lock(streams_mutex);
    if (!streams.erase((Stream*)h)) return CUDA_ERROR_INVALID_HANDLE;
    delete (Stream*)h;
    return CUDA_SUCCESS;
}
static CUresult wait_for(void* h) {
    Stream* s = stream(h);
    if (!s) return CUDA_ERROR_INVALID_HANDLE;
    if (s->capturing) { s->capturing->invalid = true; return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED; }
    return sticky();
}
API cuStreamSynchronize(void* h) { return wait_for(h); }
API cuStreamQuery(void* h) { return wait_for(h); }
API cuStreamGetPriority(void* h, int* p) { Stream* s = stream(h); if (!s) return CUDA_ERROR_INVALID_HANDLE; *p = s->priority; return CUDA_SUCCESS; }
API cuStreamGetFlags(void* h, unsigned* f) { Stream* s = stream(h); if (!s) return CUDA_ERROR_INVALID_HANDLE; *f = s->flags; return CUDA_SUCCESS; }
API cuStreamGetId(void* h, uint64_t* id) { *id = (uint64_t)h; return CUDA_SUCCESS; }
API cuCtxGetCurrent(void** c);
API cuStreamGetCtx(void*, void** c) { return cuCtxGetCurrent(c); }
API cuLaunchHostFunc(void* h, void (*f)(void*), void* data) { return submit(h, [=] { f(data); return CUDA_SUCCESS; }); }

// ---- events ------------------------------------------------------------------------------------------------------------
API cuEventCreate(void** e, unsigned flags) { auto* ev = new Event; ev->timed = !(flags & 2); *e = ev; return CUDA_SUCCESS; }
API cuEventDestroy_v2(void* e) { delete (Event*)e; return CUDA_SUCCESS; }
API cuEventRecordWithFlags(void* e, void* h, unsigned) {
    auto* ev = (Event*)e;
    Stream* s = stream(h);
    if (!ev || !s) return CUDA_ERROR_INVALID_HANDLE;
    ev->captured = s->capturing;
    if (s->capturing) return CUDA_SUCCESS;
    ev->when = std::chrono::steady_clock::now();
    ev->recorded = true;
    return sticky();
}
API cuEventRecord(void* e, void* h) { return cuEventRecordWithFlags(e, h, 0); }
API cuEventQuery(void* e) { return ((Event*)e)->captured ? CUDA_ERROR_CAPTURED_EVENT : sticky(); }
API cuEventSynchronize(void* e) { return ((Event*)e)->captured ? CUDA_ERROR_CAPTURED_EVENT : sticky(); }
API cuEventElapsedTime_v2(float* ms, void* a, void* b) {
    auto *x = (Event*)a, *y = (Event*)b;
    if (!x || !y || !x->recorded || !y->recorded || !x->timed || !y->timed) return CUDA_ERROR_INVALID_HANDLE;
    *ms = std::chrono::duration<float, std::milli>(y->when - x->when).count();
    return sticky();
}
API cuEventElapsedTime(float* ms, void* a, void* b) { return cuEventElapsedTime_v2(ms, a, b); }
API cuStreamWaitEvent(void* h, void* e, unsigned) {
    Stream* s = stream(h);
    auto* ev = (Event*)e;
    if (!s || !ev) return CUDA_ERROR_INVALID_HANDLE;
    if (ev->captured && !s->capturing) s->capturing = ev->captured;                 // joins the capture
    else if (s->capturing && !ev->captured && ev->recorded) { s->capturing->invalid = true; return CUDA_ERROR_STREAM_CAPTURE_ISOLATION; }
    return CUDA_SUCCESS;
}

// ---- capture -----------------------------------------------------------------------------------------------------------
API cuStreamBeginCapture_v2(void* h, int mode) {
    Stream* s = stream(h);
    if (!s) return CUDA_ERROR_INVALID_HANDLE;
    if (h == nullptr || h == (void*)1) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;   // never the legacy stream
    if (s->capturing) return CUDA_ERROR_ILLEGAL_STATE;
    s->capturing = new Graph;
    s->origin = true;
    s->mode = mode;
    if (mode != 2) ++capturing_here;                                                // CU_STREAM_CAPTURE_MODE_RELAXED
    return CUDA_SUCCESS;
}
API cuStreamEndCapture(void* h, void** out) {
    Stream* s = stream(h);
    *out = nullptr;
    if (!s) return CUDA_ERROR_INVALID_HANDLE;
    if (!s->capturing) return CUDA_ERROR_ILLEGAL_STATE;
    if (!s->origin) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    Graph* g = s->capturing;
    if (s->mode != 2) --capturing_here;
    {
        std::lock_guard<std::mutex> lock(streams_mutex);
        for (Stream* other : streams) if (other->capturing == g) { other->capturing = nullptr; other->origin = false; }
    }
    s->capturing = nullptr;
    s->origin = false;
    if (g->invalid) { delete g; return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED; }
    *out = g;
    return CUDA_SUCCESS;
}
API cuStreamIsCapturing(void* h, int* status) {
    Stream* s = stream(h);
    if (!s) return CUDA_ERROR_INVALID_HANDLE;
    *status = !s->capturing ? 0 : s->capturing->invalid ? 2 : 1;
    return CUDA_SUCCESS;
}
API cuStreamGetCaptureInfo_v2(void* h, int* status, uint64_t* id, void** graph, const void** deps, size_t* n) {
    CUresult e = cuStreamIsCapturing(h, status);
    if (e) return e;
    Graph* g = stream(h)->capturing;
    if (id) *id = (uint64_t)g;
    if (graph) *graph = g;
    if (deps) *deps = nullptr;
    if (n) *n = 0;
    return CUDA_SUCCESS;
}
API cuThreadExchangeStreamCaptureMode(int* mode) { *mode = 0; return CUDA_SUCCESS; }
API cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) { *exec = new Graph(*(Graph*)graph); return CUDA_SUCCESS; }
API cuGraphClone(void** out, void* graph) { *out = new Graph(*(Graph*)graph); return CUDA_SUCCESS; }
API cuGraphUpload(void*, void*) { return CUDA_SUCCESS; }
API cuGraphLaunch(void* exec, void* h) {
    auto* g = (Graph*)exec;
    return submit(h, [g] {
        for (auto& op : g->ops) if (CUresult e = op()) return e;
        return CUresult(CUDA_SUCCESS);
    });
}
API cuGraphExecDestroy(void* exec) { delete (Graph*)exec; return CUDA_SUCCESS; }
API cuGraphDestroy(void* graph) { delete (Graph*)graph; return CUDA_SUCCESS; }
API cuGraphGetNodes(void* graph, void** nodes, size_t* n) {
    if (nodes) return unimplemented("cuGraphGetNodes with a list");
    *n = ((Graph*)graph)->ops.size();
    return CUDA_SUCCESS;
}
