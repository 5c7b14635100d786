// 16-bit floats as registers hold them. From f32 to nearest, ties to even; NaN is 0x7fff.
#pragma once
#include "program.hpp"

namespace emu::ptx {

struct F16 {
    uint16_t bits;
    F16() = default;
    explicit F16(float x) : bits(x != x ? uint16_t(0x7fff) : as<uint16_t>(reg(Binary16(x)))) {}
    operator float() const { return float(as<Binary16>(bits)); }
};
struct BF16 {
    uint16_t bits;
    BF16() = default;
    explicit BF16(float x) {
        const uint32_t u = as<uint32_t>(reg(x));
        bits = x != x ? uint16_t(0x7fff) : uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
    }
    operator float() const { return as<float>(Reg(bits) << 16); }
};

}  // namespace emu::ptx
