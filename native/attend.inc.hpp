// Paged attention for one kv head: any number of query rows against a block table, flash-style over spans of kSpan
// positions. Span borders lie at absolute positions and every row walks positions in ascending order, so a row's
// result does not depend on its neighbours or on how the prompt was cut into chunks.
#pragma once

namespace GALLEY_NS {

static void write_kv(uint16_t* page, int slot, const float* k, const float* v, int head_dim) {
    uint16_t* kp = page + slot;                       // K: [head_dim][16]
    uint16_t* vp = page + (size_t)head_dim * kPage + (size_t)slot * head_dim;  // V: [16][head_dim]
    for (int i = 0; i < head_dim; i += 16) {
        uint16_t h[16];
        store_f16(h, load(k + i));
        for (int j = 0; j < 16; j++) kp[(size_t)(i + j) * kPage] = h[j];
        store_f16(vp + i, load(v + i));
    }
}

// scores[r][0 .. 16 P - 1] = q_r . K of P pages
template <int R, int P>
static void score_pages(const float* q, int head_dim, const uint16_t* const k[P], float* scores) {
    vf a[R][P];
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) a[r][p] = zero();
    for (int d = 0; d < head_dim; d++) {
        vf w[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) w[p] = load_f16(k[p] + d * kPage);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const vf x = set1(q[r * head_dim + d]);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) a[r][p] = fma(x, w[p], a[r][p]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) store(scores + r * kSpan + 16 * p, a[r][p]);
}

// acc[r][64] += sum over n positions of p[r][j] * V[j][64]
template <int R, int W>
static void weigh_values(const float* p, const Attend& a, int first, int n, int d0, float* acc) {
    vf s[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) s[r][w] = load(acc + r * a.head_dim + d0 + 16 * w);
    for (int j = 0; j < n; j++) {
        const int at = first + j;
        const uint16_t* v = a.kv + (size_t)a.blocks[at / kPage] * a.page_stride + (size_t)a.head_dim * kPage +
                            (size_t)(at % kPage) * a.head_dim + d0;
        vf x[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) x[w] = load_f16(v + 16 * w);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const vf k = set1(p[r * kSpan + j]);
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) s[r][w] = fma(k, x[w], s[r][w]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) store(acc + r * a.head_dim + d0 + 16 * w, s[r][w]);
}

template <int R>
static void attend_rows(const Attend& a, int r0) {
    const int hd = a.head_dim;
    const float* q = a.q + (size_t)r0 * hd;
    float* scores = a.scratch;              // [R][kSpan]
    float* acc = scores + R * kSpan;        // [R][head_dim]
    float top[R], total[R];
    int limit[R], last = 0;
    for (int r = 0; r < R; r++) {
        limit[r] = a.first + (r0 + r) / a.group;
        last = limit[r] > last ? limit[r] : last;
        top[r] = -INFINITY, total[r] = 0.0f;
    }
    std::memset(acc, 0, sizeof(float) * R * hd);
    for (int s0 = 0; s0 < last; s0 += kSpan) {
        const int n = last - s0 < kSpan ? last - s0 : kSpan;
        constexpr int P = 2 * R > kQueryRows ? 2 : 4;  // pages at once: few rows leave registers for more
        for (int j = 0; j < n; j += P * kPage) {
            const uint16_t* k[P];
            for (int p = 0; p < P; p++) {
                // Past the last page it is read again; the copies are masked below.
                const int at = j + p * kPage < n ? s0 + j + p * kPage : s0 + n - 1;
                k[p] = a.kv + (size_t)a.blocks[at / kPage] * a.page_stride;
            }
            score_pages<R, P>(q, hd, k, scores + j);
        }
        for (int r = 0; r < R; r++) {
            const int seen = limit[r] - s0;  // visible positions of this span (may be <= 0 or > n)
            float* row = scores + r * kSpan;
            const int padded = (n + kPage - 1) / kPage * kPage;
            vf m = set1(-INFINITY);
            for (int j = 0; j < padded; j += 16) {
                const vf v = keep_first(load(row + j), seen - j, -INFINITY);
                store(row + j, v);
                m = vmax(m, v);
            }
            const float highest = hmax(m);
            if (!(highest > -INFINITY)) {  // nothing visible here: contributes exact zeros
                std::memset(row, 0, sizeof(float) * padded);
                continue;
            }
            const float now = highest > top[r] ? highest : top[r];
            const float scale = top[r] > -INFINITY ? std::exp(top[r] - now) : 0.0f;
            top[r] = now;
            vf sum = zero();
            const vf base = set1(now);
            for (int j = 0; j < padded; j += 16) {
                const vf e = vexp(sub(load(row + j), base));  // exp(-inf) is 0
                store(row + j, e);
                sum = add(sum, e);
            }
            total[r] = total[r] * scale + hsum(sum);
            if (scale != 1.0f) {
                const vf k = set1(scale);
                for (int d = 0; d < hd; d += 16) store(acc + r * hd + d, mul(load(acc + r * hd + d), k));
            }
        }
        int d = 0;
        for (; d + 64 <= hd; d += 64) weigh_values<R, 4>(scores, a, s0, n, d, acc);
        for (; d < hd; d += 16) weigh_values<R, 1>(scores, a, s0, n, d, acc);
    }
    for (int r = 0; r < R; r++) {
        const int at = r0 + r;
        float* out = a.out + (size_t)(at / a.group) * a.out_token + (size_t)(at % a.group) * a.out_head;
        const vf k = set1(1.0f / total[r]);
        for (int d = 0; d < hd; d += 16) store(out + d, mul(load(acc + r * hd + d), k));
    }
}

static void attend(const Attend& a) {
    const Tiles tiles(a.rows, kQueryRows);
    for (int i = 0; i < tiles.count; i++) {
        switch (tiles.size(i)) {
            case 1: attend_rows<1>(a, tiles.start(i)); break;
            case 2: attend_rows<2>(a, tiles.start(i)); break;
#define GALLEY_TILE(R) \
    case R: if constexpr (kQueryRows >= R) attend_rows<R>(a, tiles.start(i)); break;
            GALLEY_TILE(3) GALLEY_TILE(4) GALLEY_TILE(5) GALLEY_TILE(6)
#undef GALLEY_TILE
        }
    }
}

}  // namespace GALLEY_NS
