// Conversions between types.
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "half.hpp"

namespace emu::ptx {
namespace {

enum Mode { kNearest, kZero, kDown, kUp };
struct How { Mode mode = kNearest; bool integral = false, saturate = false; };   // integral: .rni and the like

uint32_t to_tf32(float x) {                                        // ties away from zero
    uint32_t u = as<uint32_t>(reg(x));
    return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & 0xffffe000u;
}

template <class T> T rounded(T x, Mode m) {
    switch (m) {
        case kNearest: return std::nearbyint(x);
        case kZero: return std::trunc(x);
        case kDown: return std::floor(x);
        default: return std::ceil(x);
    }
}
template <class D, class S> D to_integer(S x) {                    // saturates; NaN is 0, or the top bit in 64 bits
    if (x != x) return sizeof(D) == 8 ? D(uint64_t(1) << 63) : D(0);
    if (x <= S(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
    if (x >= S(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
    return D(x);
}
template <class D, class S> [[gnu::noinline]] D directed(S x, Mode m) {
    if (m == kNearest) return D(x);
    const int before = fegetround();
    fesetround(m == kZero ? FE_TOWARDZERO : m == kDown ? FE_DOWNWARD : FE_UPWARD);
    volatile S from = x;
    volatile D to = D(from);
    fesetround(before);
    return to;
}

template <class D, class S> Exec convert() {
    constexpr bool from_float = std::is_floating_point_v<S>, to_float = std::is_floating_point_v<D>;
    if constexpr (from_float && !to_float) return RUN { R(d) = reg<D>(to_integer<D, S>(rounded(as<S>(R(a)), Mode(i.n)))); };
    else if constexpr (from_float && to_float)
        return RUN {
            S x = as<S>(R(a));
            if (i.k & 1) x = rounded(x, Mode(i.n));
            D y = i.k & 1 ? D(x) : directed<D, S>(x, Mode(i.n));
            if (i.k & 2) y = y != y || y < 0 ? D(0) : y > 1 ? D(1) : y;
            R(d) = reg<D>(y);
        };
    else if constexpr (to_float) return RUN { R(d) = reg<D>(directed<D, S>(as<S>(R(a)), Mode(i.n))); };
    else if constexpr (std::is_signed_v<S>)
        return RUN {
            int64_t x = as<S>(R(a));
            if (i.k & 2) {
                if (x < 0 && !std::is_signed_v<D>) x = 0;
                else if constexpr (sizeof(D) < 8) x = std::min<int64_t>(std::max<int64_t>(x, std::numeric_limits<D>::min()), std::numeric_limits<D>::max());
            }
            R(d) = std::is_signed_v<D> ? Reg(int64_t(D(x))) : Reg(D(x));   // signed ones may lie in a wider register
        };
    else
        return RUN {
            uint64_t x = as<S>(R(a));
            if (i.k & 2) x = std::min<uint64_t>(x, uint64_t(std::numeric_limits<D>::max()));
            R(d) = std::is_signed_v<D> ? Reg(int64_t(D(x))) : Reg(D(x));
        };
}
template <class D> Exec convert_from(const Str& s) {
    if (s == "s8") return convert<D, int8_t>();
    if (s == "u8") return convert<D, uint8_t>();
    if (s == "s16") return convert<D, int16_t>();
    if (s == "u16") return convert<D, uint16_t>();
    if (s == "s32") return convert<D, int32_t>();
    if (s == "u32") return convert<D, uint32_t>();
    if (s == "s64") return convert<D, int64_t>();
    if (s == "u64") return convert<D, uint64_t>();
    if (s == "f32") return convert<D, float>();
    if (s == "f64") return convert<D, double>();
    return nullptr;
}
Exec convert_to(const Str& d, const Str& s) {
    if (d == "s8") return convert_from<int8_t>(s);
    if (d == "u8") return convert_from<uint8_t>(s);
    if (d == "s16") return convert_from<int16_t>(s);
    if (d == "u16") return convert_from<uint16_t>(s);
    if (d == "s32") return convert_from<int32_t>(s);
    if (d == "u32") return convert_from<uint32_t>(s);
    if (d == "s64") return convert_from<int64_t>(s);
    if (d == "u64") return convert_from<uint64_t>(s);
    if (d == "f32") return convert_from<float>(s);
    if (d == "f64") return convert_from<double>(s);
    return nullptr;
}
Exec half(const Str& to, const Str& from, bool nearest) {          // the pairs of 16-bit types that kernels use
    if (from == "f16" && to == "f32") return RUN { R(d) = reg<float>(as<F16>(R(a))); };
    if (from == "bf16" && to == "f32") return RUN { R(d) = reg<float>(as<BF16>(R(a))); };
    if (!nearest || from != "f32") return nullptr;
    if (to == "f16") return RUN { R(d) = F16(as<float>(R(a))).bits; };
    if (to == "bf16") return RUN { R(d) = BF16(as<float>(R(a))).bits; };
    if (to == "f16x2") return RUN { R(d) = F16(as<float>(R(b))).bits | uint32_t(F16(as<float>(R(a))).bits) << 16; };
    if (to == "bf16x2") return RUN { R(d) = BF16(as<float>(R(b))).bits | uint32_t(BF16(as<float>(R(a))).bits) << 16; };
    return nullptr;
}
}  // namespace

bool decode_convert(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    if (o.op() != "cvt" || x.size() < 2 || x.size() > 3) return false;
    const Str from = o.take_last(), to = o.take_last();
    i.d = P.slot(x[0]);
    i.a = P.slot(x[1]);
    if (x.size() == 3) i.b = P.slot(x[2]);
    if (from == "f32" && to == "tf32" && o.take("rna")) { i.exec = RUN { R(d) = to_tf32(as<float>(R(a))); }; return true; }
    const char* modes[] = {"n", "z", "m", "p"};
    int given = 0;
    for (int m = 0; m < 4; ++m) {
        if (o.take((Str("r") + modes[m]).c_str())) { i.n = m; ++given; }
        if (o.take((Str("r") + modes[m] + "i").c_str())) { i.n = m; i.k |= 1; ++given; }
    }
    if (given > 1) return false;
    if (to.find("16") != Str::npos && to.find('f') != Str::npos) { i.exec = half(to, from, given == 1 && i.n == kNearest && !i.k); return i.exec && (x.size() == 3) == (to.back() == '2' && to.find('x') != Str::npos); }
    if (from == "f16" || from == "bf16") { i.exec = half(to, from, false); return i.exec; }
    if (o.take("sat")) i.k |= 2;
    if (x.size() != 2) return false;
    i.exec = convert_to(to, from);
    return i.exec;
}

}  // namespace emu::ptx
