#pragma once
#include "state.hpp"

namespace emu {
MBar& bar_at(uint64_t* p, const char* op, Site at);
void phase_check(MBar&);        // after an arrival or bytes
}  // namespace emu
