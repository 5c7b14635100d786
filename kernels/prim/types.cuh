// Types of both sides, the device's and the emulator's.
#pragma once

namespace prim {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;
using f32 = float;
using f64 = double;

struct bf16 { u16 bits; };
struct f16 { u16 bits; };
struct alignas(16) Vec16 { u32 w[4]; };
struct alignas(64) TensorMap { u64 o[16]; };     // CUtensorMap, opaque

// How a matrix operand lies in memory: its contraction dimension contiguous, or its rows (columns of B).
enum class Major : int { K = 0, MN = 1 };

// How long a copy's lines should stay in the L2 cache: the policies that createpolicy makes for all of an access.
enum class L2 : u64 { Normal = 0x1000000000000000ull, EvictFirst = 0x12F0000000000000ull, EvictLast = 0x14F0000000000000ull };

}  // namespace prim
