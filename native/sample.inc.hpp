// Drawing one token from one row of logits, in the fixed order of SMP-1, with counter noise (SMP-4): Philox4x32-10
// (Salmon et al., SC'11) keyed by the seed, counter (token >> 2, lane, position), so that a draw depends on nothing else.
#pragma once

namespace GALLEY_NS {

static void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        const uint32_t n0 = (uint32_t)(b >> 32) ^ c[1] ^ k0, n2 = (uint32_t)(a >> 32) ^ c[3] ^ k1;
        c[1] = (uint32_t)b, c[3] = (uint32_t)a, c[0] = n0, c[2] = n2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
}

// Noise of one Philox word: v in (0, 1] and its Gumbel variate -ln(-ln(1 - v)). Large variates come from small v,
// where float32 is fine-grained, so that even tokens of probability 1e-9 are drawn as often as they should be.
inline float noise_word(uint32_t x) { return (float)x * 0x1p-32f + 0x1p-33f; }
inline float gumbel_of(float v) { return -std::log(-std::log1p(-v)); }

static float gumbel(const Draw& d, int token) {
    uint32_t c[4] = {(uint32_t)token >> 2, (uint32_t)d.lane, (uint32_t)d.position, (uint32_t)((uint64_t)d.position >> 32)};
    philox(c, (uint32_t)d.seed, (uint32_t)(d.seed >> 32));
    return gumbel_of(noise_word(c[token & 3]));
}

// Low and high halves of sixteen 32-bit products. Two loops, because compilers make vector code of each alone.
inline void wide(const uint32_t a[16], uint32_t m, uint32_t high[16], uint32_t low[16]) {
    for (int i = 0; i < 16; i++) low[i] = a[i] * m;
    for (int i = 0; i < 16; i++) high[i] = (uint32_t)(((uint64_t)a[i] * m) >> 32);
}

// Words of the 64 tokens first .. first + 63 (first a multiple of 64), sixteen counters abreast.
[[gnu::noinline]] static void philox64(const Draw& d, int first, uint32_t out[64]) {
    uint32_t c0[16], c1[16], c2[16], c3[16], ah[16], al[16], bh[16], bl[16];
    for (int i = 0; i < 16; i++) {
        c0[i] = (uint32_t)(first / 4 + i), c1[i] = (uint32_t)d.lane;
        c2[i] = (uint32_t)d.position, c3[i] = (uint32_t)((uint64_t)d.position >> 32);
    }
    uint32_t k0 = (uint32_t)d.seed, k1 = (uint32_t)(d.seed >> 32);
    for (int round = 0; round < 10; round++) {
        wide(c0, 0xD2511F53u, ah, al), wide(c2, 0xCD9E8D57u, bh, bl);
        for (int i = 0; i < 16; i++) {
            c0[i] = bh[i] ^ c1[i] ^ k0, c2[i] = ah[i] ^ c3[i] ^ k1;
            c1[i] = bl[i], c3[i] = al[i];
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < 16; i++) out[4 * i] = c0[i], out[4 * i + 1] = c1[i], out[4 * i + 2] = c2[i], out[4 * i + 3] = c3[i];
}

constexpr float kGumbelTop = 23.0f;  // no variate is larger: -ln(2^-33) = 22.9

// Whether any of 64 tokens may beat the score: v <= gap, tested in halves of integers and a little too often.
[[gnu::noinline]] static bool promising(const uint32_t words[64], const float gap[64]) {
    int32_t any = 0;
    for (int k = 0; k < 64; k++) {
        const int32_t bar = (int32_t)(std::min(gap[k] * 1.02f, 0.999f) * 0x1p31f) + 64;
        any |= ((int32_t)(words[k] >> 1) <= bar) | (gap[k] > 0.95f);
    }
    return any;
}

// Gumbel-max over every token, without logarithms for those that cannot win: a token beats score b only if
// -ln(1 - v) < e^(z - b), and v <= -ln(1 - v).
static int draw_all(const float* z, int n, const Draw& d, int top, float floor) {
    int best = top;
    float score = z[top] + gumbel(d, top);
    for (int i = 0; i < n; i += 64) {
        const int m = std::min(64, n - i);
        const float bar = std::max(floor, score - kGumbelTop);
        bool any = false;
        for (int k = 0; k < m; k++) any |= z[i + k] >= bar;
        if (!any) continue;
        uint32_t words[64];
        philox64(d, i, words);
        alignas(64) float gap[64];
        for (int k = 0; k < 64; k++) gap[k] = k < m ? z[i + k] - score : -1e30f;
        for (int k = 0; k < 64; k += 16) store(gap + k, vexp(load(gap + k)));
        if (!promising(words, gap)) continue;
        for (int k = 0; k < m; k++) {
            const float v = noise_word(words[k]);
            if (v > gap[k] * 1.01f || z[i + k] < floor) continue;
            const float s = z[i + k] + gumbel_of(v);
            if (s > score || (s == score && i + k < best)) best = i + k, score = s;
        }
    }
    return best;
}

// Descending by logit, then ascending by id: the order in which top_k and top_p keep tokens.
struct Ranked {
    const float* z;
    bool operator()(int a, int b) const { return z[a] > z[b] || (z[a] == z[b] && a < b); }
};

// Ids outside the mask to -inf. Most words are all or nothing.
static void restrict_to(float* z, int n, const uint32_t* mask) {
    for (int i = 0; i < n; i += 32) {
        uint32_t out = ~mask[i >> 5];
        const int m = std::min(32, n - i);
        if (out == 0xFFFFFFFFu) {
            for (int k = 0; k < m; k++) z[i + k] = -INFINITY;
            continue;
        }
        if (m < 32) out &= (1u << m) - 1;
        for (; out; out &= out - 1) z[i + std::countr_zero(out)] = -INFINITY;
    }
}

static void penalise(float* z, int n, const Draw& d) {
    if (d.mask) restrict_to(z, n, d.mask);
    for (int i = 0; i < d.bans; i++) z[d.ban_ids[i]] = -INFINITY;
    for (int i = 0; i < d.biases; i++) z[d.bias_ids[i]] += d.bias_values[i];
    for (int i = 0; i < d.seen; i++) {
        float& v = z[d.seen_ids[i]];
        if (d.repetition != 1.0f) v = v > 0 ? v / d.repetition : v * d.repetition;
        const int count = d.seen_counts[i];
        if (count > 0) v = v - d.frequency * (float)count - d.presence;
    }
}

// -1 when no token has a finite logit. Scratch: n floats and n ints.
static int draw(const float* logits, int n, const Draw& d, float* scratch) {
    float* z = scratch;
    const bool greedy = d.temperature < 1e-5f;
    if (greedy && !d.bans && !d.biases && !d.seen && !d.mask) {
        const int id = argmax(logits, n);
        return std::isfinite(logits[id]) ? id : -1;
    }
    std::memcpy(z, logits, sizeof(float) * n);
    penalise(z, n, d);
    if (greedy) {
        const int id = argmax(z, n);
        return std::isfinite(z[id]) ? id : -1;
    }
    const float t = d.temperature;
    for (int i = 0; i < n; i++) z[i] = z[i] / t;
    const int top = argmax(z, n);
    const float zmax = z[top];
    if (!std::isfinite(zmax)) return -1;

    int* ids = (int*)(scratch + n);
    int m = 0;
    // min_p keeps p >= min_p * max(p), which is z >= zmax + ln(min_p).
    const float floor = d.min_p > 0 ? zmax + std::log(d.min_p) : -INFINITY;
    const bool cut_k = d.top_k > 0 && d.top_k < n, cut_p = d.top_p < 1.0f;
    if (!cut_k && !cut_p) return draw_all(z, n, d, top, floor);
    for (int i = 0; i < n; i++)
        if (z[i] >= floor && z[i] > -INFINITY) ids[m++] = i;
    const Ranked before{z};
    if (cut_k && d.top_k < m) {
        std::nth_element(ids, ids + d.top_k, ids + m, before);
        m = d.top_k;
    }
    if (cut_p) {
        double total = 0;
        for (int i = 0; i < m; i++) total += std::exp((double)(z[ids[i]] - zmax));
        const double want = (double)d.top_p * total;
        // Sort only as far as the mass reaches: 64, 512, … tokens.
        double mass = 0;
        int kept = 0;
        for (int chunk = 64; kept < m; chunk *= 8) {
            const int end = std::min(m, kept + chunk);
            if (end < m) std::nth_element(ids + kept, ids + end, ids + m, before);
            std::sort(ids + kept, ids + end, before);
            bool enough = false;
            for (; kept < end && !enough; kept++) {
                mass += std::exp((double)(z[ids[kept]] - zmax));
                enough = mass >= want;
            }
            if (enough) break;
        }
        m = kept > 0 ? kept : 1;
    }
    int best = top;
    float best_score = -INFINITY;
    for (int i = 0; i < m; i++) {
        const int id = ids[i];
        if (z[id] + kGumbelTop < best_score) continue;
        const float score = z[id] + gumbel(d, id);
        if (score > best_score || (score == best_score && id < best)) best = id, best_score = score;
    }
    return best;
}

}  // namespace GALLEY_NS
