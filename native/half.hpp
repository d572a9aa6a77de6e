// IEEE half and bfloat16 in integer arithmetic, for code that may assume no instruction set.
#pragma once
#include <cstdint>
#include <cstring>

namespace galley {

// Static (not inline): each translation unit keeps its own copy, so that the linker never serves one compiled
// for a newer processor to code that must run on an older one.
static inline float bits_to_float(uint32_t b) { float f; std::memcpy(&f, &b, 4); return f; }
static inline uint32_t float_to_bits(float f) { uint32_t b; std::memcpy(&b, &f, 4); return b; }

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = (h >> 10) & 31, man = h & 1023;
    if (exp == 31) return bits_to_float(sign | 0x7f800000u | (man << 13));
    if (exp) return bits_to_float(sign | ((exp + 112) << 23) | (man << 13));
    const float tiny = (float)man * 5.9604644775390625e-08f;  // man * 2^-24
    return sign ? -tiny : tiny;
}

// Rounds to nearest even; overflows to infinity.
static inline uint16_t float_to_half(float f) {
    const uint32_t b = float_to_bits(f), sign = (b >> 16) & 0x8000, a = b & 0x7fffffff;
    if (a >= 0x7f800000) return (uint16_t)(sign | 0x7c00 | (a > 0x7f800000 ? 0x200 : 0));
    if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (a < 0x38800000) {  // below the normal halves: let a float addition do the rounding at 2^-24
        const float r = bits_to_float(a) + 0.5f;
        return (uint16_t)(sign | (float_to_bits(r) - 0x3f000000));
    }
    return (uint16_t)(sign | ((a + 0xc8000000u + 0xfff + ((a >> 13) & 1)) >> 13));
}

static inline float bf16_to_float(uint16_t h) { return bits_to_float((uint32_t)h << 16); }

}  // namespace galley
