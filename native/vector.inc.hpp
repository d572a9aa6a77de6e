// Norm, activation, rotation and the horizontal sums they share. Reductions run in one fixed order: lane-wise over the
// row in steps of 16, then a tree over the lanes.
#pragma once

namespace GALLEY_NS {

inline float hsum(vf a) {
    alignas(64) float v[16];
    store(v, a);
    for (int w = 8; w; w >>= 1)
        for (int i = 0; i < w; i++) v[i] += v[i + w];
    return v[0];
}
// e^x, relative error about 2e-7 (Cody-Waite reduction, Cephes polynomial); 0 below -87.3, capped at e^88.
inline vf vexp(vf x) {
    const vf lo = set1(-87.3f);
    const vf c = vmin(vmax(x, lo), set1(88.0f));
    const vf n = round_even(mul(c, set1(1.44269504088896341f)));
    vf r = fma(n, set1(-0.693359375f), c);
    r = fma(n, set1(2.12194440e-4f), r);
    vf p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(mul(r, r), p, add(r, set1(1.0f)));
    return where_less(x, lo, zero(), mul(p, exp2i(n)));
}

static void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
    vf acc = zero();
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const vf v = load(x + i);
        acc = fma(v, v, acc);
    }
    float sum = hsum(acc);
    for (; i < n; i++) sum += x[i] * x[i];
    const float inv = 1.0f / std::sqrt(sum / (float)n + eps);
    const vf k = set1(inv);
    for (i = 0; i + 16 <= n; i += 16) store(out + i, mul(mul(load(x + i), k), load(weight + i)));
    for (; i < n; i++) out[i] = x[i] * inv * weight[i];
}

static void silu_mul(const float* gate, const float* up, int n, float* out) {
    for (int i = 0; i < n; i += 16) {
        const vf g = load(gate + i);
        const vf e = vexp(sub(zero(), g));
        store(out + i, mul(div(g, add(set1(1.0f), e)), load(up + i)));
    }
}

static void rope(float* h, const float* c, const float* s, int dim, bool interleaved) {
    const int half = dim / 2;
    if (interleaved) {
        for (int i = 0; i < half; i++) {
            const float a = h[2 * i], b = h[2 * i + 1];
            h[2 * i] = a * c[i] - b * s[i];
            h[2 * i + 1] = a * s[i] + b * c[i];
        }
    } else {
        for (int i = 0; i < half; i++) {
            const float a = h[i], b = h[i + half];
            h[i] = a * c[i] - b * s[i];
            h[i + half] = a * s[i] + b * c[i];
        }
    }
}

static int argmax(const float* x, int n) {
    int i = 0, best = 0;
    vf top = set1(x[0]);
    for (; i + 16 <= n; i += 16) top = vmax(top, load(x + i));
    float t = hmax(top);
    for (; i < n; i++) t = t > x[i] ? t : x[i];
    for (best = 0; best < n && !(x[best] == t);) best++;
    return best < n ? best : 0;
}

static float log_sum_exp(const float* x, int n) {
    const float top = x[argmax(x, n)];
    vf acc = zero();
    const vf m = set1(top);
    int i = 0;
    for (; i + 16 <= n; i += 16) acc = add(acc, vexp(sub(load(x + i), m)));
    if (i < n) {
        alignas(64) float tail[16];
        for (int k = 0; k < 16; k++) tail[k] = i + k < n ? x[i + k] : -1e30f;
        acc = add(acc, vexp(sub(load(tail), m)));
    }
    return top + std::log(hsum(acc));
}

}  // namespace GALLEY_NS
