// Sixteen lanes on AVX-512 with VNNI. Included only by a translation unit compiled for it.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace GALLEY_NS {

using vf = __m512;   // 16 float32
using vi = __m512i;  // 16 int32
using vb = __m512i;  // 64 bytes

constexpr int kMaxTile = 6;    // tokens a linear tile holds: 12 float + 12 int accumulators of 32 registers
constexpr int kQueryRows = 6;  // query rows an attention tile holds
constexpr int kBias8 = 128;    // vpdpbusd wants unsigned weights: int8 weights are read XOR 0x80

inline vf zero() { return _mm512_setzero_ps(); }
inline vf set1(float x) { return _mm512_set1_ps(x); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
inline vf load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store_f16(uint16_t* p, vf a) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline vf load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf vabs(vf a) { return _mm512_abs_ps(a); }
inline vf round_even(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^n for integral-valued n in [-126, 127].
inline vf exp2i(vf n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
// Lanes whose a < b become c.
inline vf where_less(vf a, vf b, vf c, vf other) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), other, c);
}
// Lanes n.. become `other`.
inline vf keep_first(vf a, int n, float other) {
    const __mmask16 m = n >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (n < 0 ? 0 : n)) - 1);
    return _mm512_mask_blend_ps(m, _mm512_set1_ps(other), a);
}

inline vi iset1(int32_t x) { return _mm512_set1_epi32(x); }
inline vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
// Rounds to nearest even, stores 16 int8 and returns their sum; inputs within [-127, 127].
inline int32_t store_i8(int8_t* p, vf a) {
    const __m512i x = _mm512_cvtps_epi32(a);
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x));
    return _mm512_reduce_add_epi32(x);
}
inline float hmax(vf a) { return _mm512_reduce_max_ps(a); }

inline vb load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline vb low_nibbles(vb a) { return _mm512_and_si512(a, _mm512_set1_epi8(0x0f)); }
inline vb high_nibbles(vb a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(0x0f)); }
inline vb prepare8(vb a) { return _mm512_xor_si512(a, _mm512_set1_epi8((char)0x80)); }
struct quad { __m512i v; };  // four int8 activations in every 32-bit lane
inline quad load_quad(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return {_mm512_set1_epi32(x)};
}
inline vi dot4(vi acc, vb w, quad x) { return _mm512_dpbusd_epi32(acc, w, x.v); }  // w in 0..15
inline vi dot8(vi acc, vb w, quad x) { return _mm512_dpbusd_epi32(acc, w, x.v); }  // w from prepare8

}  // namespace GALLEY_NS
