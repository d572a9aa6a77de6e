// Quantising by the vector operations every instruction set has. AVX-512 brings its own, which takes four halves at once.
#pragma once

namespace GALLEY_NS {

// 64 values to two pieces.
inline void quantise_super(const float* x, Piece& p0, Piece& p1) {
    for (int g = 0; g < 2; g++, x += 32) {
        Piece& p = g ? p1 : p0;
        float s[2], part[2];
        for (int h = 0; h < 2; h++) {
            const vf v = load(x + 16 * h);
            const float top = hmax(vabs(v));
            // Below this there is nothing to represent, and 127/top would overflow.
            s[h] = top > 1e-30f ? top / 127.0f : 0.0f;
            const int32_t sum = store_i8(p.q + 16 * h, mul(v, set1(top > 1e-30f ? 127.0f / top : 0.0f)));
            p.bias4[h] = -8 * sum, p.bias8[h] = -kBias8 * sum;
            part[h] = s[h] * (float)sum;
        }
        p.low = s[0], p.high = p.high_nibble = s[1], p.sum = part[0] + part[1];
    }
}

}  // namespace GALLEY_NS
