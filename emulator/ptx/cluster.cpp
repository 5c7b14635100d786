// Clusters: special registers, addresses in other blocks' shared memory, the barrier.
#include "program.hpp"

namespace emu::ptx {
namespace {

uint3 in_cluster() {                                 // this block's place
    const uint3 n = cluster_dims();
    const uint32_t rank = cluster_rank();
    return {rank % n.x, rank / n.x % n.y, rank / (n.x * n.y)};
}
uint32_t rank_of(uint32_t address) { return address >> kRankShift ? (address >> kRankShift) - 1 : cluster_rank(); }

// Addresses are generic, or of .shared::cluster.
bool decode_address(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    const bool map = o.op() == "mapa", generic = !o.take("shared::cluster");
    const Str type = o.take_last();
    if (x.size() != (map ? 3u : 2u) || (type != "u64" && (generic || type != "u32"))) return false;
    i.d = P.slot(x[0]);
    i.a = P.slot(x[1]);
    if (map) i.b = P.slot(x[2]);
    if (map && generic) i.exec = RUN { R(d) = Reg(map_shared(reinterpret_cast<void*>(R(a)), uint32_t(R(b)), i.at)); };
    else if (map) i.exec = RUN { R(d) = smem_addr(map_shared(smem_pointer(uint32_t(R(a))), uint32_t(R(b)), i.at)); };
    else if (generic) i.exec = RUN { R(d) = rank_of(smem_addr(reinterpret_cast<void*>(R(a)))); };
    else i.exec = RUN { R(d) = rank_of(uint32_t(R(a))); };
    return true;
}
bool decode_cluster_barrier(Ins& i, Opcode& o, const Operands& x) {
    i.n = o.take("aligned");
    if (o.take("arrive")) {
        i.k = !o.take("relaxed");
        if (i.k) o.take("release");
        i.exec = RUN { cluster_arrive(i.k, i.n, i.at); };
    } else if (o.take("wait")) {
        o.take("acquire");
        i.exec = RUN { cluster_wait(i.at); };
    } else return false;
    return x.empty();
}
}  // namespace

Exec cluster_register(const Str& name) {
    static const std::map<Str, Exec> all = {
        {"%cluster_ctarank", RUN { R(d) = cluster_rank(); }}, {"%cluster_nctarank", RUN { R(d) = cluster_size(); }},
        {"%cluster_ctaid.x", RUN { R(d) = in_cluster().x; }}, {"%cluster_ctaid.y", RUN { R(d) = in_cluster().y; }},
        {"%cluster_ctaid.z", RUN { R(d) = in_cluster().z; }}, {"%cluster_nctaid.x", RUN { R(d) = cluster_dims().x; }},
        {"%cluster_nctaid.y", RUN { R(d) = cluster_dims().y; }}, {"%cluster_nctaid.z", RUN { R(d) = cluster_dims().z; }},
        {"%clusterid.x", RUN { R(d) = blockIdx.x / cluster_dims().x; }}, {"%clusterid.y", RUN { R(d) = blockIdx.y / cluster_dims().y; }},
        {"%clusterid.z", RUN { R(d) = blockIdx.z / cluster_dims().z; }}, {"%nclusterid.x", RUN { R(d) = gridDim.x / cluster_dims().x; }},
        {"%nclusterid.y", RUN { R(d) = gridDim.y / cluster_dims().y; }}, {"%nclusterid.z", RUN { R(d) = gridDim.z / cluster_dims().z; }}};
    auto it = all.find(name);
    return it == all.end() ? nullptr : it->second;
}
bool decode_cluster(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    if (o.op() == "mapa" || o.op() == "getctarank") return decode_address(P, i, o, x);
    if (o.op() == "barrier" && o.take("cluster")) return decode_cluster_barrier(i, o, x);
    return false;
}

}  // namespace emu::ptx
