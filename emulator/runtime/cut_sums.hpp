// What tensor cores make of a sum: they do not round it. Products of a group and the accumulator are brought to the largest exponent among
// them, with some bits below f32's last, what is further below is cut off, and the sum is cut off to f32. Khattak and Mikaitis 2025,
// "Accurate models of NVIDIA tensor cores", arXiv:2512.07004: groups of 8 products of 16 bits and one extra bit on the A100, of 16 and two on
// the H100; of TF32 half as many. Not modelled: the largest exponent is that of the products themselves, where the hardware adds the factors'
// exponents, which may be one less; signed zeros; overflow of products.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "clock.hpp"

namespace emu {

// c [m][n] += a [m][depth] b [depth][n]; products must be exact in f32. `group` products of 16 bits at a time.
EMU_SIMD static void cut_products(float* c, const float* a, const float* b, int m, int n, int depth, int group, int extra_bits) {
    for (int i = 0; i < m; ++i)
        for (int first = 0; first < depth; first += group)
            for (int j = 0; j < n; ++j) {
                float& sum = c[i * n + j];
                float largest = std::fabs(sum), plain = sum;
                for (int k = first; k < first + group; ++k) {
                    const float p = a[i * depth + k] * b[k * n + j];
                    largest = std::fabs(p) > largest ? std::fabs(p) : largest;
                    plain += p;
                }
                uint32_t bits;
                std::memcpy(&bits, &plain, 4);
                if ((bits & 0x7f800000) == 0x7f800000 || largest == 0) { sum = plain; continue; }   // not finite, or nothing
                std::memcpy(&bits, &largest, 4);
                bits &= 0x7f800000;                          // 2^exponent; 0 for subnormals, which have that of the least normal number
                float power;
                std::memcpy(&power, &bits, 4);
                const double unit = (power > 0 ? double(power) : 0x1p-126) / double(1 << (23 + extra_bits));
                double exact = std::trunc(double(sum) / unit);
                for (int k = first; k < first + group; ++k) exact += std::trunc(double(a[i * depth + k] * b[k * n + j]) / unit);
                exact *= unit;
                float result = float(exact);
                if (std::fabs(double(result)) > std::fabs(exact)) result = std::nextafterf(result, 0.0f);
                sum = result;
            }
}

}  // namespace emu
