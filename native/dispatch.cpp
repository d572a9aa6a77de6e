#include "dispatch.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace galley {

namespace {

struct Isa {
    const Kernels* kernels;
    bool there;
};

#if defined(__x86_64__)
// Leaf 7.1, EAX bit 4: a bit that GCC 12's __builtin_cpu_supports does not know.
bool has_avx_vnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif

// Best first.
std::vector<Isa> isas() {
    std::vector<Isa> v;
#if defined(__x86_64__)
    __builtin_cpu_init();  // reads cpuid and XCR0, so a processor whose system does not save the registers is not offered
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    v.push_back({&avx512vnni::table, vnni && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")});
    v.push_back({&avx512vl::table, vnni});
    v.push_back({&avx2vnni::table, avx2 && has_avx_vnni()});
    v.push_back({&avx2::table, avx2});
#elif defined(__aarch64__) && defined(__linux__)
    v.push_back({&neon::table, (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0});
#endif
    v.push_back({&portable::table, true});
    return v;
}

}  // namespace

std::vector<std::string> isa_available() {
    std::vector<std::string> names;
    for (const Isa& isa : isas())
        if (isa.there) names.push_back(isa.kernels->name);
    return names;
}

const Kernels* isa_find(const std::string& name) {
    for (const Isa& isa : isas())
        if (isa.there && name == isa.kernels->name) return isa.kernels;
    return nullptr;
}

}  // namespace galley
