// The second way to a kernel: the PTX that nvcc or NVRTC emitted, decoded once and interpreted by each thread on the same functional
// SM. So the inline assembly of kernels/prim and the compiler's work are tested as well.
#pragma once
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../include/binary16.hpp"
#include "../include/host.hpp"

namespace emu::ptx {

using Reg = uint64_t;
using Str = std::string;

template <class T> inline T as(Reg r) { T t; std::memcpy(&t, &r, sizeof t); return t; }
template <class T> inline Reg reg(T t) { Reg r = 0; std::memcpy(&r, &t, sizeof t); return r; }

struct Ins;
struct Program;
struct Thread;
using Exec = void (*)(Thread&, const Ins&);

struct Call { Str name; const Program* callee = nullptr; std::vector<int> arguments, results; };   // offsets in the caller's parameter block
struct More {                                        // what few instructions have
    std::vector<int> v0, v1, v2, v3;                 // slots
    std::vector<Str> labels;
    std::vector<int> targets;
    Call call;
    uint64_t used = ~0ull;                           // bytes of a vector access that count
};
struct Ins {
    Exec exec = nullptr;
    int pred = -1;                                   // slot of the guard
    bool negate = false;
    int d = -1, a = -1, b = -1, c = -1, e = -1;      // slots
    int n = 0, k = 0, target = -1;
    int64_t off = 0;
    std::shared_ptr<More> more;
    Site at{"", 0};
};
struct Variable { int offset, bytes; };
struct Program {
    Str name;
    std::vector<Ins> code;
    std::vector<Reg> constants;                      // the first slots
    int registers = 0;                               // all slots
    std::map<Str, Variable> variables;               // of the parameter block: parameters, results, arguments of calls
    std::vector<Str> parameters, results;
    int block_bytes = 0, local_bytes = 0, max_threads = 0, min_blocks = 0;
    dim3 cluster = dim3(0, 0, 0);                    // 0: the launch says
    bool entry = false, broken = false;
};
struct Accumulator { const std::vector<int>* slots; std::vector<float> value; bool dirty = false; };
struct Thread {
    Reg* r;
    const Program* p;
    char *block, *local;                             // parameters; the stack frame
    int pc = 0;
    bool done = false;
    int failed_at = -1;                              // the mbarrier.try_wait that failed last
    bool carry = false;
    std::vector<std::unique_ptr<Accumulator>> accumulators;
};
void execute(Thread&);
void call(Thread&, const Ins&);

// An opcode's parts. What nobody took is a modifier that nobody understands.
struct Opcode {
    std::vector<Str> parts;
    std::vector<bool> taken;
    explicit Opcode(const Str&);
    const Str& op() const { return parts[0]; }
    bool take(const char* part);
    void take_all(std::initializer_list<const char*> parts) { for (auto p : parts) take(p); }
    Str take_last();                                 // the type
    bool is(const char* begin) const;                // whether the text begins so
    bool finished() const;
    Str text;
};

struct Parser {
    Program p;
    std::map<Reg, int> constant;                     // value: slot; registers follow, numbered from kFirstRegister until the end
    std::map<Str, int> slots;
    std::vector<std::map<Str, Str>> scopes;          // names declared in nested blocks, as inline assembly does
    std::vector<std::pair<Str, int>> ranges;         // .reg .b32 %r<10>
    const std::map<Str, Reg>* symbols = nullptr;     // of the module: shared memory
    std::map<Str, std::vector<Str>> tables;          // .branchtargets
    std::map<Str, int> labels, locals;
    uint64_t used = ~0ull;                           // of the pragma before this instruction
    int registers = 0, scope_count = 0;
    Str error;

    Str resolve(const Str& name) const;
    int value(Reg);                                  // slot of a constant
    int fresh();                                     // a register of no name
    int slot(const Str& operand);                    // -1 and an error where it is neither register nor number nor symbol
    int predicate(const Str& operand, bool& negate);
    std::vector<int> list(const Str& braces);
    std::vector<int> vector(const Str& operand);     // {a, b} or a
    // [reg], [reg+8], [symbol+4], [8], [reg, {x, y}]: base slot (or -1 for none), offset, coordinates in v0
    void address(Ins&, const Str& operand, int& base);
    int plain_address(const Str& operand);           // without an offset
    bool local_variable(const Str& operand, const Variable** v, int64_t& offset) const;
    void fail(const Str& why) { if (error.empty()) error = why; }
};

More& more(Ins&);
std::vector<Str> split(const Str&, char by);
int width(const Str& type);                          // bytes, 0 if it is none

// Each decodes what it knows; false: not mine, or not understood.
using Operands = std::vector<Str>;
bool decode_arithmetic(Parser&, Ins&, Opcode&, const Operands&);
bool decode_convert(Parser&, Ins&, Opcode&, const Operands&);
bool decode_memory(Parser&, Ins&, Opcode&, const Operands&);
bool decode_warp(Parser&, Ins&, Opcode&, const Operands&);
bool decode_async(Parser&, Ins&, Opcode&, const Operands&);
bool decode_copy(Parser&, Ins&, Opcode&, const Operands&);
bool decode_cluster(Parser&, Ins&, Opcode&, const Operands&);
Exec cluster_register(const Str& name);              // %cluster...; null if it is none

// An address of .shared::cta; one of .shared::cluster may be another block's, which smem_pointer takes too.
inline void* own_shared(uint32_t address, Site at) {
    if (address >> kRankShift) trap("an address outside the block's own shared memory", at);
    return smem_pointer(address);
}

#define RUN []([[maybe_unused]] Thread & t, [[maybe_unused]] const Ins& i)
#define R(x) t.r[i.x]

}  // namespace emu::ptx
