// Adapters beside the quantised weights: x A^T B^T in float32, added to the rows that want it.
//
// Every product goes through the float kernel, whose sums run over columns in order in one accumulator, so a row's
// result does not depend on the rows it is computed with (SMP-6). Rows without an adapter are not touched.
#include "lowrank.hpp"

#include <algorithm>
#include <stdexcept>

#include "model.hpp"
#include "share.hpp"

namespace galley {

namespace {

constexpr int kChunk = 24;  // rows of a run that one thread takes at a time

size_t packed(int rows, int cols) { return (size_t)(rows + kPair - 1) / kPair * cols * kPair; }

// Lays `rows` rows out as the float kernel reads them, from row `from` on: [pair][column][32].
void lay(float* to, int cols, int from, const float* rows, int count) {
    for (int r = 0; r < count; r++) {
        const int row = from + r;
        float* pair = to + (size_t)(row / kPair) * cols * kPair + row % kPair;
        for (int c = 0; c < cols; c++) pair[(size_t)c * kPair] = rows[(size_t)r * cols + c];
    }
}

void describe(Matrix& m, int rows, int cols, const float* data) {
    m.layout = Layout::f32, m.rows = rows, m.cols = cols;
    m.pairs = (rows + kPair - 1) / kPair;
    m.supers = (cols + kSuper - 1) / kSuper;
    m.pair_stride = (size_t)cols * kPair * sizeof(float);
    m.data = (const uint8_t*)data;
}

}  // namespace

void LowRankSite::pack(const LowRankTensors& t, const std::array<std::string, kParts>& names, const std::array<int, kParts>& outs, int in) {
    const LowRankPair* parts[kParts] = {};
    int rows = 0;
    size_t floats = 0;
    for (int i = 0; i < kParts; i++) {
        const auto it = names[i].empty() ? t.end() : t.find(names[i]);
        if (it == t.end()) continue;
        const LowRankPair& p = it->second;
        if (p.in != in || p.out != outs[i] || p.rank < 1) throw std::invalid_argument("adapter: " + names[i] + " does not have the model's shape");
        parts[i] = &p;
        at[i] = rows, rows += p.rank;
        floats += packed(p.out, p.rank);
    }
    if (!rows) return;
    floats += packed(rows, in);
    data.assign(floats, 0.0f);
    float* to = data.data();
    describe(a, rows, in, to);
    for (int i = 0; i < kParts; i++)
        if (parts[i]) lay(to, in, at[i], parts[i]->a, parts[i]->rank);
    to += packed(rows, in);
    for (int i = 0; i < kParts; i++)
        if (parts[i]) {
            describe(b[i], outs[i], parts[i]->rank, to);
            lay(to, parts[i]->rank, 0, parts[i]->b, outs[i]);
            to += packed(outs[i], parts[i]->rank);
        }
}

void Model::set_adapter(int slot, const LowRankTensors& tensors) {
    if (slot < 0 || slot >= kAdapterSlots) throw std::invalid_argument("adapter: there is no such slot");
    if ((int)adapters_.size() <= slot) adapters_.resize(slot + 1);
    if (tensors.empty()) {
        adapters_[slot].reset();
        return;
    }
    const Shape& s = shape_;
    auto made = std::make_unique<LowRank>();
    made->layers.resize(s.layers);
    size_t used = 0;
    for (int i = 0; i < s.layers; i++) {
        const std::string b = "blk." + std::to_string(i) + ".";
        LowRank::Layer& l = made->layers[i];
        l.qkv.pack(tensors, {b + "attn_q", b + "attn_k", b + "attn_v"}, {s.q_rows(), s.kv_rows(), s.kv_rows()}, s.hidden);
        l.out.pack(tensors, {b + "attn_output", "", ""}, {s.hidden, 0, 0}, s.q_rows());
        l.ffn.pack(tensors, {b + "ffn_gate", b + "ffn_up", ""}, {s.ffn, s.ffn, 0}, s.hidden);
        l.down.pack(tensors, {b + "ffn_down", "", ""}, {s.hidden, 0, 0}, s.ffn);
        for (const LowRankSite* site : {&l.qkv, &l.out, &l.ffn, &l.down}) {
            made->widest = std::max(made->widest, site->a.pairs * kPair);
            made->bytes += site->data.size() * sizeof(float);
            for (const Matrix& m : site->b) used += m.rows > 0;
        }
    }
    if (used != tensors.size()) throw std::invalid_argument("adapter: it has tensors for which the model has no place");
    adapters_[slot] = std::move(made);
}

// Which rows have which adapter; `rows` lists the tokens of the rows, or is null for all in order.
void Model::plan_adapters(const Step& s, const int32_t* const* rows, const int* counts, std::vector<LowRankRun>& runs) const {
    runs.clear();
    int place = 0;
    const auto add = [&](int token) {
        const int seq = seq_of_[token], slot = seq < s.adapter_count ? s.adapters[seq] : -1;
        const LowRank* adapter = slot < 0 ? nullptr : adapters_[slot].get();
        if (adapter) {
            if (!runs.empty() && runs.back().adapter == adapter && runs.back().end == place)
                runs.back().end++;
            else
                runs.push_back({adapter, place, place + 1});
        }
        place++;
    };
    if (!rows) {
        for (int t = 0; t < s.count; t++) add(t);
        return;
    }
    for (int list = 0; list < 2; list++)
        for (int r = 0; r < counts[list]; r++) add(rows[list][r]);
}

// low_[row] = A x[row] for every row that has an adapter with this site.
void Model::lower(const std::vector<LowRankRun>& runs, int layer, LowRankSite LowRank::Layer::*site, const float* x, size_t ldx, int thread) {
    int item = 0;
    for (const LowRankRun& run : runs) {
        const LowRankSite& w = run.adapter->layers[layer].*site;
        if (!w.any()) continue;
        for (int first = run.first; first < run.end; first += kChunk)
            for (int p = 0; p < w.a.pairs; p++) {
                if (item++ % pool_.size() != thread) continue;
                Acts a;
                a.tokens = std::min(kChunk, run.end - first), a.cols = w.a.cols;
                a.x = x + (size_t)first * ldx, a.ldx = ldx;
                k_.linear(w.a, a, p, 0, Tiles(a.tokens, k_.max_tile).count, low_.data() + (size_t)first * low_ld_ + p * kPair, low_ld_, false);
            }
    }
}

// out[row] += B low_[row], one part of a site: pairs [p0, p1) of its rows, rows [t0, t1) of the step.
void Model::raise(const std::vector<LowRankRun>& runs, int layer, LowRankSite LowRank::Layer::*site, int part, int p0, int p1, int t0, int t1,
                  float* out, size_t ldo, size_t pair_stride, bool whole_pairs, int thread) {
    for (const LowRankRun& run : runs) {
        const LowRankSite& w = run.adapter->layers[layer].*site;
        const int first = std::max(run.first, t0), end = std::min(run.end, t1);
        if (!w.has(part) || first >= end) continue;
        const Matrix& b = w.b[part];
        Acts a;
        a.tokens = end - first, a.cols = b.cols;
        a.x = low_.data() + (size_t)first * low_ld_ + w.at[part], a.ldx = low_ld_;
        const int tiles = Tiles(a.tokens, k_.max_tile).count;
        for (int p = p0; p < std::min(p1, b.pairs); p++) {
            const int n = b.rows - p * kPair;
            float* to = out + (size_t)first * ldo + (size_t)(p - p0) * pair_stride;
            if (n >= kPair || whole_pairs) {
                k_.linear(b, a, p, 0, tiles, to, ldo, true);
                continue;
            }
            float* tile = tile_[thread].data();  // the last rows: a whole pair would not fit into the output
            k_.linear(b, a, p, 0, tiles, tile, kPair, false);
            for (int t = 0; t < a.tokens; t++)
                for (int i = 0; i < n; i++) to[t * ldo + i] += tile[(size_t)t * kPair + i];
        }
    }
}

// The same for all rows, each thread its own part of the output.
void Model::raise_all(const std::vector<LowRankRun>& runs, int layer, LowRankSite LowRank::Layer::*site, int part, int rows, int tokens, float* out,
                      size_t ldo, int thread) {
    const auto [p0, p1] = share((rows + kPair - 1) / kPair, thread, pool_.size());
    raise(runs, layer, site, part, p0, p1, 0, tokens, out + (size_t)p0 * kPair, ldo, kPair, false, thread);
}

}  // namespace galley
