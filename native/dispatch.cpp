#include "dispatch.hpp"

namespace galley {

std::vector<std::string> isa_available() {
    std::vector<std::string> v;
#if defined(__x86_64__)
    __builtin_cpu_init();  // reads cpuid and XCR0, so a processor whose system does not save the registers is not offered
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        v.push_back("avx512-vnni");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) v.push_back("avx2");
#endif
    v.push_back("portable");
    return v;
}

const Kernels* isa_find(const std::string& name) {
#if defined(__x86_64__)
    if (name == "avx512-vnni") return &avx512vnni::table;
    if (name == "avx2") return &avx2::table;
#endif
    if (name == "portable") return &portable::table;
    return nullptr;
}

}  // namespace galley
