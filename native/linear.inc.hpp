// Matrix times activations. Every output element is summed over groups in ascending order in one accumulator, so its
// value does not depend on how many tokens share the step: batch invariance (SMP-6) by construction.
#pragma once

namespace GALLEY_NS {

inline constexpr int kRecord4 = 1024, kRecord8 = 2048;
inline constexpr int kAhead = 2304;  // bytes: covers memory latency once a record takes more than a hundred cycles

// Adds one half group: acc += dot * (d * s), and m * ssum where the weights have a minimum.
template <int M, bool MIN>
static inline void add_half(vf acc[M][2], const vi dot[M][2], const vf d[2], const vf m[2], const float* xs, const float* xss) {
#pragma GCC unroll 6
    for (int t = 0; t < M; t++) {
        const vf s = set1(xs[t]);
        acc[t][0] = fma(to_float(dot[t][0]), mul(d[0], s), acc[t][0]);
        acc[t][1] = fma(to_float(dot[t][1]), mul(d[1], s), acc[t][1]);
    }
    if constexpr (MIN) {
#pragma GCC unroll 6
        for (int t = 0; t < M; t++) {
            const vf s = set1(xss[t]);
            acc[t][0] = fma(m[0], s, acc[t][0]);
            acc[t][1] = fma(m[1], s, acc[t][1]);
        }
    }
}

template <int M, bool MIN>
static void tile_q4(const uint8_t* w, int supers, const int8_t* xq, const float* xs, const int32_t* xsum, const float* xss,
                    float* out) {
    vf acc[M][2];
    for (int t = 0; t < M; t++) acc[t][0] = acc[t][1] = zero();
    constexpr size_t bytes = kRecord4 + (MIN ? 256 : 128);
    for (int b = 0; b < supers; b++, w += bytes) {
        const uint16_t* scales = (const uint16_t*)(w + kRecord4);
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) {
            const uint8_t* wg = w + g * 512;
            for (int c = 0; c < 512; c += 64) __builtin_prefetch(wg + c + kAhead);
            const vf d[2] = {load_f16(scales + g * 32), load_f16(scales + g * 32 + 16)};
            vf m[2] = {d[0], d[1]};
            if constexpr (MIN) m[0] = load_f16(scales + 64 + g * 32), m[1] = load_f16(scales + 64 + g * 32 + 16);
            // low nibbles are columns 0..15, high nibbles 16..31: each half has an activation scale of its own
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                vi dot[M][2];
                for (int t = 0; t < M; t++) dot[t][0] = dot[t][1] = iset1(MIN ? 0 : -8 * xsum[t]);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const vb r0 = load_bytes(wg + 64 * i), r1 = load_bytes(wg + 256 + 64 * i);
                    const vb w0 = h ? high_nibbles(r0) : low_nibbles(r0), w1 = h ? high_nibbles(r1) : low_nibbles(r1);
#pragma GCC unroll 6
                    for (int t = 0; t < M; t++) {
                        const quad x = load_quad(xq + t * 32 + 16 * h + 4 * i);
                        dot[t][0] = dot4(dot[t][0], w0, x);
                        dot[t][1] = dot4(dot[t][1], w1, x);
                    }
                }
                add_half<M, MIN>(acc, dot, d, m, xs, xss);
                xs += M, xsum += M, xss += M;
            }
            xq += M * 32;
        }
    }
    for (int t = 0; t < M; t++) store(out + t * kPair, acc[t][0]), store(out + t * kPair + 16, acc[t][1]);
}

// HALVES: the weights too have a scale for columns 0..15 and one for 16..31.
template <int M, bool MIN, bool HALVES>
static void tile_q8(const uint8_t* w, int supers, const int8_t* xq, const float* xs, const int32_t* xsum, const float* xss,
                    float* out) {
    vf acc[M][2];
    for (int t = 0; t < M; t++) acc[t][0] = acc[t][1] = zero();
    constexpr size_t bytes = kRecord8 + (MIN || HALVES ? 256 : 128);
    for (int b = 0; b < supers; b++, w += bytes) {
        const uint16_t* scales = (const uint16_t*)(w + kRecord8);
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) {
            const uint8_t* wg = w + g * 1024;
            for (int c = 0; c < 1024; c += 64) __builtin_prefetch(wg + c + kAhead);
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const uint16_t* at = HALVES ? scales + g * 64 + h * 16 : scales + g * 32;
                const vf d[2] = {load_f16(at), load_f16(at + (HALVES ? 32 : 16))};
                vf m[2] = {d[0], d[1]};
                if constexpr (MIN) m[0] = load_f16(scales + 64 + g * 32), m[1] = load_f16(scales + 64 + g * 32 + 16);
                vi dot[M][2];
                for (int t = 0; t < M; t++) dot[t][0] = dot[t][1] = iset1(-kBias8 * xsum[t]);
#pragma GCC unroll 4
                for (int i = 4 * h; i < 4 * h + 4; i++) {
                    const vb w0 = prepare8(load_bytes(wg + 64 * i)), w1 = prepare8(load_bytes(wg + 512 + 64 * i));
#pragma GCC unroll 6
                    for (int t = 0; t < M; t++) {
                        const quad x = load_quad(xq + t * 32 + 4 * i);
                        dot[t][0] = dot8(dot[t][0], w0, x);
                        dot[t][1] = dot8(dot[t][1], w1, x);
                    }
                }
                add_half<M, MIN>(acc, dot, d, m, xs, xss);
                xs += M, xsum += M, xss += M;
            }
            xq += M * 32;
        }
    }
    for (int t = 0; t < M; t++) store(out + t * kPair, acc[t][0]), store(out + t * kPair + 16, acc[t][1]);
}

template <int M, Layout L>
static void tile_float(const uint8_t* w, int cols, const float* x, size_t ldx, float* out) {
    vf acc[M][2];
    for (int t = 0; t < M; t++) acc[t][0] = acc[t][1] = zero();
    for (int k = 0; k < cols; k++) {
        vf w0, w1;
        if constexpr (L == Layout::f32) {
            w0 = load((const float*)w + k * kPair), w1 = load((const float*)w + k * kPair + 16);
        } else if constexpr (L == Layout::f16) {
            w0 = load_f16((const uint16_t*)w + k * kPair), w1 = load_f16((const uint16_t*)w + k * kPair + 16);
        } else {
            w0 = load_bf16((const uint16_t*)w + k * kPair), w1 = load_bf16((const uint16_t*)w + k * kPair + 16);
        }
#pragma GCC unroll 6
        for (int t = 0; t < M; t++) {
            const vf v = set1(x[t * ldx + k]);
            acc[t][0] = fma(w0, v, acc[t][0]);
            acc[t][1] = fma(w1, v, acc[t][1]);
        }
    }
    for (int t = 0; t < M; t++) store(out + t * kPair, acc[t][0]), store(out + t * kPair + 16, acc[t][1]);
}

template <int M>
static void tile(const Matrix& w, const uint8_t* data, const Acts& x, int t0, float* out) {
    const size_t g0 = (size_t)t0 * x.groups;
    const int8_t* q = x.q + g0 * 32;
    const float *s = x.s + 2 * g0, *ss = x.ssum + 2 * g0;
    const int32_t* sum = x.sum + 2 * g0;
    switch (w.layout) {
        case Layout::q4: return tile_q4<M, false>(data, w.supers, q, s, sum, ss, out);
        case Layout::q4m: return tile_q4<M, true>(data, w.supers, q, s, sum, ss, out);
        case Layout::q8: return tile_q8<M, false, false>(data, w.supers, q, s, sum, ss, out);
        case Layout::q8m: return tile_q8<M, true, false>(data, w.supers, q, s, sum, ss, out);
        case Layout::q8s16: return tile_q8<M, false, true>(data, w.supers, q, s, sum, ss, out);
        case Layout::f16: return tile_float<M, Layout::f16>(data, w.cols, x.x + t0 * x.ldx, x.ldx, out);
        case Layout::bf16: return tile_float<M, Layout::bf16>(data, w.cols, x.x + t0 * x.ldx, x.ldx, out);
        case Layout::f32: return tile_float<M, Layout::f32>(data, w.cols, x.x + t0 * x.ldx, x.ldx, out);
    }
}

static void linear(const Matrix& w, const Acts& x, int pair, float* out) {
    const uint8_t* data = w.data + (size_t)pair * w.pair_stride;
    const Tiles tiles(x.tokens, kMaxTile);
    for (int i = 0; i < tiles.count; i++) {
        const int t0 = tiles.start(i);
        float* o = out + (size_t)t0 * kPair;
        switch (tiles.size(i)) {
            case 1: tile<1>(w, data, x, t0, o); break;
            case 2: tile<2>(w, data, x, t0, o); break;
#define GALLEY_TILE(M) \
    case M: if constexpr (kMaxTile >= M) tile<M>(w, data, x, t0, o); break;
            GALLEY_TILE(3) GALLEY_TILE(4) GALLEY_TILE(5) GALLEY_TILE(6)
#undef GALLEY_TILE
        }
    }
}

static void quantise(const Acts& x, int t0, int t1) {
    const Tiles tiles(x.tokens, kMaxTile);
    int i = 0;
    while (i + 1 < tiles.count && tiles.start(i + 1) <= t0) i++;
    for (int t = t0; t < t1; t++) {
        while (t >= tiles.start(i) + tiles.size(i)) i++;
        const int m = tiles.size(i), at = t - tiles.start(i);
        const size_t base = (size_t)tiles.start(i) * x.groups;
        const float* row = x.x + t * x.ldx;
        for (int g = 0; g < x.groups; g++) {
            int8_t* q = x.q + (base + (size_t)g * m + at) * 32;
            for (int h = 0; h < 2; h++) {
                const size_t o = 2 * base + (size_t)(2 * g + h) * m + at;
                if (g * 32 >= x.cols) {  // cols is a multiple of 32 in every quantised format
                    std::memset(q + 16 * h, 0, 16);
                    x.s[o] = x.ssum[o] = 0.0f, x.sum[o] = 0;
                    continue;
                }
                const vf v = load(row + g * 32 + 16 * h);
                const float top = hmax(vabs(v));
                // Below this there is nothing to represent, and 127/top would overflow.
                const float inv = top > 1e-30f ? 127.0f / top : 0.0f, s = top > 1e-30f ? top / 127.0f : 0.0f;
                const int32_t sum = store_i8(q + 16 * h, mul(v, set1(inv)));
                x.s[o] = s, x.sum[o] = sum, x.ssum[o] = s * (float)sum;
            }
        }
    }
}

}  // namespace GALLEY_NS
