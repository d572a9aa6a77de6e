// Attention over pages of int8, in integers: a query row becomes 15-bit numbers, kept as two bytes (128 high + low), and
// so do the weights of the values. Every product is then a byte times a byte and every sum exact, so the result does not
// depend on the instruction set's order of adding. Rounding a query to 1/16256 of its largest element and a weight to
// 1/16256 of the row's largest adds an error a hundred times below that of the int8 keys and values themselves.
#pragma once

namespace GALLEY_NS {

// K [head_dim / 4][16 tokens][4], V [16 tokens / 4][head_dim][4]: a 64-byte vector holds four dimensions of sixteen keys,
// or four tokens of sixteen dimensions, as `dot8` takes them. Then a float scale for each key, and for each value.
struct Page8 {
    const uint8_t* at;
    int head_dim;
    static size_t key(int slot, int d) { return (size_t)(d / 4) * 64 + slot * 4 + d % 4; }
    size_t value(int slot, int d) const { return (size_t)kPage * head_dim + (size_t)(slot / 4) * 4 * head_dim + d * 4 + slot % 4; }
    const float* key_scales() const { return (const float*)(at + (size_t)2 * kPage * head_dim); }
    const float* value_scales() const { return key_scales() + kPage; }
};

static void write_i8(uint8_t* page, int slot, const float* k, const float* v, int head_dim) {
    const Page8 to{page, head_dim};
    float* scales = (float*)(page + (size_t)2 * kPage * head_dim);
    for (int part = 0; part < 2; part++) {
        const float* x = part ? v : k;
        vf m = zero();
        for (int i = 0; i < head_dim; i += 16) m = vmax(m, vabs(load(x + i)));
        const float top = hmax(m), inv = top > 1e-30f ? 127.0f / top : 0.0f;
        scales[part * kPage + slot] = top > 1e-30f ? top / 127.0f : 0.0f;
        for (int i = 0; i < head_dim; i += 16) {
            alignas(16) int8_t q[16];
            store_i8(q, mul(load(x + i), set1(inv)));
            for (int j = 0; j < 16; j++) page[part ? to.value(slot, i + j) : Page8::key(slot, i + j)] = (uint8_t)q[j];
        }
    }
}

constexpr float kFine = 16256.0f;  // 127 * 128: the largest number of two such bytes

// A row of n floats (a multiple of 16) as 128 high + low, both within [-127, 127], times `unit`. High and low bytes are
// summed in two passes: the sums of both at once are more than the registers hold.
struct Fine {
    struct Half {
        const int8_t* bytes;
        int32_t bias;  // what sums of dot8 over the whole row start from
    } high, low;
    float unit;
};

static int32_t sum_bytes(const int8_t* x, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    return sum;
}

static Fine refine(const float* x, int n, int8_t* high, int8_t* low) {
    vf m = zero();
    for (int i = 0; i < n; i += 16) m = vmax(m, vabs(load(x + i)));
    const float top = hmax(m);
    const vf k = set1(top > 1e-30f ? kFine / top : 0.0f);
    for (int i = 0; i < n; i += 16) {
        const vf v = round_even(mul(load(x + i), k)), h = round_even(mul(v, set1(1.0f / 128)));
        store_i8(high + i, h);
        store_i8(low + i, fma(h, set1(-128.0f), v));
    }
    Fine fine{{high, 0}, {low, 0}, top > 1e-30f ? top / kFine : 0.0f};
    if constexpr (kBias8 != 0) fine.high.bias = -kBias8 * sum_bytes(high, n), fine.low.bias = -kBias8 * sum_bytes(low, n);
    return fine;
}

// scores[r][0 .. 16 P - 1] = q_r . K of P pages: high bytes first, then with LOW the rest, scaled.
template <int R, int P, bool LOW, bool AHEAD>
static void score_bytes(const Fine q[R], const Page8 pages[P], const Page8 ahead[P], float* scores) {
    const int head_dim = pages[0].head_dim;
    vi a[R][P];
    const int8_t* bytes[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        const Fine::Half& half = LOW ? q[r].low : q[r].high;
        bytes[r] = half.bytes;
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) a[r][p] = iset1(half.bias);
    }
    for (int d = 0; d < head_dim; d += 4) {
        if (AHEAD)
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) __builtin_prefetch(ahead[p].at + (size_t)d * kPage);
        vb w[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) w[p] = prepare8(load_bytes(pages[p].at + (size_t)d * kPage));
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const quad x = load_quad(bytes[r] + d);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) a[r][p] = dot8(a[r][p], w[p], x);
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
        const vf scale = load(pages[p].key_scales());
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            float* to = scores + r * kSpan + 16 * p;
            const vf sum = to_float(a[r][p]);
            store(to, LOW ? mul(fma(load(to), set1(128.0f), sum), mul(scale, set1(q[r].unit))) : sum);
        }
    }
}

// acc[r][16 W] = sum over the span's positions of p[r][j] * V[j][16 W], from column d0 on; in two passes as well.
template <int R, int W, bool LOW, bool AHEAD>
static void weigh_bytes(const Fine p[R], const Span& a, int d0, float* acc, int ld) {
    vi s[R][W];
    const int8_t* bytes[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        const Fine::Half& half = LOW ? p[r].low : p[r].high;
        bytes[r] = half.bytes;
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) s[r][w] = iset1(half.bias);
    }
    const size_t quad_row = (size_t)4 * a.head_dim;
    for (int j0 = 0; j0 < a.positions; j0 += kPage) {
        const Page8 page{a.kv + (size_t)a.blocks[j0 / kPage] * a.stride, a.head_dim};
        const int following = j0 + kPage < a.positions ? j0 / kPage + 1 : j0 / kPage;
        const size_t from = page.value(0, d0);
        const uint8_t *at = page.at + from, *ahead = a.kv + (size_t)a.blocks[following] * a.stride + from;
        // Slots past the last position have the weight 0, whatever an earlier owner left in them.
#pragma GCC unroll 4
        for (int j = 0; j < kPage; j += 4, at += quad_row, ahead += quad_row) {
            if (AHEAD)
#pragma GCC unroll 4
                for (int w = 0; w < W; w++) __builtin_prefetch(ahead + 64 * w);
            vb x[W];
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) x[w] = prepare8(load_bytes(at + 64 * w));
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                const quad k = load_quad(bytes[r] + j0 + j);
#pragma GCC unroll 4
                for (int w = 0; w < W; w++) s[r][w] = dot8(s[r][w], x[w], k);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) {
            float* to = acc + r * ld + d0 + 16 * w;
            const vf sum = to_float(s[r][w]);
            store(to, LOW ? mul(fma(load(to), set1(128.0f), sum), set1(p[r].unit)) : sum);
        }
}

template <int R, bool AHEAD>
static void attend_i8(const Span& a, int r0) {
    const int hd = a.head_dim, n = a.positions, ld = part_floats(hd), padded = (n + kPage - 1) / kPage * kPage;
    float* scores = a.scratch;  // [R][kSpan], then the bytes
    float* parts = a.parts + (size_t)r0 * ld;
    int8_t* bytes = (int8_t*)(scores + kMostRows * kSpan);
    const int width = std::max(kSpan, hd);
    Fine fine[R];
    for (int r = 0; r < R; r++)
        fine[r] = refine(a.q + (size_t)(r0 + r) * hd, hd, bytes + (size_t)2 * r * width, bytes + (size_t)(2 * r + 1) * width);
    constexpr int P = 4 * R <= kScores ? 4 : 2;
    const auto page = [&](int at) -> Page8 { return {a.kv + (size_t)a.blocks[at / kPage] * a.stride, hd}; };
    for (int j = 0; j < n; j += P * kPage) {
        Page8 pages[P], ahead[P];
        for (int p = 0; p < P; p++) {
            // Past the last page it is read again; the copies are masked below.
            pages[p] = page(std::min(j + p * kPage, n - 1));
            if (AHEAD) ahead[p] = page(std::min(j + (P + p) * kPage, n - 1));
        }
        score_bytes<R, P, false, AHEAD>(fine, pages, ahead, scores + j);
        score_bytes<R, P, true, false>(fine, pages, ahead, scores + j);
    }
    soften(a, r0, R, scores, parts);
    for (int r = 0; r < R; r++) {
        float* row = scores + r * kSpan;
        for (int j = 0; j < padded; j += 16) store(row + j, mul(load(row + j), load(page(j).value_scales())));
        fine[r] = refine(row, padded, bytes + (size_t)2 * r * width, bytes + (size_t)(2 * r + 1) * width);
    }
    int d = 0;
    for (; d + 16 * P <= hd; d += 16 * P) {
        weigh_bytes<R, P, false, AHEAD>(fine, a, d, parts, ld);
        weigh_bytes<R, P, true, false>(fine, a, d, parts, ld);
    }
    for (; d < hd; d += 16) {
        weigh_bytes<R, 1, false, AHEAD>(fine, a, d, parts, ld);
        weigh_bytes<R, 1, true, false>(fine, a, d, parts, ld);
    }
}

}  // namespace GALLEY_NS
