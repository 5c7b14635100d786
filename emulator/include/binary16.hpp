// The compiler's type of IEEE binary16, for conversions alone.
#pragma once

namespace emu {
#if defined(__aarch64__)
using Binary16 = __fp16;                             // g++ before 13 has _Float16 in C only there
#else
using Binary16 = _Float16;
#endif
}
