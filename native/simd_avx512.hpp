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
constexpr int kQueryRows = 4;  // query rows an attention tile holds: measured, half as fast again as six
constexpr int kScores = 16;    // score vectors it holds
constexpr int kWideRows = 6, kWideScores = 24;  // rows and score vectors of a tile where pages are floats already
constexpr int kChains = 12;     // independent dot products in flight that keep the processor busy
constexpr int kBias8 = 128;    // vpdpbusd wants unsigned weights: int8 weights are read XOR 0x80
constexpr int kHigh = 16;      // high nibbles stay where they are: sixteen times their value, one shift less

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
// 16 int8 to float, and rounded to nearest even and back; inputs within [-127, 127].
inline vf load_i8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline void store_i8(int8_t* p, vf a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a))); }
inline float hmax(vf a) { return _mm512_reduce_max_ps(a); }

inline vb load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline vb low_nibbles(vb a) { return _mm512_and_si512(a, _mm512_set1_epi8(0x0f)); }
inline vb high_nibbles(vb a) { return _mm512_and_si512(a, _mm512_set1_epi8((char)0xf0)); }  // times kHigh
inline vb shifted_nibbles(vb a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(0x0f)); }  // high ones
// Nibbles with COUNT bits of `above`, from bit AT on, put on top.
template <int AT, int COUNT>
inline vb join_bits(vb low, vb above) {
    constexpr int left = AT < 4 ? 4 - AT : 0, right = AT > 4 ? AT - 4 : 0;
    const vb a = left ? _mm512_slli_epi16(above, left) : right ? _mm512_srli_epi16(above, right) : above;
    return _mm512_ternarylogic_epi32(a, _mm512_set1_epi8(COUNT == 2 ? 0x30 : 0x10), low, 0xea);  // a & mask | low
}
inline void store_bytes(uint8_t* p, vb a) { _mm512_storeu_si512(p, a); }
inline vb sub_bytes(vb a, int x) { return _mm512_sub_epi8(a, _mm512_set1_epi8((char)x)); }
inline vb prepare8(vb a) { return _mm512_xor_si512(a, _mm512_set1_epi8((char)0x80)); }
struct quad { __m512i v; };  // four int8 activations in every 32-bit lane
inline quad load_quad(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return {_mm512_set1_epi32(x)};
}
inline vi dot4(vi acc, vb w, quad x) { return _mm512_dpbusd_epi32(acc, w, x.v); }  // w from low_ or high_nibbles
inline vi dot8(vi acc, vb w, quad x) {  // w from prepare8
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x.v));
    return acc;
}

// 64 values to two pieces: the four halves are reduced together, each in a 128-bit lane of its own.
inline void quantise_super(const float* x, Piece& p0, Piece& p1) {
    const __m512 v[4] = {load(x), load(x + 16), load(x + 32), load(x + 48)};
    const __m512 a[4] = {vabs(v[0]), vabs(v[1]), vabs(v[2]), vabs(v[3])};
    const __m512 m01 = vmax(_mm512_shuffle_f32x4(a[0], a[1], 0x44), _mm512_shuffle_f32x4(a[0], a[1], 0xee));
    const __m512 m23 = vmax(_mm512_shuffle_f32x4(a[2], a[3], 0x44), _mm512_shuffle_f32x4(a[2], a[3], 0xee));
    __m512 top = vmax(_mm512_shuffle_f32x4(m01, m23, 0x88), _mm512_shuffle_f32x4(m01, m23, 0xdd));
    top = vmax(top, _mm512_permute_ps(top, 0x4e));
    top = vmax(top, _mm512_permute_ps(top, 0xb1));  // lane i holds the largest of half i, four times
    // Below this there is nothing to represent, and 127/top would overflow.
    const __mmask16 some = _mm512_cmp_ps_mask(top, set1(1e-30f), _CMP_GT_OQ);
    const __m512 inv = _mm512_maskz_div_ps(some, set1(127.0f), top), s = _mm512_maskz_div_ps(some, top, set1(127.0f));
    const __m512i i0 = _mm512_cvtps_epi32(mul(v[0], _mm512_shuffle_f32x4(inv, inv, 0x00)));
    const __m512i i1 = _mm512_cvtps_epi32(mul(v[1], _mm512_shuffle_f32x4(inv, inv, 0x55)));
    const __m512i i2 = _mm512_cvtps_epi32(mul(v[2], _mm512_shuffle_f32x4(inv, inv, 0xaa)));
    const __m512i i3 = _mm512_cvtps_epi32(mul(v[3], _mm512_shuffle_f32x4(inv, inv, 0xff)));
    // packs work in 128-bit lanes: one permutation puts the quarters of each half back together
    const __m512i bytes = _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
        _mm512_packs_epi16(_mm512_packs_epi32(i0, i1), _mm512_packs_epi32(i2, i3)));
    _mm256_store_si256((__m256i*)p0.q, _mm512_castsi512_si256(bytes));
    _mm256_store_si256((__m256i*)p1.q, _mm512_extracti64x4_epi64(bytes, 1));
    __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes);
    sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, (_MM_PERM_ENUM)0x4e));
    sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, (_MM_PERM_ENUM)0xb1));
    const __m512 part = mul(s, _mm512_cvtepi32_ps(sum));
    const __m512 both = add(part, _mm512_shuffle_f32x4(part, part, 0xb1));
    const __m512i pick = _mm512_setr_epi32(0, 4, 4, 0, 0, 4, 0, 4, 8, 12, 12, 8, 8, 12, 8, 12);
    const __m512 scale = _mm512_permutexvar_ps(pick, s);
    const __m512i bias = _mm512_sub_epi32(_mm512_setzero_si512(),
        _mm512_sllv_epi32(_mm512_permutexvar_epi32(pick, sum),
                          _mm512_setr_epi32(0, 0, 0, 0, 3, 7, 7, 7, 0, 0, 0, 0, 3, 7, 7, 7)));
    __m512 tail = _mm512_mask_mul_ps(scale, 0x0404, scale, set1(1.0f / kHigh));
    tail = _mm512_mask_mov_ps(tail, 0x0808, both);
    tail = _mm512_mask_mov_ps(tail, 0xf0f0, _mm512_castsi512_ps(bias));
    _mm256_store_ps(&p0.low, _mm512_castps512_ps256(tail));
    _mm256_store_ps(&p1.low, _mm512_extractf32x8_ps(tail, 1));
}

}  // namespace GALLEY_NS
