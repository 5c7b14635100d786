// The EMU_* variables. A value that is not understood ends the process: a test must not run under other settings than it was told.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "../include/host.hpp"

extern char** environ;

namespace emu {
namespace {

[[noreturn]] void refuse(const char* name, const char* value, const char* wanted) {
    fprintf(stderr, "emulator: %s=%s: %s is wanted\n", name, value, wanted);
    exit(1);
}
int choice(const char* name, std::initializer_list<const char*> words, const char* wanted) {
    const char* value = getenv(name);
    if (!value) return 0;
    int k = 0;
    for (const char* word : words) {
        if (!strcmp(value, word)) return k;
        ++k;
    }
    refuse(name, value, wanted);
}
uint64_t number(const char* name, uint64_t otherwise, uint64_t least, uint64_t most, const char* wanted) {
    const char* value = getenv(name);
    if (!value) return otherwise;
    char* end;
    const uint64_t n = strtoull(value, &end, 10);
    if (*value < '0' || *value > '9' || *end || n < least || n > most) refuse(name, value, wanted);
    return n;
}
void check_names() {
    const char* known[] = {"EMU_DEVICE", "EMU_SMS", "EMU_ORDER", "EMU_ASYNC", "EMU_SEED", "EMU_WORKERS", "EMU_CHECK", "EMU_BANKS", "EMU_CUT", "EMU_SPIN_SECONDS",
                           "EMU_PTX", "EMU_LIBRARY_DIR", "EMU_OUT"};
    for (char** e = environ; e && *e; ++e) {
        if (strncmp(*e, "EMU_", 4)) continue;
        const size_t length = strcspn(*e, "=");
        bool is = false;
        for (const char* name : known) is = is || (strlen(name) == length && !strncmp(*e, name, length));
        if (!is) refuse(std::string(*e, length).c_str(), (*e)[length] ? *e + length + 1 : "", "a variable that the README lists");
    }
}
}  // namespace

Options options_from_env() {
    check_names();
    if (const char* files = getenv("EMU_PTX"); files && !*files) refuse("EMU_PTX", files, "a list of files, by colons,");
    Options o;
    o.order = Schedule(choice("EMU_ORDER", {"forward", "reverse", "random"}, "forward, reverse or random"));
    o.async = Async(choice("EMU_ASYNC", {"lazy", "eager", "random"}, "lazy, eager or random"));
    o.seed = number("EMU_SEED", o.seed, 0, ~0ull, "a number");
    o.workers = int(number("EMU_WORKERS", uint64_t(o.workers), 1, 1024, "a number of threads"));
    o.check = number("EMU_CHECK", o.check, 0, 1, "0 or 1");
    o.banks = number("EMU_BANKS", o.banks, 0, 1, "0 or 1");
    o.cut = number("EMU_CUT", o.cut, 0, 1, "0 or 1");
    o.spin_seconds = int(number("EMU_SPIN_SECONDS", uint64_t(o.spin_seconds), 0, 1 << 20, "a number of seconds"));
    return o;
}
int multiprocessors_from_env() { return int(number("EMU_SMS", 0, 1, 1024, "a number of multiprocessors")); }

}  // namespace emu
