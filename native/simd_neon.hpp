// Sixteen lanes as four 128-bit registers of arm64, with its dot products of bytes (FEAT_DotProd). Included only by a
// translation unit compiled for it.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace GALLEY_NS {

struct vf { float32x4_t v[4]; };
struct vi { int32x4_t v[4]; };
struct vb { int8x16_t v[4]; };

constexpr int kMaxTile = 2;    // two tokens x 32 rows fill thirty-two registers
constexpr int kQueryRows = 3;
constexpr int kScores = 6;
constexpr int kWideRows = 3, kWideScores = 6;
constexpr int kChains = 4;     // independent dot products in flight that keep the processor busy
constexpr int kBias8 = 0;  // sdot takes signed weights
constexpr int kHigh = 1;   // high nibbles are shifted down

#define GALLEY_QUARTERS(T, expr) T r; for (int i = 0; i < 4; i++) r.v[i] = (expr); return r
inline vf zero() { GALLEY_QUARTERS(vf, vdupq_n_f32(0.0f)); }
inline vf set1(float x) { GALLEY_QUARTERS(vf, vdupq_n_f32(x)); }
inline vf load(const float* p) { GALLEY_QUARTERS(vf, vld1q_f32(p + 4 * i)); }
inline void store(float* p, vf x) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]); }
inline vf load_f16(const uint16_t* p) { GALLEY_QUARTERS(vf, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))); }
inline void store_f16(uint16_t* p, vf x) {  // rounds to nearest even, which the control register says from the start
    for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}
inline vf load_bf16(const uint16_t* p) { GALLEY_QUARTERS(vf, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))); }
inline vf add(vf x, vf y) { GALLEY_QUARTERS(vf, vaddq_f32(x.v[i], y.v[i])); }
inline vf sub(vf x, vf y) { GALLEY_QUARTERS(vf, vsubq_f32(x.v[i], y.v[i])); }
inline vf mul(vf x, vf y) { GALLEY_QUARTERS(vf, vmulq_f32(x.v[i], y.v[i])); }
inline vf div(vf x, vf y) { GALLEY_QUARTERS(vf, vdivq_f32(x.v[i], y.v[i])); }
inline vf fma(vf x, vf y, vf z) { GALLEY_QUARTERS(vf, vfmaq_f32(z.v[i], x.v[i], y.v[i])); }
// Compared and selected, since fmax and fmin treat NaN and signed zeros unlike the other instruction sets.
inline vf vmax(vf x, vf y) { GALLEY_QUARTERS(vf, vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])); }
inline vf vmin(vf x, vf y) { GALLEY_QUARTERS(vf, vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])); }
inline vf vabs(vf x) { GALLEY_QUARTERS(vf, vabsq_f32(x.v[i])); }
inline vf round_even(vf x) { GALLEY_QUARTERS(vf, vrndnq_f32(x.v[i])); }
inline vf exp2i(vf n) {
    GALLEY_QUARTERS(vf, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23)));
}
inline vf where_less(vf x, vf y, vf then, vf other) {
    GALLEY_QUARTERS(vf, vbslq_f32(vcltq_f32(x.v[i], y.v[i]), then.v[i], other.v[i]));
}
inline vf keep_first(vf x, int n, float other) {
    const int32_t first[4] = {0, 1, 2, 3};
    const int32x4_t lane = vld1q_s32(first);
    GALLEY_QUARTERS(vf, vbslq_f32(vcltq_s32(lane, vdupq_n_s32(n - 4 * i)), x.v[i], vdupq_n_f32(other)));
}

inline vi iset1(int32_t x) { GALLEY_QUARTERS(vi, vdupq_n_s32(x)); }
inline vf to_float(vi x) { GALLEY_QUARTERS(vf, vcvtq_f32_s32(x.v[i])); }
inline int32_t store_i8(int8_t* p, vf x) {
    vi n;
    for (int i = 0; i < 4; i++) n.v[i] = vcvtnq_s32_f32(x.v[i]);
    const int16x8_t a = vcombine_s16(vqmovn_s32(n.v[0]), vqmovn_s32(n.v[1]));
    const int16x8_t b = vcombine_s16(vqmovn_s32(n.v[2]), vqmovn_s32(n.v[3]));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(a), vqmovn_s16(b)));
    return vaddvq_s32(vaddq_s32(vaddq_s32(n.v[0], n.v[1]), vaddq_s32(n.v[2], n.v[3])));
}
inline vf load_i8(const int8_t* p) {
    const int8x16_t x = vld1q_s8(p);
    const int16x8_t a = vmovl_s8(vget_low_s8(x)), b = vmovl_s8(vget_high_s8(x));
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(a))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(a))),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(b))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(b)))}};
}
inline float hmax(vf x) {
    return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(x.v[0], x.v[1]), vmaxnmq_f32(x.v[2], x.v[3])));
}

inline vb load_bytes(const uint8_t* p) { GALLEY_QUARTERS(vb, vreinterpretq_s8_u8(vld1q_u8(p + 16 * i))); }
inline vb low_nibbles(vb x) { GALLEY_QUARTERS(vb, vandq_s8(x.v[i], vdupq_n_s8(15))); }
inline vb high_nibbles(vb x) {
    GALLEY_QUARTERS(vb, vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(x.v[i]), 4)));
}
inline vb shifted_nibbles(vb x) { return high_nibbles(x); }
// Nibbles with COUNT bits of `above`, from bit AT on, put on top.
template <int AT, int COUNT>
inline vb join_bits(vb low, vb above) {
    const auto quarter = [](int8x16_t l, int8x16_t x) {
        uint8x16_t a = vreinterpretq_u8_s8(x);
        if constexpr (AT < 4) a = vshlq_n_u8(a, 4 - AT);
        else if constexpr (AT > 4) a = vshrq_n_u8(a, AT - 4);
        return vorrq_s8(l, vreinterpretq_s8_u8(vandq_u8(a, vdupq_n_u8(COUNT == 2 ? 0x30 : 0x10))));
    };
    GALLEY_QUARTERS(vb, quarter(low.v[i], above.v[i]));
}
inline void store_bytes(uint8_t* p, vb x) { for (int i = 0; i < 4; i++) vst1q_s8((int8_t*)p + 16 * i, x.v[i]); }
inline vb sub_bytes(vb x, int y) { GALLEY_QUARTERS(vb, vsubq_s8(x.v[i], vdupq_n_s8((int8_t)y))); }
inline vb prepare8(vb x) { return x; }
struct quad { int8x16_t v; };
inline quad load_quad(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return {vreinterpretq_s8_s32(vdupq_n_s32(x))};
}
inline vi dot4(vi acc, vb w, quad x) { GALLEY_QUARTERS(vi, vdotq_s32(acc.v[i], w.v[i], x.v)); }
inline vi dot8(vi acc, vb w, quad x) { GALLEY_QUARTERS(vi, vdotq_s32(acc.v[i], w.v[i], x.v)); }
#undef GALLEY_QUARTERS

}  // namespace GALLEY_NS
