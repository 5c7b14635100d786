// Makes kernels launchable by name: EMU_EXPORT(lce_name, launch bounds...);
#pragma once
#include <stddef.h>
#include <type_traits>
#include <utility>
#include "device.hpp"

namespace emu {
// bounds: of __launch_bounds__, most threads a block and least blocks an SM, 0 where unsaid
void add_kernel(const char* name, void (*entry)(void** params), const size_t* param_sizes, size_t params, const int* bounds);
void add_cluster(const char* name, dim3 cluster);          // of __cluster_dims__

template <auto K> struct Entry_;
template <class... P, void (*K)(P...)> struct Entry_<K> {
    template <size_t... I> static void call(void** p, std::index_sequence<I...>) { K(*static_cast<std::remove_cv_t<P>*>(p[I])...); }
    static void run(void** p) { call(p, std::index_sequence_for<P...>{}); }
    static bool add(const char* name, const int (&bounds)[3]) {
        const size_t sizes[] = {sizeof(P)..., 0};
        add_kernel(name, &run, sizes, sizeof...(P), bounds);
        return true;
    }
};
}  // namespace emu
#define EMU_EXPORT(kernel, ...)                                \
    static constexpr int bounds_##kernel[3] = {__VA_ARGS__};   \
    static const bool exported_##kernel = emu::Entry_<&kernel>::add(#kernel, bounds_##kernel)
#define EMU_CLUSTER(kernel, ...) static const bool clustered_##kernel = (emu::add_cluster(#kernel, dim3(__VA_ARGS__)), true)
