// Sixteen lanes as two AVX2 registers (with FMA and F16C), and with GALLEY_VNNI its dot products of bytes, in the encoding
// the translation unit is compiled for: AVX-VNNI's or AVX-512's. Included only by a translation unit compiled for it.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace GALLEY_NS {

struct vf { __m256 a, b; };
struct vi { __m256i a, b; };
struct vb { __m256i a, b; };

constexpr int kMaxTile = 2;    // two tokens x 32 rows fill sixteen registers
constexpr int kQueryRows = 3;
constexpr int kScores = 6;
constexpr int kWideRows = 3, kWideScores = 6;
#ifdef GALLEY_VNNI
constexpr int kChains = 5;      // independent dot products in flight that keep the processor busy
constexpr int kBias8 = 128;    // vpdpbusd wants unsigned weights: int8 weights are read XOR 0x80
#else
constexpr int kChains = 3;
constexpr int kBias8 = 0;      // maddubs(|w|, sign(x, w)) takes signed weights without a bias
#endif
constexpr int kHigh = 1;   // high nibbles are shifted down

inline vf zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline vf set1(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
inline vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline vf load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline void store_f16(uint16_t* p, vf x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline vf load_bf16(const uint16_t* p) {
    const auto one = [](const uint16_t* q) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)q)), 16));
    };
    return {one(p), one(p + 8)};
}
inline vf add(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline vf sub(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline vf mul(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline vf div(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline vf fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline vf vmax(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline vf vmin(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline vf vabs(vf x) {
    const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
inline vf round_even(vf x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline vf exp2i(vf n) {
    const auto one = [](__m256 v) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127)), 23));
    };
    return {one(n.a), one(n.b)};
}
inline vf where_less(vf x, vf y, vf then, vf other) {
    return {_mm256_blendv_ps(other.a, then.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(other.b, then.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
inline vf keep_first(vf x, int n, float other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 o = _mm256_set1_ps(other);
    return {_mm256_blendv_ps(o, x.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))),
            _mm256_blendv_ps(o, x.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane)))};
}

inline vi iset1(int32_t x) { const __m256i v = _mm256_set1_epi32(x); return {v, v}; }
inline vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline int32_t store_i8(int8_t* p, vf x) {
    const __m256i i0 = _mm256_cvtps_epi32(x.a), i1 = _mm256_cvtps_epi32(x.b);
    // packs works in 128-bit halves: one permutation puts the quarters back in order
    const __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(i0, i1), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
    const __m256i s = _mm256_add_epi32(i0, i1);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
inline vf load_i8(const int8_t* p) {
    const __m128i x = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
}
inline float hmax(vf x) {
    const __m256 m = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}

inline vb load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline vb low_nibbles(vb x) {
    const __m256i m = _mm256_set1_epi8(0x0f);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline vb high_nibbles(vb x) {
    const __m256i m = _mm256_set1_epi8(0x0f);
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), m)};
}
inline vb shifted_nibbles(vb x) { return high_nibbles(x); }
// Nibbles with COUNT bits of `above`, from bit AT on, put on top.
template <int AT, int COUNT>
inline vb join_bits(vb low, vb above) {
    const auto half = [](__m256i l, __m256i a) {
        constexpr int left = AT < 4 ? 4 - AT : 0, right = AT > 4 ? AT - 4 : 0;
        a = left ? _mm256_slli_epi16(a, left) : right ? _mm256_srli_epi16(a, right) : a;
        return _mm256_or_si256(l, _mm256_and_si256(a, _mm256_set1_epi8(COUNT == 2 ? 0x30 : 0x10)));
    };
    return {half(low.a, above.a), half(low.b, above.b)};
}
inline void store_bytes(uint8_t* p, vb x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)(p + 32), x.b);
}
inline vb sub_bytes(vb x, int y) {
    const __m256i v = _mm256_set1_epi8((char)y);
    return {_mm256_sub_epi8(x.a, v), _mm256_sub_epi8(x.b, v)};
}
struct quad { __m256i v; };
inline quad load_quad(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return {_mm256_set1_epi32(x)};
}
#ifdef GALLEY_VNNI
#ifdef __AVX512VNNI__
inline __m256i dpbusd(__m256i acc, __m256i w, __m256i x) { return _mm256_dpbusd_epi32(acc, w, x); }
#else
inline __m256i dpbusd(__m256i acc, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
#endif
inline vb prepare8(vb x) {
    const __m256i m = _mm256_set1_epi8((char)0x80);
    return {_mm256_xor_si256(x.a, m), _mm256_xor_si256(x.b, m)};
}
inline vi dot4(vi acc, vb w, quad x) { return {dpbusd(acc.a, w.a, x.v), dpbusd(acc.b, w.b, x.v)}; }
inline vi dot8(vi acc, vb w, quad x) { return {dpbusd(acc.a, w.a, x.v), dpbusd(acc.b, w.b, x.v)}; }
#else
inline vb prepare8(vb x) { return x; }
inline vi dot4(vi acc, vb w, quad x) {
    const __m256i one = _mm256_set1_epi16(1);  // 15*127*2 fits int16: no saturation
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(w.a, x.v), one)),
            _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(w.b, x.v), one))};
}
inline vi dot8(vi acc, vb w, quad x) {
    const __m256i one = _mm256_set1_epi16(1);  // 128*127*2 = 32512 fits int16
    const auto half = [&](__m256i c, __m256i v) {
        return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(x.v, v)), one));
    };
    return {half(acc.a, w.a), half(acc.b, w.b)};
}
#endif

}  // namespace GALLEY_NS
