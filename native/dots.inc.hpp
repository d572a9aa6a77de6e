// The most that an instruction set's dot products can do: what the speed of linears is a fraction of.
#pragma once

namespace GALLEY_NS {

static double dots(long rounds, int32_t& sink) {
    uint8_t bytes[64 * kChains];
    int8_t x[64];
    for (int i = 0; i < 64 * kChains; i++) bytes[i] = (uint8_t)(i * 7 & 15);
    for (int i = 0; i < 64; i++) x[i] = (int8_t)(i * 5 - 128);
    vb w[kChains];
    vi sum[kChains];
    // Unrolled by order: a loop that is left over keeps the sums in memory, and reports a quarter of the peak.
#pragma GCC unroll 12
    for (int c = 0; c < kChains; c++) w[c] = load_bytes(bytes + 64 * c), sum[c] = iset1(sink);
    for (long r = 0; r < rounds; r++) {
        const quad v = load_quad(x + 4 * (r & 15));  // another each round, or products would be taken out of the loop
#pragma GCC unroll 12
        for (int c = 0; c < kChains; c++) sum[c] = dot4(sum[c], w[c], v);
    }
    vf total = zero();
#pragma GCC unroll 12
    for (int c = 0; c < kChains; c++) total = add(total, to_float(sum[c]));
    sink = (int32_t)std::fmod(hsum(total), 1000.0f);
    return (double)rounds * kChains * 128;
}

}  // namespace GALLEY_NS
