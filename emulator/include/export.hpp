// Makes kernels launchable by name: EMU_EXPORT(gemm_sm80);
#pragma once
#include <stddef.h>
#include <type_traits>
#include <utility>
#include "device.hpp"

namespace emu {
void add_kernel(const char* name, void (*entry)(void** params), size_t param_count);

template <auto K> struct Entry_;
template <class... P, void (*K)(P...)> struct Entry_<K> {
    template <size_t... I> static void call(void** p, std::index_sequence<I...>) { K(*static_cast<std::remove_cv_t<P>*>(p[I])...); }
    static void run(void** p) { call(p, std::index_sequence_for<P...>{}); }
    static constexpr size_t count = sizeof...(P);
};
template <auto K> inline bool export_as(const char* name) { add_kernel(name, &Entry_<K>::run, Entry_<K>::count); return true; }
}  // namespace emu
#define EMU_EXPORT(kernel) static const bool exported_##kernel = emu::export_as<&kernel>(#kernel)
