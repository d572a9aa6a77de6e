// Holds every instruction set of this processor to the portable kernels, bit by bit, and prints digests by which two
// machines can be compared. `paths --emulate` runs the AVX-VNNI kernels alone, on any x86-64 processor with AVX2;
// `paths --list` names what there is and runs nothing.
#include <cstdio>
#include <stdexcept>

#include "battery.hpp"
#include "dispatch.hpp"
#if defined(__x86_64__)
#include "trap.hpp"
#endif

namespace galley {

#if defined(__x86_64__)
namespace fused { extern const Kernels table; }
static const Kernels& reference() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("fma")) throw std::runtime_error("this processor has no fused multiply-add: nothing to compare with");
    return fused::table;
}
#else
static const Kernels& reference() { return portable::table; }
#endif

static int compare(const Record& want, const Battery& battery, const char* isa) {
    int wrong = 0;
    if (battery.record().results().size() != want.results().size()) throw std::logic_error("records of different runs");
    for (const auto& [name, bytes] : battery.record().results()) {
        const auto& other = want.results().at(name);
        size_t at = 0;
        while (at < bytes.size() && at < other.size() && bytes[at] == other[at]) at++;
        if (at == bytes.size() && at == other.size()) continue;
        std::printf("DIFFERENT %s: %s, at byte %zu of %zu\n", isa, name.c_str(), at, other.size());
        wrong++;
    }
    std::printf("%s: %zu results, %d different\n", isa, want.results().size(), wrong);
    return wrong;
}

}  // namespace galley

int main(int count, char** arguments) try {
    using namespace galley;
    const std::string mode = count == 2 ? arguments[1] : "";
    const bool emulate = mode == "--emulate";
    if (count > 2 || (count == 2 && !emulate && mode != "--list")) throw std::invalid_argument("paths [--emulate | --list]");
    if (mode == "--list") {
        for (const std::string& name : isa_available()) std::printf("%s\n", name.c_str());
        return 0;
    }
    const auto run = [&](Battery& battery) {
        battery.kernels();
        if (!emulate) battery.models();  // a refused instruction takes microseconds
    };
    const int tokens = emulate ? 5 : 33;
    Battery oracle(reference(), tokens);
    run(oracle);
    std::vector<const Kernels*> tables;
    if (emulate) {
#if defined(__x86_64__)
        emulate_vpdpbusd();
        tables.push_back(&avx2vnni::table);
#else
        throw std::invalid_argument("only x86-64 has AVX-VNNI");
#endif
    } else {
        for (const auto& [name, bytes] : oracle.record().results())
            std::printf("%016llx %s\n", (unsigned long long)Record::digest(bytes), name.c_str());
        for (const std::string& name : isa_available())
            // Portable code on x86-64 has no fused multiply-adds, so other bits: it is held to the oracle of the Python tests.
            if (const Kernels* k = isa_find(name); k != &portable::table) tables.push_back(k);
    }
    int wrong = 0;
    for (const Kernels* k : tables) {
        Battery battery(*k, tokens);
        run(battery);
        wrong += compare(oracle.record(), battery, k->name);
    }
#if defined(__x86_64__)
    if (emulate) std::printf("%ld dot products emulated\n", emulated());
#endif
    return wrong ? 1 : 0;
} catch (const std::exception& e) {
    std::fprintf(stderr, "paths: %s\n", e.what());
    return 2;
}
