// Arithmetic, comparisons, bits. Integer division by zero gives ones, as ptxas's code does; shifts saturate.
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "half.hpp"

namespace emu::ptx {
namespace {

#define BY_INTEGER(t, f)                                                   \
    (t == "s16"                 ? f<int16_t>                               \
     : t == "u16" || t == "b16" ? f<uint16_t>                              \
     : t == "s32"               ? f<int32_t>                               \
     : t == "u32" || t == "b32" ? f<uint32_t>                              \
     : t == "s64"               ? f<int64_t>                               \
                                : f<uint64_t>)
bool integer_type(const Str& t) { return width(t) >= 2 && t[0] != 'f'; }

template <class T> T quotient(T a, T b) {
    if (b == 0) return T(-1);
    if constexpr (std::is_signed_v<T>) if (b == -1) return T(std::make_unsigned_t<T>(0) - std::make_unsigned_t<T>(a));
    return a / b;
}
template <class T> T remainder(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>) if (b == -1) return 0;
    return a % b;
}
template <class T> T high(T a, T b) {
    using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return T(W(a) * W(b) >> (8 * sizeof(T)));
}
template <class T> using Bits = std::make_unsigned_t<T>;   // sums and products wrap
#define A as<T>(R(a))
#define B as<T>(R(b))
#define C as<T>(R(c))
template <class T> Exec integer(const Str& op) {
    if (op == "add") return RUN { R(d) = reg<T>(T(Bits<T>(A) + Bits<T>(B))); };
    if (op == "sub") return RUN { R(d) = reg<T>(T(Bits<T>(A) - Bits<T>(B))); };
    if (op == "mul") return RUN { R(d) = reg<T>(T(uint64_t(A) * uint64_t(B))); };
    if (op == "mad") return RUN { R(d) = reg<T>(T(uint64_t(A) * uint64_t(B) + uint64_t(C))); };
    if (op == "mul.hi") return RUN { R(d) = reg<T>(high<T>(A, B)); };
    if (op == "mad.hi") return RUN { R(d) = reg<T>(T(Bits<T>(high<T>(A, B)) + Bits<T>(C))); };
    if (op == "div") return RUN { R(d) = reg<T>(quotient<T>(A, B)); };
    if (op == "rem") return RUN { R(d) = reg<T>(remainder<T>(A, B)); };
    if (op == "min") return RUN { R(d) = reg<T>(B < A ? B : A); };
    if (op == "max") return RUN { R(d) = reg<T>(A < B ? B : A); };
    if (op == "neg") return RUN { R(d) = reg<T>(T(Bits<T>(0) - Bits<T>(A))); };
    if (op == "abs") return RUN { R(d) = reg<T>(A < 0 ? T(Bits<T>(0) - Bits<T>(A)) : A); };
    if (op == "and") return RUN { R(d) = reg<T>(T(A & B)); };
    if (op == "or") return RUN { R(d) = reg<T>(T(A | B)); };
    if (op == "xor") return RUN { R(d) = reg<T>(T(A ^ B)); };
    if (op == "not") return RUN { R(d) = reg<T>(T(~A)); };
    if (op == "cnot") return RUN { R(d) = reg<T>(T(A == 0)); };
    if (op == "shl") return RUN { uint32_t n = uint32_t(R(b)); R(d) = n >= sizeof(T) * 8 ? 0 : reg<T>(T(Bits<T>(A) << n)); };
    if (op == "shr") return RUN { uint32_t n = uint32_t(R(b)); R(d) = n < sizeof(T) * 8 ? reg<T>(T(A >> n)) : reg<T>(T(A < 0 ? -1 : 0)); };
    if (op == "add.cc" || op == "addc" || op == "addc.cc") {
        static_assert(sizeof(T) <= 8);
        if (op == "add.cc") return RUN { Bits<T> s = Bits<T>(Bits<T>(A) + Bits<T>(B)); t.carry = s < Bits<T>(A); R(d) = reg(s); };
        if (op == "addc") return RUN { R(d) = reg<T>(T(Bits<T>(A) + Bits<T>(B) + t.carry)); };
        return RUN { unsigned __int128 s = (unsigned __int128)Bits<T>(A) + Bits<T>(B) + t.carry; t.carry = s >> (8 * sizeof(T)); R(d) = reg(Bits<T>(s)); };
    }
    return nullptr;
}
template <class T, class W> Exec wide(bool add) {
    if (add) return RUN { R(d) = reg<W>(W(Bits<W>(W(A) * W(B)) + Bits<W>(as<W>(R(c))))); };
    return RUN { R(d) = reg<W>(W(A) * W(B)); };
}

// Directed rounding, for the few instructions that ask for it.
struct Rounding {
    int before;
    explicit Rounding(int mode) : before(fegetround()) { fesetround(mode); }
    ~Rounding() { fesetround(before); }
};
template <class T> [[gnu::noinline]] T fused(T a, T b, T c, int mode) {
    Rounding r(mode);
    volatile T x = a;
    volatile T result = std::fma(T(x), b, c);
    return result;
}
template <class T> Exec floating(const Str& op) {
    if (op == "add") return RUN { R(d) = reg<T>(A + B); };
    if (op == "sub") return RUN { R(d) = reg<T>(A - B); };
    if (op == "mul") return RUN { R(d) = reg<T>(A * B); };
    if (op == "div") return RUN { R(d) = reg<T>(A / B); };
    if (op == "fma" || op == "mad") return RUN { R(d) = reg<T>(std::fma(A, B, C)); };
    if (op == "min") return RUN { R(d) = reg<T>(std::fmin(A, B)); };
    if (op == "max") return RUN { R(d) = reg<T>(std::fmax(A, B)); };
    if (op == "neg") return RUN { R(d) = reg<T>(-A); };
    if (op == "abs") return RUN { R(d) = reg<T>(std::fabs(A)); };
    if (op == "sqrt") return RUN { R(d) = reg<T>(std::sqrt(A)); };
    if (op == "rcp") return RUN { R(d) = reg<T>(T(1) / A); };
    if (op == "copysign") return RUN { R(d) = reg<T>(std::copysign(B, A)); };
    return nullptr;
}

// ---- comparisons -------------------------------------------------------------------------------------------------------
template <class T> Exec compare(const Str& c) {
    const bool f = !std::is_integral_v<T>;
    if (c == "eq") return RUN { R(d) = A == B; };
    if (c == "ne") return f ? Exec(RUN { R(d) = A < B || A > B; }) : Exec(RUN { R(d) = A != B; });
    if (c == "lt" || (c == "lo" && !f)) return RUN { R(d) = A < B; };
    if (c == "le" || (c == "ls" && !f)) return RUN { R(d) = A <= B; };
    if (c == "gt" || (c == "hi" && !f)) return RUN { R(d) = A > B; };
    if (c == "ge" || (c == "hs" && !f)) return RUN { R(d) = A >= B; };
    if (!f) return nullptr;
    if (c == "equ") return RUN { R(d) = !(A < B || A > B); };
    if (c == "neu") return RUN { R(d) = !(A == B); };
    if (c == "ltu") return RUN { R(d) = !(A >= B); };
    if (c == "leu") return RUN { R(d) = !(A > B); };
    if (c == "gtu") return RUN { R(d) = !(A <= B); };
    if (c == "geu") return RUN { R(d) = !(A < B); };
    if (c == "num") return RUN { R(d) = A == A && B == B; };
    if (c == "nan") return RUN { R(d) = !(A == A && B == B); };
    return nullptr;
}
// A second result or a third operand: the plain comparison, then these.
bool decode_setp(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    Str type = o.take_last();
    char logic = o.take("and") ? '&' : o.take("or") ? '|' : o.take("xor") ? '^' : 0;
    auto results = split(x[0], '|');
    if (o.parts.size() < 3 || x.size() != (logic ? 4u : 3u)) return false;
    Str how = o.parts[1];
    o.take(how.c_str());
    i.d = P.slot(results[0]);
    i.a = P.slot(x[1]);
    i.b = P.slot(x[2]);
    Exec plain = type == "f32" ? compare<float>(how) : type == "f64" ? compare<double>(how) : type == "f16" ? compare<F16>(how)
                     : type == "bf16" ? compare<BF16>(how) : integer_type(type) ? BY_INTEGER(type, compare)(how) : nullptr;
    if (results.size() == 1 && !logic) { i.exec = plain; return plain; }
    static std::vector<Exec>& comparisons = *new std::vector<Exec>;
    i.n = int(comparisons.size());
    comparisons.push_back(plain);
    bool negate = false;
    i.c = logic ? P.predicate(x[3], negate) : P.value(1);
    i.e = results.size() > 1 ? P.slot(results[1]) : P.fresh();
    i.k = (logic ? logic : '&') | negate << 8;
    i.exec = RUN {
        comparisons[i.n](t, i);
        const bool is = R(d), other = (R(c) != 0) != bool(i.k >> 8);
        auto combine = [&](bool v) { switch (i.k & 255) { case '&': return v && other; case '|': return v || other; default: return v != other; } };
        R(d) = combine(is);
        R(e) = combine(!is);
    };
    return plain;
}

// ---- bits --------------------------------------------------------------------------------------------------------------
uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t r = 0;
    for (int k = 0; k < 4; ++k) {
        uint32_t s = selector >> (4 * k);
        uint8_t byte = uint8_t(bytes >> (8 * (s & 7)));
        if (s & 8) byte = byte & 0x80 ? 0xff : 0;
        r |= uint32_t(byte) << (8 * k);
    }
    return r;
}
template <class T> Exec extract() {                                // c bits from position b
    return RUN {
        const int size = 8 * sizeof(T), pos = int(R(b) & 255), len = int(R(c) & 255);
        using U = Bits<T>;
        U v = pos < size ? U(as<U>(R(a)) >> pos) : 0;
        if (len < size) {
            U mask = (U(1) << len) - 1;
            v &= mask;
            if (std::is_signed_v<T> && len) {
                const int top = std::min(pos + len - 1, size - 1);
                if (as<U>(R(a)) >> top & 1) v |= ~mask;
            }
        } else if (std::is_signed_v<T> && pos && (as<U>(R(a)) >> (size - 1) & 1)) v |= pos < size ? U(~U(0)) << (size - pos) : ~U(0);
        R(d) = len ? reg<U>(v) : 0;
    };
}
template <class T> Exec insert() {
    return RUN {
        const uint32_t pos = uint32_t(R(c) & 255), len = uint32_t(R(e) & 255), size = 8 * sizeof(T);
        T mask = len >= size ? ~T(0) : (T(1) << len) - 1;
        mask = pos >= size ? 0 : T(mask << pos);
        R(d) = reg<T>(T((B & ~mask) | ((pos >= size ? 0 : T(A << pos)) & mask)));
    };
}
template <class T> Exec find_top(bool shift) {
    if (shift) return RUN {
        T v = std::is_signed_v<T> && A < 0 ? T(~A) : A;
        R(d) = v ? uint32_t(__builtin_clzll(uint64_t(Bits<T>(v))) - (64 - 8 * int(sizeof(T)))) : ~0u;
    };
    return RUN {
        T v = std::is_signed_v<T> && A < 0 ? T(~A) : A;
        R(d) = v ? uint32_t(63 - __builtin_clzll(uint64_t(Bits<T>(v)))) : ~0u;
    };
}
uint32_t reversed(uint32_t x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
bool decode_bits(Parser&, Ins& i, Opcode& o, const Str& type) {
    const Str& op = o.op();
    const bool wide = type == "b64" || type == "u64" || type == "s64";
    if (op == "popc") i.exec = wide ? Exec(RUN { R(d) = uint32_t(__builtin_popcountll(R(a))); }) : Exec(RUN { R(d) = uint32_t(__builtin_popcount(uint32_t(R(a)))); });
    else if (op == "clz") i.exec = wide ? Exec(RUN { R(d) = R(a) ? uint32_t(__builtin_clzll(R(a))) : 64u; }) : Exec(RUN { uint32_t v = uint32_t(R(a)); R(d) = v ? uint32_t(__builtin_clz(v)) : 32u; });
    else if (op == "brev") i.exec = wide ? Exec(RUN { R(d) = Reg(reversed(uint32_t(R(a)))) << 32 | reversed(uint32_t(R(a) >> 32)); }) : Exec(RUN { R(d) = reversed(uint32_t(R(a))); });
    else if (op == "bfi") i.exec = wide ? insert<uint64_t>() : insert<uint32_t>();
    else if (op == "bfe") i.exec = BY_INTEGER(type, extract)();
    else if (op == "bfind") i.exec = BY_INTEGER(type, find_top)(o.take("shiftamt"));
    else if (op == "prmt") i.exec = RUN { R(d) = permute(uint32_t(R(a)), uint32_t(R(b)), uint32_t(R(c))); };
    else if (op == "lop3") i.exec = RUN {
        uint32_t x = uint32_t(R(a)), y = uint32_t(R(b)), z = uint32_t(R(c)), f = uint32_t(R(e)), r = 0;
        for (int k = 0; k < 8; ++k) if (f >> k & 1) r |= (k & 4 ? x : ~x) & (k & 2 ? y : ~y) & (k & 1 ? z : ~z);
        R(d) = r;
    };
    else if (op == "shf") {                                        // of b:a, by c
        const bool left = o.take("l"), wrap = o.take("wrap");
        if (left ? false : !o.take("r")) return false;
        if (!wrap && !o.take("clamp")) return false;
        i.n = wrap;
        if (left) i.exec = RUN { Reg v = uint32_t(R(b)) * (1ull << 32) | uint32_t(R(a)); uint32_t n = uint32_t(R(c)); n = i.n ? n & 31 : std::min(n, 32u); R(d) = uint32_t(n == 32 ? v : v >> (32 - n)); };
        else i.exec = RUN { Reg v = uint32_t(R(b)) * (1ull << 32) | uint32_t(R(a)); uint32_t n = uint32_t(R(c)); n = i.n ? n & 31 : std::min(n, 32u); R(d) = uint32_t(v >> n); };
    }
    return i.exec;
}

// ---- approximations: libm's, a subnormal is zero -----------------------------------------------------------------------
float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
bool decode_approximate(Ins& i, Opcode& o, const Str& type) {
    const Str& op = o.op();
    const bool ftz = o.take("ftz");
    i.k = ftz;
#define APPROXIMATE(name, expression)                                                                                             \
    if (op == name) {                                                                                                             \
        if (ftz) i.exec = RUN { float x = flushed(as<float>(R(a))); R(d) = reg<float>(flushed(expression)); };                   \
        else i.exec = RUN { float x = as<float>(R(a)); R(d) = reg<float>(expression); };                                          \
    }
    if (type == "f32") {
        APPROXIMATE("ex2", std::exp2(x))
        APPROXIMATE("lg2", std::log2(x))
        APPROXIMATE("rcp", 1.0f / x)
        APPROXIMATE("sqrt", std::sqrt(x))
        APPROXIMATE("rsqrt", 1.0f / std::sqrt(x))
        APPROXIMATE("sin", std::sin(x))
        APPROXIMATE("cos", std::cos(x))
        if (op == "tanh" && !ftz) i.exec = RUN { R(d) = reg<float>(std::tanh(as<float>(R(a)))); };
        if (op == "div" && !ftz) i.exec = RUN { R(d) = reg<float>(as<float>(R(a)) / as<float>(R(b))); };
    }
    // The high word, the low one is zero: where Newton's iterations start.
    if (type == "f64" && ftz && op == "rcp") i.exec = RUN { R(d) = reg<double>(1.0 / as<double>(R(a))) & ~0xffffffffull; };
    if (type == "f64" && ftz && op == "rsqrt") i.exec = RUN { R(d) = reg<double>(1.0 / std::sqrt(as<double>(R(a)))) & ~0xffffffffull; };
    return i.exec;
}

// ---- 16-bit floats, alone and in pairs ------------------------------------------------------------------------------------
// a b + c to odd: where f32 does not hold it, the neighbour whose last bit is set. Of 24 such bits, 11 or 8 round as all of them would.
float fused_to_odd(float a, float b, float c) {
    const float below = fused(a, b, c, FE_DOWNWARD), above = fused(a, b, c, FE_UPWARD);
    return reg(below) & 1 ? below : above;
}
float sum(float a, float b, float) { return fused_to_odd(a, 1, b); }
float difference(float a, float b, float) { return fused_to_odd(b, -1, a); }
float times(float a, float b, float) { return fused_to_odd(a, b, -0.0f); }   // -0: the product's sign stays
float least(float a, float b, float) { return a == b && std::signbit(a) ? a : std::fmin(a, b); }
float greatest(float a, float b, float) { return a == b && std::signbit(a) ? b : std::fmax(a, b); }
template <class F, float (*f)(float, float, float)> void each(Thread& t, const Ins& i) {
    uint32_t r = 0;
    for (int low = 0; low < i.n; low += 16) r |= uint32_t(F(f(as<F>(R(a) >> low), as<F>(R(b) >> low), as<F>(R(c) >> low))).bits) << low;
    R(d) = r;
}
template <class F> Exec half(const Str& op) {
    if (op == "add") return each<F, sum>;
    if (op == "sub") return each<F, difference>;
    if (op == "mul") return each<F, times>;
    if (op == "fma") return each<F, fused_to_odd>;
    if (op == "min") return each<F, least>;
    if (op == "max") return each<F, greatest>;
    return nullptr;
}
bool decode_half(Parser& P, Ins& i, Opcode& o, const Str& type) {
    const bool pair = type == "f16x2" || type == "bf16x2";
    if (!pair && type != "f16" && type != "bf16") return false;
    const Str& op = o.op();
    i.n = pair ? 32 : 16;
    if (op == "neg") i.exec = RUN { R(d) = uint32_t(R(a)) ^ (i.n == 32 ? 0x80008000u : 0x8000u); };
    else if (op == "abs") i.exec = RUN { R(d) = uint32_t(R(a)) & (i.n == 32 ? 0x7fff7fffu : 0x7fffu); };
    else {
        if (op != "min" && op != "max") o.take("rn");
        if (op != "fma") i.c = P.value(0);
        i.exec = type[0] == 'b' ? half<BF16>(op) : half<F16>(op);
    }
    return i.exec;
}
}  // namespace

bool decode_arithmetic(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    const Str& op = o.op();
    for (auto& operand : x) if (operand[0] == '[' || operand[0] == '{') return false;
    if (op == "setp") return decode_setp(P, i, o, x);
    if (op == "createpolicy") {                      // a hint for the cache
        for (size_t k = 1; k < o.taken.size(); ++k) o.taken[k] = true;
        i.d = P.slot(x.at(0));
        i.exec = RUN { R(d) = 0; };
        return true;
    }
    const Str type = o.take_last();
    if (op == "selp") {
        if (x.size() != 4 || (!width(type) && type != "f16")) return false;
        bool negate;
        i.d = P.slot(x[0]); i.a = P.slot(x[1]); i.b = P.slot(x[2]); i.c = P.predicate(x[3], negate);
        if (negate) std::swap(i.a, i.b);
        i.exec = RUN { R(d) = R(c) ? R(a) : R(b); };
        return true;
    }
    if (x.empty() || x.size() > 5) return false;
    i.d = P.slot(x[0]);
    int* slots[] = {&i.a, &i.b, &i.c, &i.e};
    for (size_t k = 1; k < x.size(); ++k) *slots[k - 1] = P.slot(x[k]);
    if (type == "pred") {
        i.exec = op == "and" ? Exec(RUN { R(d) = R(a) && R(b); }) : op == "or" ? Exec(RUN { R(d) = R(a) || R(b); })
               : op == "xor" ? Exec(RUN { R(d) = !R(a) != !R(b); }) : op == "not" ? Exec(RUN { R(d) = !R(a); }) : nullptr;
        return i.exec;
    }
    if (decode_half(P, i, o, type)) return true;
    if (type != "f32" && type != "f64" && !integer_type(type)) return false;
    if (decode_bits(P, i, o, type)) return true;
    if (type[0] == 'f') {
        if (o.take("approx") || (op != "fma" && o.take("full"))) return decode_approximate(i, o, type);
        const bool single = type == "f32";
        if (op == "fma" && (o.take("rm") || o.take("rp") || o.take("rz"))) {
            i.n = o.is("fma.rm") ? FE_DOWNWARD : o.is("fma.rp") ? FE_UPWARD : FE_TOWARDZERO;
            i.exec = single ? Exec(RUN { R(d) = reg<float>(fused(as<float>(R(a)), as<float>(R(b)), as<float>(R(c)), i.n)); })
                            : Exec(RUN { R(d) = reg<double>(fused(as<double>(R(a)), as<double>(R(b)), as<double>(R(c)), i.n)); });
            return true;
        }
        if (op != "min" && op != "max" && op != "neg" && op != "abs" && op != "copysign") o.take("rn");
        i.exec = single ? floating<float>(op) : floating<double>(op);
        return i.exec;
    }
    Str name = op;
    if (op == "mul" || op == "mad") {
        if (o.take("wide")) {
            const bool add = op == "mad";
            i.exec = type == "s32" ? wide<int32_t, int64_t>(add) : type == "u32" ? wide<uint32_t, uint64_t>(add) : type == "s16" ? wide<int16_t, int32_t>(add) : type == "u16" ? wide<uint16_t, uint32_t>(add) : nullptr;
            return i.exec;
        }
        if (o.take("hi")) name += ".hi";
        else if (!o.take("lo")) return false;
    }
    if ((op == "add" || op == "addc") && o.take("cc")) name += ".cc";
    i.exec = BY_INTEGER(type, integer)(name);
    return i.exec;
}

}  // namespace emu::ptx
