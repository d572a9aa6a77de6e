// Sixteen lanes in plain C++, for any processor; the compiler vectorises what it can.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.hpp"

namespace GALLEY_NS {

struct vf { float v[16]; };
struct vi { int32_t v[16]; };
struct vb { uint8_t v[64]; };

constexpr int kMaxTile = 2;
constexpr int kQueryRows = 2;
constexpr int kScores = 4;
constexpr int kWideRows = 2, kWideScores = 4;
constexpr int kChains = 1;
constexpr int kBias8 = 0;
constexpr int kHigh = 1;   // high nibbles are shifted down

#define GALLEY_LANES(expr) vf r; for (int i = 0; i < 16; i++) r.v[i] = (expr); return r
inline vf zero() { GALLEY_LANES(0.0f); }
inline vf set1(float x) { GALLEY_LANES(x); }
inline vf load(const float* p) { vf r; std::memcpy(r.v, p, 64); return r; }
inline void store(float* p, const vf& a) { std::memcpy(p, a.v, 64); }
inline vf load_f16(const uint16_t* p) { GALLEY_LANES(half_to_float(p[i])); }
inline void store_f16(uint16_t* p, const vf& a) { for (int i = 0; i < 16; i++) p[i] = float_to_half(a.v[i]); }
inline vf load_bf16(const uint16_t* p) { GALLEY_LANES(bf16_to_float(p[i])); }
inline vf add(const vf& a, const vf& b) { GALLEY_LANES(a.v[i] + b.v[i]); }
inline vf sub(const vf& a, const vf& b) { GALLEY_LANES(a.v[i] - b.v[i]); }
inline vf mul(const vf& a, const vf& b) { GALLEY_LANES(a.v[i] * b.v[i]); }
inline vf div(const vf& a, const vf& b) { GALLEY_LANES(a.v[i] / b.v[i]); }
#ifdef __FP_FAST_FMAF  // arm64, for one: rounded once, as in every other instruction set, and so the same bits
inline vf fma(const vf& a, const vf& b, const vf& c) { GALLEY_LANES(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
#else
inline vf fma(const vf& a, const vf& b, const vf& c) { GALLEY_LANES(a.v[i] * b.v[i] + c.v[i]); }
#endif
inline vf vmax(const vf& a, const vf& b) { GALLEY_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline vf vmin(const vf& a, const vf& b) { GALLEY_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline vf vabs(const vf& a) { GALLEY_LANES(std::fabs(a.v[i])); }
// Adding and taking away 1.5 * 2^23 rounds to nearest even for |x| < 2^22, which is all the callers need.
inline vf round_even(const vf& a) { GALLEY_LANES((a.v[i] + 12582912.0f) - 12582912.0f); }
inline vf exp2i(const vf& n) {
    vf r;
    for (int i = 0; i < 16; i++) {
        const int32_t bits = ((int32_t)n.v[i] + 127) << 23;
        std::memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
inline vf where_less(const vf& a, const vf& b, const vf& then, const vf& other) {
    GALLEY_LANES(a.v[i] < b.v[i] ? then.v[i] : other.v[i]);
}
inline vf keep_first(const vf& a, int n, float other) { GALLEY_LANES(i < n ? a.v[i] : other); }
#undef GALLEY_LANES

inline vi iset1(int32_t x) { vi r; for (int i = 0; i < 16; i++) r.v[i] = x; return r; }
inline vf to_float(const vi& a) { vf r; for (int i = 0; i < 16; i++) r.v[i] = (float)a.v[i]; return r; }
inline int32_t store_i8(int8_t* p, const vf& a) {
    const vf x = round_even(a);
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) p[i] = (int8_t)(int32_t)x.v[i], sum += p[i];
    return sum;
}
inline vf load_i8(const int8_t* p) { vf r; for (int i = 0; i < 16; i++) r.v[i] = (float)p[i]; return r; }
inline float hmax(const vf& a) {
    float m = a.v[0];
    for (int i = 1; i < 16; i++) m = m > a.v[i] ? m : a.v[i];
    return m;
}
inline vb load_bytes(const uint8_t* p) { vb r; std::memcpy(r.v, p, 64); return r; }
inline vb low_nibbles(const vb& a) { vb r; for (int i = 0; i < 64; i++) r.v[i] = a.v[i] & 15; return r; }
inline vb high_nibbles(const vb& a) { vb r; for (int i = 0; i < 64; i++) r.v[i] = a.v[i] >> 4; return r; }
inline vb shifted_nibbles(const vb& a) { return high_nibbles(a); }
// Nibbles with COUNT bits of `above`, from bit AT on, put on top.
template <int AT, int COUNT>
inline vb join_bits(const vb& low, const vb& above) {
    vb r;
    for (int i = 0; i < 64; i++) r.v[i] = (uint8_t)(low.v[i] | (above.v[i] >> AT & (COUNT == 2 ? 3 : 1)) << 4);
    return r;
}
inline void store_bytes(uint8_t* p, const vb& a) { std::memcpy(p, a.v, 64); }
inline vb sub_bytes(const vb& a, int x) { vb r; for (int i = 0; i < 64; i++) r.v[i] = (uint8_t)(a.v[i] - x); return r; }
inline vb prepare8(const vb& a) { return a; }
struct quad { int8_t v[4]; };
inline quad load_quad(const int8_t* p) { quad r; std::memcpy(r.v, p, 4); return r; }
inline vi dot4(vi acc, const vb& w, quad x) {
    for (int i = 0; i < 16; i++)
        acc.v[i] += w.v[4 * i] * x.v[0] + w.v[4 * i + 1] * x.v[1] + w.v[4 * i + 2] * x.v[2] + w.v[4 * i + 3] * x.v[3];
    return acc;
}
inline vi dot8(vi acc, const vb& w, quad x) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 4; j++) acc.v[i] += (int8_t)w.v[4 * i + j] * x.v[j];
    return acc;
}

}  // namespace GALLEY_NS
