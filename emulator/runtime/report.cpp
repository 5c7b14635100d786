// What was found, where, by whom.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>

#include "state.hpp"

namespace emu {

bool (*locate)(const void*, Site*) = nullptr;
bool instrumented = false;

static std::string leaf(const std::string& s) {
    auto slash = s.rfind('/');
    return slash == s.npos ? s : s.substr(slash + 1);
}
std::string where(Site s) { return leaf(s.file) + (s.line ? ":" + std::to_string(s.line) : ""); }
std::string where(const void* pc) {
    Site site{"", 0};
    if (locate && locate(pc, &site)) return where(site);
    char buf[512];
    Dl_info info{};
    if (!pc || !dladdr(pc, &info) || !info.dli_fname) return "";
    static std::mutex m;
    static std::map<const void*, std::string> cache;
    std::lock_guard<std::mutex> lock(m);
    auto& s = cache[pc];
    if (!s.empty()) return s;
    snprintf(buf, sizeof buf, "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname, size_t((const char*)pc - (const char*)info.dli_fbase - 1));
    if (FILE* p = popen(buf, "r")) {
        if (fgets(buf, sizeof buf, p)) { s = buf; while (!s.empty() && s.back() == '\n') s.pop_back(); }
        pclose(p);
    }
    if (auto note = s.find(" (discriminator"); note != s.npos) s.resize(note);
    if (s.empty()) s = "?";
    return s = leaf(s);
}

std::string who_name(int who) {
    Block* home = block_of_thread(who);
    Cta& c = home->cta;
    std::string other;
    if (me->worker->size > 1) other = " of block (" + std::to_string(c.block.x) + "," + std::to_string(c.block.y) + "," + std::to_string(c.block.z) + ")";
    if (who - c.base < c.threads) return "thread " + std::to_string(who - c.base) + other;
    for (auto& b : c.mbars) if (b.who == who) return "TMA(mbarrier@" + std::to_string(b.addr - kSmemBase) + ")" + other;
    for (size_t g = 0; g < c.wgs.size(); ++g) if (c.wgs[g].who == who) return "wgmma(warpgroup " + std::to_string(g) + ")" + other;
    return "bulk store" + other;
}

void report(const char* kind, const Loc& loc, const char* fmt, ...) {
    Launch& L = *me->launch;
    char msg[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    std::string at = loc.str();
    std::lock_guard<std::mutex> lock(L.mutex);
    if (L.reports >= L.opt.max_reports) { L.stop = true; return; }
    if (!L.seen.insert(kind + at).second) return;   // one per kind and line
    ++L.reports;
    char head[160];
    const Fiber* f = self();
    const uint3& b = f ? f->home->cta.block : me->cta.block;
    if (f) snprintf(head, sizeof head, "[%s] block (%u,%u,%u) thread %d at ", kind, b.x, b.y, b.z, f->id);
    else snprintf(head, sizeof head, "[%s] block (%u,%u,%u) at ", kind, b.x, b.y, b.z);
    L.text += head + at + ": " + msg + "\n";
}

void trap(const char* what, Site at) { report("trap", at, "%s", what); abandon(); }
void undefined(const char* what, const char* file, int line) {
    if (!me || !self()) { fprintf(stderr, "%s:%d: %s\n", file, line, what); return; }
    report("undefined behaviour", Site{file, line}, "%s", what);
}

}  // namespace emu
