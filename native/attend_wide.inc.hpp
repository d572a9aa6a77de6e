// Attention of many rows over pages of f16: a chunk of a prompt, or sequences that share a prefix. Pages are turned into
// floats once for all tiles of rows, a few at a time so that they stay in the first cache; converting them anew for every
// tile takes a third of its time. Each row adds up the same products in the same order as in `attend_f16`: the same bits.
#pragma once

namespace GALLEY_NS {

constexpr int kWidePages = 4, kWideSpan = kWidePages * kPage;

// scores[r][0 .. 63] = q_r . K, keys [page][head_dim][16]
template <int R>
static void score_floats(const float* q, const float* keys, int head_dim, float* scores) {
    constexpr int P = kWidePages > kWideScores / R ? kWideScores / R : kWidePages;  // pages at once
    static_assert(P > 0);
    for (int p0 = 0; p0 < kWidePages; p0 += P) {
        vf a[R][P];
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) a[r][p] = zero();
        const float* k = keys + (size_t)p0 * head_dim * kPage;
        for (int d = 0; d < head_dim; d++) {
            vf w[P];
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) w[p] = load(k + ((size_t)std::min(p, kWidePages - 1 - p0) * head_dim + d) * kPage);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                const vf x = set1(q[r * head_dim + d]);
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) a[r][p] = fma(x, w[p], a[r][p]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P && p0 + p < kWidePages; p++) store(scores + r * kSpan + 16 * (p0 + p), a[r][p]);
    }
}

// acc[r][16 W] (= with `first`, else +=) the sum over n positions of p[r][j] * V[j][16 W], from column d0 on
template <int R, int W>
static void weigh_floats(const float* p, const float* values, int n, int head_dim, int d0, bool first, float* acc, int ld) {
    vf s[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) s[r][w] = first ? zero() : load(acc + r * ld + d0 + 16 * w);
    for (int j = 0; j < n; j++) {
        vf x[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) x[w] = load(values + (size_t)j * head_dim + d0 + 16 * w);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const vf k = set1(p[r * kSpan + j]);
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) s[r][w] = fma(k, x[w], s[r][w]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) store(acc + r * ld + d0 + 16 * w, s[r][w]);
}

template <int R>
static void weigh_wide(const float* p, const float* values, int n, int head_dim, bool first, float* acc, int ld) {
    constexpr int W = kWideScores / R > 4 ? 4 : kWideScores / R;
    int d = 0;
    for (; d + 16 * W <= head_dim; d += 16 * W) weigh_floats<R, W>(p, values, n, head_dim, d, first, acc, ld);
    for (; d < head_dim; d += 16) weigh_floats<R, 1>(p, values, n, head_dim, d, first, acc, ld);
}

// `run` with the number of rows as a constant.
template <class F>
static void with_rows(int rows, const F& run) {
    switch (rows) {
        case 1: run(std::integral_constant<int, 1>()); break;
        case 2: run(std::integral_constant<int, 2>()); break;
#define GALLEY_TILE(R) \
    case R: if constexpr (kWideRows >= R) run(std::integral_constant<int, R>()); break;
        GALLEY_TILE(3) GALLEY_TILE(4) GALLEY_TILE(5) GALLEY_TILE(6)
#undef GALLEY_TILE
    }
}

static void attend_wide(const Span& a) {
    const int hd = a.head_dim, n = a.positions, ld = part_floats(hd);
    float *floats = a.scratch, *scores = floats + (size_t)kWideSpan * hd;
    const auto page = [&](int at) -> Page16 { return {a.kv + (size_t)a.blocks[at / kPage] * a.stride, hd}; };
    for (int from = 0; from < a.rows; from += kWideBlock) {
        const int rows = std::min(kWideBlock, a.rows - from);
        const Tiles tiles(rows, kWideRows);
        float* parts = a.parts + (size_t)from * ld;
        for (int j = 0; j < n; j += kWideSpan) {
            for (int p = 0; p < kWidePages && j + p * kPage < n; p++) {
                const Page16 from_page = page(j + p * kPage);
                for (int d = 0; d < hd; d++) store(floats + ((size_t)p * hd + d) * kPage, from_page.keys(d));
            }
            // What the buffer holds past the last page gives scores that are masked.
            for (int i = 0; i < tiles.count; i++)
                with_rows(tiles.size(i), [&](auto r) {
                    const int at = tiles.start(i);
                    score_floats<r()>(a.q + (size_t)(from + at) * hd, floats, hd, scores + (size_t)at * kSpan + j);
                });
        }
        soften(a, from, rows, scores, parts);
        for (int j = 0; j < n; j += kWideSpan) {
            const int count = std::min(kWideSpan, n - j);
            for (int k = 0; k < count; k++) {
                const Page16 from_page = page(j + k);
                for (int d = 0; d < hd; d += 16) store(floats + (size_t)k * hd + d, from_page.values(k % kPage, d));
            }
            for (int i = 0; i < tiles.count; i++)
                with_rows(tiles.size(i), [&](auto r) {
                    const int at = tiles.start(i);
                    weigh_wide<r()>(scores + (size_t)at * kSpan + j, floats, count, hd, j == 0, parts + (size_t)at * ld, ld);
                });
        }
    }
}

}  // namespace GALLEY_NS
