// NVRTC without a compiler: the result of "compiling" only names the program and its options; loading it finds the kernels that
// the emulator was built with. A library of its own, as the real one.
#include <cstdio>
#include <cstring>
#include <string>

#define API extern "C" __attribute__((visibility("default"))) int
namespace {
enum { OK = 0, INVALID_INPUT = 3, INVALID_PROGRAM = 4, NOT_IMPLEMENTED = 11 };      // 11: NVRTC_ERROR_INTERNAL_ERROR
struct Program { std::string name, image, log; };

int unimplemented(const char* name) { fprintf(stderr, "emulated NVRTC: %s is not implemented\n", name); return NOT_IMPLEMENTED; }
}  // namespace

API nvrtcVersion(int* major, int* minor) { *major = 13; *minor = 0; return OK; }
API nvrtcGetNumSupportedArchs(int* n) { *n = 5; return OK; }
API nvrtcGetSupportedArchs(int* a) { const int all[] = {80, 86, 89, 90, 120}; std::memcpy(a, all, sizeof all); return OK; }
extern "C" __attribute__((visibility("default"))) const char* nvrtcGetErrorString(int e) {
    switch (e) {
        case OK: return "NVRTC_SUCCESS";
        case INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
        case INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
        case 6: return "NVRTC_ERROR_COMPILATION";
    }
    return "NVRTC_ERROR_INTERNAL_ERROR (the emulator says which call on stderr)";
}
API nvrtcCreateProgram(void** out, const char* source, const char* name, int, const char* const*, const char* const*) {
    if (!source) return INVALID_INPUT;
    auto* p = new Program;
    p->name = name ? name : "default_program";
    *out = p;
    return OK;
}
API nvrtcDestroyProgram(void** p) { delete (Program*)*p; *p = nullptr; return OK; }
API nvrtcCompileProgram(void* handle, int n, const char* const* options) {
    auto* p = (Program*)handle;
    if (!p) return INVALID_PROGRAM;
    p->image = "EMULATED NVRTC " + p->name;
    for (int i = 0; i < n; ++i) { p->image += ' '; p->image += options[i]; }
    p->image += '\n';
    p->image += '\0';
    return OK;
}
#define RESULT(what)                                                                                              \
    API nvrtcGet##what##Size(void* p, size_t* n) { *n = ((Program*)p)->image.size(); return OK; }                 \
    API nvrtcGet##what(void* p, char* to) { auto& s = ((Program*)p)->image; std::memcpy(to, s.data(), s.size()); return OK; }
RESULT(PTX)
RESULT(CUBIN)
API nvrtcGetProgramLogSize(void* p, size_t* n) { *n = ((Program*)p)->log.size() + 1; return OK; }
API nvrtcGetProgramLog(void* p, char* to) { auto& s = ((Program*)p)->log; std::memcpy(to, s.c_str(), s.size() + 1); return OK; }
API nvrtcAddNameExpression(void*, const char*) { return unimplemented("nvrtcAddNameExpression"); }
API nvrtcGetLoweredName(void*, const char*, const char**) { return unimplemented("nvrtcGetLoweredName"); }
API nvrtcGetLTOIRSize(void*, size_t*) { return unimplemented("nvrtcGetLTOIRSize"); }
API nvrtcGetLTOIR(void*, char*) { return unimplemented("nvrtcGetLTOIR"); }
API nvrtcGetOptiXIRSize(void*, size_t*) { return unimplemented("nvrtcGetOptiXIRSize"); }
API nvrtcGetOptiXIR(void*, char*) { return unimplemented("nvrtcGetOptiXIR"); }
