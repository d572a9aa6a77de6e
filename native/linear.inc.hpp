// Matrix times activations. Every output element is summed over groups in ascending order in one accumulator, so its
// value does not depend on how many tokens share the step: batch invariance (SMP-6) by construction.
#pragma once

namespace GALLEY_NS {

inline constexpr int kRecord4 = 1024, kRecord8 = 2048;
inline constexpr int kNarrowTiles = 2;  // up to so many tiles read five and six bits as they are
inline constexpr int kAhead = 4608;  // bytes: covers memory latency once a record takes more than a hundred cycles

// Adds one half group: acc += dot * (d * s).
template <int M>
static inline void add_half(vf acc[M][2], const vi dot[M][2], const vf d[2], const Piece* x, float Piece::*scale) {
#pragma GCC unroll 6
    for (int t = 0; t < M; t++) {
        const vf s = set1(x[t].*scale);
        acc[t][0] = fma(to_float(dot[t][0]), mul(d[0], s), acc[t][0]);
        acc[t][1] = fma(to_float(dot[t][1]), mul(d[1], s), acc[t][1]);
    }
}

template <int M>
static inline void add_minimum(vf acc[M][2], const uint16_t* m, const Piece* x) {
    const vf m0 = load_f16(m), m1 = load_f16(m + 16);
#pragma GCC unroll 6
    for (int t = 0; t < M; t++) {
        const vf s = set1(x[t].sum);
        acc[t][0] = fma(m0, s, acc[t][0]);
        acc[t][1] = fma(m1, s, acc[t][1]);
    }
}

template <int M>
static inline void put(const vf acc[M][2], float* out, size_t ldo, bool sum) {
    for (int t = 0; t < M; t++) {
        float* o = out + t * ldo;
        store(o, sum ? add(load(o), acc[t][0]) : acc[t][0]);
        store(o + 16, sum ? add(load(o + 16), acc[t][1]) : acc[t][1]);
    }
}

template <int M, bool MIN>
static void tile_q4(const uint8_t* w, int supers, const Piece* x, float* out, size_t ldo, bool sum) {
    vf acc[M][2];
    for (int t = 0; t < M; t++) acc[t][0] = acc[t][1] = zero();
    constexpr size_t bytes = kRecord4 + (MIN ? 256 : 128);
    for (int b = 0; b < supers; b++, w += bytes) {
        const uint16_t* scales = (const uint16_t*)(w + kRecord4);
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++, x += M) {
            const uint8_t* wg = w + g * 512;
            for (int c = 0; c < 512; c += 64) __builtin_prefetch(wg + c + kAhead);
            const vf d[2] = {load_f16(scales + g * 32), load_f16(scales + g * 32 + 16)};
            // low nibbles are columns 0..15, high nibbles 16..31: each half has an activation scale of its own
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                vi dot[M][2];
                for (int t = 0; t < M; t++) dot[t][0] = dot[t][1] = iset1(MIN ? 0 : x[t].bias4[h]);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const vb r0 = load_bytes(wg + 64 * i), r1 = load_bytes(wg + 256 + 64 * i);
                    const vb w0 = h ? high_nibbles(r0) : low_nibbles(r0), w1 = h ? high_nibbles(r1) : low_nibbles(r1);
#pragma GCC unroll 6
                    for (int t = 0; t < M; t++) {
                        const quad v = load_quad(x[t].q + 16 * h + 4 * i);
                        dot[t][0] = dot4(dot[t][0], w0, v);
                        dot[t][1] = dot4(dot[t][1], w1, v);
                    }
                }
                add_half<M>(acc, dot, d, x, h ? &Piece::high_nibble : &Piece::low);
            }
            if constexpr (MIN) add_minimum<M>(acc, scales + 64 + g * 32, x);
        }
    }
    put<M>(acc, out, ldo, sum);
}

// HALVES: the weights too have a scale for columns 0..15 and one for 16..31.
template <int M, bool MIN, bool HALVES>
static void tile_q8(const uint8_t* w, int supers, const Piece* x, float* out, size_t ldo, bool sum) {
    vf acc[M][2];
    for (int t = 0; t < M; t++) acc[t][0] = acc[t][1] = zero();
    constexpr size_t bytes = kRecord8 + (MIN || HALVES ? 256 : 128);
    for (int b = 0; b < supers; b++, w += bytes) {
        const uint16_t* scales = (const uint16_t*)(w + kRecord8);
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++, x += M) {
            const uint8_t* wg = w + g * 1024;
            for (int c = 0; c < 1024; c += 64) __builtin_prefetch(wg + c + kAhead);
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                vi dot[M][2];
                for (int t = 0; t < M; t++) dot[t][0] = dot[t][1] = iset1(kBias8 ? x[t].bias8[h] : 0);
#pragma GCC unroll 4
                for (int i = 4 * h; i < 4 * h + 4; i++) {
                    const vb w0 = prepare8(load_bytes(wg + 64 * i)), w1 = prepare8(load_bytes(wg + 512 + 64 * i));
#pragma GCC unroll 6
                    for (int t = 0; t < M; t++) {
                        const quad v = load_quad(x[t].q + 4 * i);
                        dot[t][0] = dot8(dot[t][0], w0, v);
                        dot[t][1] = dot8(dot[t][1], w1, v);
                    }
                }
                const uint16_t* at = HALVES ? scales + g * 64 + h * 16 : scales + g * 32;
                const vf d[2] = {load_f16(at), load_f16(at + (HALVES ? 32 : 16))};
                add_half<M>(acc, dot, d, x, h ? &Piece::high : &Piece::low);
            }
            if constexpr (MIN) add_minimum<M>(acc, scales + 64 + g * 32, x);
        }
    }
    put<M>(acc, out, ldo, sum);
}

// f(0), f(1) … f(N - 1), each with its number as a constant.
template <class F, int... I>
[[gnu::always_inline]] inline void each(std::integer_sequence<int, I...>, F f) { (f(std::integral_constant<int, I>{}), ...); }

// The sixteen columns of half H of one group and panel, four at a time: use(i, bytes) for i in 0..3. The bytes are
// unsigned. `nibbles` is the group's first vector of them, `above` the vector of the bits above.
template <int ABOVE, int H, class F>
[[gnu::always_inline]] inline void compose(const uint8_t* nibbles, vb above, F use) {
    each(std::make_integer_sequence<int, 4>{}, [&](auto i) __attribute__((always_inline)) {
        const vb r = load_bytes(nibbles + 64 * i);
        use(i, join_bits<(ABOVE == 2 ? 2 * i : 4 * H + i), ABOVE>(H ? shifted_nibbles(r) : low_nibbles(r), above));
    });
}

// Five and six bits: nibbles and the bits above them are put together again in registers.
template <int M, Layout L>
static void tile_above(const uint8_t* w, int supers, const Piece* x, float* out, size_t ldo, bool sum) {
    constexpr int above = Super(L).above, quants = Super(L).quants(), bytes = Super(L).bytes();
    constexpr bool halves = Super(L).halves, minimum = Super(L).minimum;
    constexpr int bias = minimum ? 0 : above == 2 ? 4 : 2;  // in units of 8
    vf acc[M][2];
    for (int t = 0; t < M; t++) acc[t][0] = acc[t][1] = zero();
    for (int b = 0; b < supers; b++, w += bytes) {
        const uint16_t* scales = (const uint16_t*)(w + quants);
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++, x += M) {
            const uint8_t *nibbles = w + g * 512, *bits = w + 1024 + g * 128 * above;
            for (int c = 0; c < quants / 2; c += 64) __builtin_prefetch(w + g * (quants / 2) + c + kAhead);
            each(std::make_integer_sequence<int, 2>{}, [&](auto h) __attribute__((always_inline)) {
                vi dot[M][2];
                for (int t = 0; t < M; t++)
                    dot[t][0] = dot[t][1] = iset1(h ? x[t].bias4[1] / kHigh * bias : x[t].bias4[0] * bias);
                const uint8_t* a = bits + (above == 2 ? 64 * h : 0);
                const vb a0 = load_bytes(a), a1 = load_bytes(a + 64 * above);
                const auto feed = [&](int panel, int i, vb v) __attribute__((always_inline)) {
#pragma GCC unroll 6
                    for (int t = 0; t < M; t++) dot[t][panel] = dot4(dot[t][panel], v, load_quad(x[t].q + 16 * h + 4 * i));
                };
                compose<above, h>(nibbles, a0, [&](int i, vb v) __attribute__((always_inline)) { feed(0, i, v); });
                compose<above, h>(nibbles + 256, a1, [&](int i, vb v) __attribute__((always_inline)) { feed(1, i, v); });
                const uint16_t* at = halves ? scales + g * 64 + h * 16 : scales + g * 32;
                const vf d[2] = {load_f16(at), load_f16(at + (halves ? 32 : 16))};
                add_half<M>(acc, dot, d, x, h ? &Piece::high : &Piece::low);
            });
            if constexpr (minimum) add_minimum<M>(acc, scales + 64 + g * 32, x);
        }
    }
    put<M>(acc, out, ldo, sum);
}

// A pair of panels in the wider layout: where many tokens wait, putting the bits together once is cheaper.
template <Layout L>
static void widen(const uint8_t* w, int supers, uint8_t* out) {
    constexpr int above = Super(L).above, quants = Super(L).quants(), scales = Super(L).scales();
    constexpr int bias = Super(L).minimum ? 0 : above == 2 ? 32 : 16;
    for (int b = 0; b < supers; b++, w += quants + scales, out += kRecord8 + scales) {
        for (int part = 0; part < 4; part++)  // [group 2][panel 2]
            each(std::make_integer_sequence<int, 2>{}, [&](auto h) __attribute__((always_inline)) {
                const vb a = load_bytes(w + 1024 + 64 * above * part + (above == 2 ? 64 * h : 0));
                compose<above, h>(w + 256 * part, a, [&](int i, vb v) __attribute__((always_inline)) {
                    store_bytes(out + 512 * part + 256 * h + 64 * i, sub_bytes(v, bias));
                });
            });
        std::memcpy(out + kRecord8, w + quants, scales);
    }
}

template <int M, Layout L>
static void tile_float(const uint8_t* w, int cols, const float* x, size_t ldx, float* out, size_t ldo, bool sum) {
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
    put<M>(acc, out, ldo, sum);
}

template <int M>
static void tile(Layout layout, const Matrix& w, const uint8_t* data, const Acts& x, int t0, float* out, size_t ldo, bool sum) {
    const Piece* p = x.pieces + (size_t)t0 * x.groups;
    const float* f = x.x + t0 * x.ldx;
    switch (layout) {
        case Layout::q4: return tile_q4<M, false>(data, w.supers, p, out, ldo, sum);
        case Layout::q4m: return tile_q4<M, true>(data, w.supers, p, out, ldo, sum);
        case Layout::q5: return tile_above<M, Layout::q5>(data, w.supers, p, out, ldo, sum);
        case Layout::q5m: return tile_above<M, Layout::q5m>(data, w.supers, p, out, ldo, sum);
        case Layout::q6: return tile_above<M, Layout::q6>(data, w.supers, p, out, ldo, sum);
        case Layout::q8: return tile_q8<M, false, false>(data, w.supers, p, out, ldo, sum);
        case Layout::q8m: return tile_q8<M, true, false>(data, w.supers, p, out, ldo, sum);
        case Layout::q8s16: return tile_q8<M, false, true>(data, w.supers, p, out, ldo, sum);
        case Layout::f16: return tile_float<M, Layout::f16>(data, w.cols, f, x.ldx, out, ldo, sum);
        case Layout::bf16: return tile_float<M, Layout::bf16>(data, w.cols, f, x.ldx, out, ldo, sum);
        case Layout::f32: return tile_float<M, Layout::f32>(data, w.cols, f, x.ldx, out, ldo, sum);
    }
}

static void linear(const Matrix& w, const Acts& x, int pair, int tile0, int tile1, float* out, size_t ldo, bool sum) {
    const uint8_t* data = w.data + (size_t)pair * w.pair_stride;
    const Tiles tiles(x.tokens, kMaxTile);
    Layout layout = w.layout;
    if (tile1 - tile0 > kNarrowTiles && wider(layout) != layout) {
        if (layout == Layout::q5) widen<Layout::q5>(data, w.supers, x.room);
        else if (layout == Layout::q5m) widen<Layout::q5m>(data, w.supers, x.room);
        else widen<Layout::q6>(data, w.supers, x.room);
        layout = wider(layout), data = x.room;
    }
    for (int i = tile0; i < tile1; i++) {
        const int t0 = tiles.start(i);
        float* o = out + (size_t)t0 * ldo;
        switch (tiles.size(i)) {
            case 1: tile<1>(layout, w, data, x, t0, o, ldo, sum); break;
            case 2: tile<2>(layout, w, data, x, t0, o, ldo, sum); break;
#define GALLEY_TILE(M) \
    case M: if constexpr (kMaxTile >= M) tile<M>(layout, w, data, x, t0, o, ldo, sum); break;
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
        const int m = tiles.size(i);
        Piece* piece = x.pieces + (size_t)tiles.start(i) * x.groups + (t - tiles.start(i));
        const float* row = x.x + t * x.ldx;
        int g = 0;
        for (; (g + 2) * 32 <= x.cols; g += 2, piece += 2 * m) quantise_super(row + g * 32, piece[0], piece[m]);
        if (g < x.groups) {  // cols is a multiple of 32 in every quantised format
            alignas(64) float last[64] = {};
            std::memcpy(last, row + g * 32, 32 * sizeof(float));
            quantise_super(last, piece[0], piece[m]);
        }
    }
}

}  // namespace GALLEY_NS
