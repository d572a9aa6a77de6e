// Who attends to what: a step's attention cut into tasks that threads take from one list.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.hpp"
#include "share.hpp"

namespace galley {

namespace {

constexpr int kUnitTokens = 8;   // tokens of a sequence whose rows pass over the pages together
constexpr int kTaskRows = 48;    // rows of a span shared between sequences that pass over it together
constexpr int kSpanBlocks = kSpan / kPage;

}  // namespace

// Cuts the step into tasks, the same for every layer and head. Sequences of one token whose tables start with the same
// blocks (a shared prompt) take those spans together, so that their keys and values are read once: cascade attention
// (Juravsky et al., 2024; Ye et al., 2024). A long context that few units have is cut into its spans, so that all
// threads can work on it. Neither changes a bit of any row: spans and the order of joining are always the same.
void Model::plan_attention(const Step& s) {
    const Shape& m = shape_;
    const int group = m.heads / m.kv_heads;
    units_.clear(), tasks_.clear(), members_.clear();
    chunks_ = false;
    for (int i = 0; i < s.sequences; i++) {
        const int n = s.seq_start[i + 1] - s.seq_start[i];
        chunks_ |= n > 1;
        for (int t = 0; t < n; t += kUnitTokens) {
            const int tokens = std::min(kUnitTokens, n - t), last = s.context[i] + t + tokens;
            units_.push_back({i, s.seq_start[i] + t, tokens, (last + kSpan - 1) / kSpan, -1});
        }
    }
    const int count = (int)units_.size();
    const bool few = count * m.kv_heads < 4 * pool_.size();
    int parts = 0;
    std::vector<int> together;  // units of one token and several spans
    // later tiles of a chunk see more positions: longest work first
    for (int u = count - 1; u >= 0; u--) {
        Unit& unit = units_[u];
        if (unit.spans == 1 || (unit.tokens > 1 && !few)) {
            tasks_.push_back({-1, (int)members_.size(), 1});
            members_.push_back(u);
            continue;
        }
        unit.part = parts, parts += unit.spans;
        if (unit.tokens == 1) {
            together.push_back(u);
            continue;
        }
        for (int span = 0; span < unit.spans; span++) {
            tasks_.push_back({span, (int)members_.size(), 1});
            members_.push_back(u);
        }
    }
    // Walks down the spans: those that still hold the same blocks stay together.
    const auto same = [&](int a, int b, int span) {
        const Unit &x = units_[a], &y = units_[b];
        const int from = span * kSpanBlocks;
        return std::memcmp(s.blocks + s.block_start[x.seq] + from, s.blocks + s.block_start[y.seq] + from, sizeof(int32_t) * kSpanBlocks) == 0;
    };
    const auto whole = [&](int u, int span) { return (span + 1) * kSpan <= s.context[units_[u].seq] + 1; };
    std::vector<std::vector<int>> groups;
    if (!together.empty()) groups.push_back(std::move(together));
    for (int span = 0; !groups.empty(); span++) {
        std::vector<std::vector<int>> next;
        for (auto& g : groups) {
            std::vector<std::vector<int>> split;
            for (int u : g) {
                if (span >= units_[u].spans) continue;
                auto at = split.end();
                if (whole(u, span))
                    at = std::find_if(split.begin(), split.end(), [&](const auto& o) { return whole(o[0], span) && same(o[0], u, span); });
                if (at == split.end()) split.push_back({u});
                else at->push_back(u);
            }
            for (auto& o : split) {
                const int step = std::max(1, kTaskRows / group);
                for (size_t i = 0; i < o.size(); i += step) {
                    tasks_.push_back({span, (int)members_.size(), (int)std::min<size_t>(step, o.size() - i)});
                    for (size_t k = i; k < std::min(o.size(), i + step); k++) members_.push_back(o[k]);
                }
                next.push_back(std::move(o));
            }
        }
        groups = std::move(next);
    }
    unit_rows_ = (few ? kUnitTokens : 1) * group;
    grow(parts_, (size_t)parts * m.kv_heads * unit_rows_ * part_floats(m.head_dim));
    if (left_.size() < (size_t)count * m.kv_heads) left_ = std::vector<std::atomic<int>>((size_t)count * m.kv_heads);
    for (int u = 0; u < count; u++)
        for (int h = 0; h < m.kv_heads; h++) left_[(size_t)u * m.kv_heads + h].store(units_[u].spans, std::memory_order_relaxed);
    const int rows = std::max(kUnitTokens * group, std::max(1, kTaskRows / group) * group);
    for (auto& scratch : attn_scratch_) grow(scratch, span_scratch(m.head_dim) + (size_t)rows * (m.head_dim + 2 * part_floats(m.head_dim)));
}

// Bias, norm, rotation and scaling of the query heads that share a kv head.
void Model::turn_queries(int layer, int token, int head, float* out) {
    const Shape& m = shape_;
    const Layer& l = layers_[layer];
    const int group = m.heads / m.kv_heads, hd = m.head_dim, half = m.rope_dim / 2, at = head * group * hd;
    const float* row = qkv_.data() + (size_t)token * (m.q_rows() + 2 * m.kv_rows()) + at;
    const float *c = cos_.data() + (size_t)token * half, *sn = sin_.data() + (size_t)token * half;
    const float scale = 1.0f / std::sqrt((float)hd);
    for (int i = 0; i < group * hd; i++) out[i] = l.bias ? row[i] + l.bias[at + i] : row[i];
    for (int g = 0; g < group; g++) {
        float* h = out + (size_t)g * hd;
        if (l.q_norm) k_.rms_norm(h, l.q_norm, m.rms_eps, hd, h);
        k_.rope(h, c, sn, m.rope_dim, m.rope_interleaved);
        for (int i = 0; i < hd; i++) h[i] *= scale;
    }
}

// Bias, norm and rotation of a token's key, in place; key and value into the cache.
void Model::write_token(const Step& s, int layer, int token, int head) {
    const Shape& m = shape_;
    const Layer& l = layers_[layer];
    const int hd = m.head_dim, half = m.rope_dim / 2, seq = seq_of_[token], at = m.q_rows() + head * hd;
    float *k = qkv_.data() + (size_t)token * (m.q_rows() + 2 * m.kv_rows()) + at, *v = k + m.kv_rows();
    if (l.bias)
        for (int i = 0; i < hd; i++) k[i] += l.bias[at + i], v[i] += l.bias[at + m.kv_rows() + i];
    if (l.k_norm) k_.rms_norm(k, l.k_norm, m.rms_eps, hd, k);
    k_.rope(k, cos_.data() + (size_t)token * half, sin_.data() + (size_t)token * half, m.rope_dim, m.rope_interleaved);
    const int pos = s.context[seq] + token - s.seq_start[seq];
    k_.write_kv(kv_type_, page(layer, s.blocks[s.block_start[seq] + pos / kPage], head), pos % kPage, k, v, hd);
}

void Model::attend_task(const Step& s, const Task& task, int layer, int head, int thread) {
    const Shape& m = shape_;
    const int group = m.heads / m.kv_heads, hd = m.head_dim, ld = part_floats(hd);
    const int* units = members_.data() + task.first;
    float* scratch = attn_scratch_[thread].data();
    float* q = scratch + span_scratch(hd);
    int rows = 0, visible[std::max(kTaskRows, kMostGroup * kUnitTokens)];
    for (int i = 0; i < task.units; i++) {
        const Unit& u = units_[units[i]];
        // Chunks have written their keys before; a single token is written by whoever has its last span.
        if (!chunks_ && (task.span < 0 || task.span == u.spans - 1)) write_token(s, layer, u.token, head);
        for (int t = 0; t < u.tokens; t++, rows += group) turn_queries(layer, u.token + t, head, q + (size_t)rows * hd);
    }
    float *state = q + (size_t)rows * hd, *part = state + (size_t)rows * ld;
    const auto out = [&](const Unit& u, int r) {
        return att_.data() + (size_t)(u.token + r / group) * m.q_rows() + (size_t)(head * group + r % group) * hd;
    };
    const Unit& first = units_[units[0]];
    const auto attend_to = [&](int span, float* to) {
        const int from = span * kSpan;
        int last = 0, r = 0;
        for (int i = 0; i < task.units; i++) {
            const Unit& u = units_[units[i]];
            for (int t = 0; t < u.tokens; t++)
                for (int g = 0; g < group; g++, r++) {
                    visible[r] = s.context[u.seq] + u.token + t - s.seq_start[u.seq] + 1 - from;
                    last = std::max(last, visible[r]);
                }
        }
        k_.attend({q, rows, hd, kv_type_, page(layer, 0, head), page_bytes(kv_type_, hd) * m.kv_heads * m.layers,
                   s.blocks + s.block_start[first.seq] + from / kPage, std::min(kSpan, last), visible, to, scratch});
    };
    if (task.span < 0) {
        for (int span = 0; span < first.spans; span++) {
            attend_to(span, span ? part : state);
            if (span)
                for (int r = 0; r < rows; r++) k_.join(state + (size_t)r * ld, part + (size_t)r * ld, hd);
        }
        for (int r = 0; r < rows; r++) k_.finish(state + (size_t)r * ld, hd, out(first, r));
        return;
    }
    attend_to(task.span, state);
    const size_t stride = (size_t)unit_rows_ * ld;
    for (int i = 0, r = 0; i < task.units; i++) {
        const Unit& u = units_[units[i]];
        const int n = u.tokens * group;
        const auto at = [&](int span) { return parts_.data() + ((size_t)(u.part + span) * m.kv_heads + head) * stride; };
        std::memcpy(at(task.span), state + (size_t)r * ld, sizeof(float) * n * ld);
        r += n;
        std::atomic<int>& left = left_[(size_t)units[i] * m.kv_heads + head];
        if (left.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
        left.store(u.spans, std::memory_order_relaxed);  // for the next layer
        for (int k = 0; k < n; k++) {
            for (int span = 1; span < u.spans; span++) k_.join(at(0) + (size_t)k * ld, at(span) + (size_t)k * ld, hd);
            k_.finish(at(0) + (size_t)k * ld, hd, out(u, k));
        }
    }
}

void Model::attend(const Step& s, int layer, int thread) {
    const Shape& m = shape_;
    if (chunks_) {
        const auto [t0, t1] = share(s.count, thread, pool_.size());
        for (int t = t0; t < t1; t++)
            for (int h = 0; h < m.kv_heads; h++) write_token(s, layer, t, h);
        pool_.barrier();
    }
    const int items = (int)tasks_.size() * m.kv_heads;
    for (int i; (i = next_[layer].fetch_add(1, std::memory_order_relaxed)) < items;)
        attend_task(s, tasks_[i / m.kv_heads], layer, i % m.kv_heads, thread);
}

}  // namespace galley
