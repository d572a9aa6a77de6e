// Low-rank adapters (Hu et al. 2021, LoRA): what is added to a linear map, for some rows of a step.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace galley {

// A [rank][in] and B [out][rank] of one tensor, float32, the scale already in B.
struct LowRankPair {
    int rank, in, out;
    const float *a, *b;
};
using LowRankTensors = std::map<std::string, LowRankPair>;

// The parts of one input that share it (q, k and v; gate and up): their A stacked to one matrix, a B each.
struct LowRankSite {
    static constexpr int kParts = 3;
    Matrix a;
    Matrix b[kParts];
    int at[kParts] = {0, 0, 0};  // first row of each part in A's result
    std::vector<float> data;
    bool any() const { return a.rows > 0; }
    bool has(int part) const { return b[part].rows > 0; }
    // Packs the parts that are there. Throws std::invalid_argument for shapes that do not fit.
    void pack(const LowRankTensors& t, const std::array<std::string, kParts>& names, const std::array<int, kParts>& outs, int in);
};

struct LowRank {
    struct Layer { LowRankSite qkv, out, ffn, down; };
    std::vector<Layer> layers;
    int widest = 0;  // floats of the largest intermediate result of a token, whole pairs
    size_t bytes = 0;
};

// A run of consecutive rows of a step that have one adapter.
struct LowRankRun {
    const LowRank* adapter;
    int first, end;
};

}  // namespace galley
