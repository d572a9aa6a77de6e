// Paged attention for one kv head and one span of positions, any number of query rows. Every row takes its positions in
// ascending order, and spans are joined in ascending order by `join`, so a row's result does not depend on its neighbours,
// on how the prompt was cut into chunks, or on which thread computed which span.
#pragma once

namespace GALLEY_NS {

// Where things lie in a page of f16: K [head_dim][16], V [16][head_dim].
struct Page16 {
    const uint8_t* at;
    int head_dim;
    vf keys(int d) const { return load_f16((const uint16_t*)at + d * kPage); }
    vf values(int slot, int d) const { return load_f16((const uint16_t*)at + (size_t)(kPage + slot) * head_dim + d); }
    size_t value_offset(int d) const { return (size_t)2 * (kPage * head_dim + d); }
};

static void write_f16(uint8_t* page, int slot, const float* k, const float* v, int head_dim) {
    uint16_t* kp = (uint16_t*)page + slot;
    uint16_t* vp = (uint16_t*)page + (size_t)head_dim * kPage + (size_t)slot * head_dim;
    for (int i = 0; i < head_dim; i += 16) {
        uint16_t h[16];
        store_f16(h, load(k + i));
        for (int j = 0; j < 16; j++) kp[(size_t)(i + j) * kPage] = h[j];
        store_f16(vp + i, load(v + i));
    }
}

// scores[r][0 .. 16 P - 1] = q_r . K of P pages. Pages of a head lie far apart in the arena, where no hardware prefetcher
// finds the next: with AHEAD those of the next call are asked for meanwhile.
template <int R, int P, bool AHEAD>
static void score_pages(const float* q, const Page16 pages[P], const Page16 ahead[P], float* scores) {
    constexpr int line = 2;  // dimensions in a cache line
    const int head_dim = pages[0].head_dim;
    vf a[R][P];
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) a[r][p] = zero();
    for (int d = 0; d < head_dim; d++) {
        if (AHEAD && d % line == 0)
            for (int p = 0; p < P; p++) __builtin_prefetch(ahead[p].at + d / line * 64);
        vf w[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) w[p] = pages[p].keys(d);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const vf x = set1(q[r * head_dim + d]);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) a[r][p] = fma(x, w[p], a[r][p]);
        }
    }
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++) store(scores + r * kSpan + 16 * p, a[r][p]);
}

// acc[r][16 W] += sum over the span's positions of p[r][j] * V[j][16 W], from column d0 on
template <int R, int W, bool AHEAD>
static void weigh_values(const float* p, const Span& a, int d0, float* acc, int ld) {
    vf s[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) s[r][w] = zero();
    for (int j0 = 0; j0 < a.positions; j0 += kPage) {
        const Page16 page{a.kv + (size_t)a.blocks[j0 / kPage] * a.stride, a.head_dim};
        const int n = a.positions - j0 < kPage ? a.positions - j0 : kPage;
        const int following = j0 + kPage < a.positions ? j0 / kPage + 1 : j0 / kPage;
        const uint8_t* ahead = a.kv + (size_t)a.blocks[following] * a.stride + page.value_offset(d0);
        for (int j = 0; j < n; j++) {
            if (AHEAD)
                for (int b = 0; b < 32 * W; b += 64) __builtin_prefetch(ahead + (size_t)j * 2 * a.head_dim + b);
            vf x[W];
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) x[w] = page.values(j, d0 + 16 * w);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                const vf k = set1(p[r * kSpan + j0 + j]);
#pragma GCC unroll 4
                for (int w = 0; w < W; w++) s[r][w] = fma(k, x[w], s[r][w]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) store(acc + r * ld + d0 + 16 * w, s[r][w]);
}

// Masks rows of scores and takes their softmax over the span, as far as one span goes: highest score and sum of
// exponentials go to `parts`, the exponentials take the scores' place. Rows that see nothing become exact zeros.
static void soften(const Span& a, int r0, int rows, float* scores, float* parts) {
    const int hd = a.head_dim, n = a.positions, ld = part_floats(hd), padded = (n + kPage - 1) / kPage * kPage;
    for (int r = 0; r < rows; r++) {
        const int seen = a.visible[r0 + r] < n ? a.visible[r0 + r] : n;
        float* row = scores + r * kSpan;
        vf m = set1(-INFINITY);
        for (int j = 0; j < padded; j += 16) {
            const vf v = keep_first(load(row + j), seen - j, -INFINITY);
            store(row + j, v);
            m = vmax(m, v);
        }
        const float top = hmax(m);
        parts[r * ld + hd] = top;
        if (!(top > -INFINITY)) {
            std::memset(row, 0, sizeof(float) * padded);
            parts[r * ld + hd + 1] = 0.0f;
            continue;
        }
        vf sum = zero();
        const vf base = set1(top);
        for (int j = 0; j < padded; j += 16) {
            const vf e = vexp(sub(load(row + j), base));  // exp(-inf) is 0
            sum = add(sum, e);
            store(row + j, e);
        }
        parts[r * ld + hd + 1] = hsum(sum);
    }
}

template <int R, bool AHEAD>
static void attend_f16(const Span& a, int r0) {
    const int hd = a.head_dim, n = a.positions, ld = part_floats(hd);
    float* scores = a.scratch;  // [R][kSpan]
    float* parts = a.parts + (size_t)r0 * ld;
    constexpr int P = 4 * R <= kScores ? 4 : 2;  // pages at once: few rows leave registers for more
    const auto page = [&](int at) -> Page16 { return {a.kv + (size_t)a.blocks[at / kPage] * a.stride, hd}; };
    for (int j = 0; j < n; j += P * kPage) {
        Page16 pages[P], ahead[P];
        for (int p = 0; p < P; p++) {
            // Past the last page it is read again; the copies are masked below.
            pages[p] = page(std::min(j + p * kPage, n - 1));
            if (AHEAD) ahead[p] = page(std::min(j + (P + p) * kPage, n - 1));
        }
        score_pages<R, P, AHEAD>(a.q + (size_t)r0 * hd, pages, ahead, scores + j);
    }
    soften(a, r0, R, scores, parts);
    int d = 0;
    for (; d + 64 <= hd; d += 64) weigh_values<R, 4, AHEAD>(scores, a, d, parts, ld);
    for (; d < hd; d += 16) weigh_values<R, 1, AHEAD>(scores, a, d, parts, ld);
}

// The usual joining of two softmaxes (Milakov and Gimelshein, 2018).
static void join(float* state, const float* part, int head_dim) {
    const float m0 = state[head_dim], m1 = part[head_dim];
    if (!(m1 > -INFINITY)) return;
    const float top = m1 > m0 ? m1 : m0;
    const float k0 = m0 > -INFINITY ? std::exp(m0 - top) : 0.0f, k1 = std::exp(m1 - top);
    for (int d = 0; d < head_dim; d += 16)
        store(state + d, fma(load(part + d), set1(k1), mul(load(state + d), set1(k0))));
    state[head_dim] = top;
    state[head_dim + 1] = part[head_dim + 1] * k1 + state[head_dim + 1] * k0;
}

static void finish(const float* state, int head_dim, float* out) {
    const vf k = set1(1.0f / state[head_dim + 1]);
    for (int d = 0; d < head_dim; d += 16) store(out + d, mul(load(state + d), k));
}

}  // namespace GALLEY_NS
