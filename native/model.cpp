#include "model.hpp"
#include "share.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace galley {

namespace {

constexpr int kRedundant = 8;   // up to this many tokens every thread norms and quantises for itself: cheaper than a barrier
// Activations of this size stay in the second-level cache while the weights of one pair of panels after another pass.
constexpr size_t kBlockBytes = 384 << 10;

}  // namespace

void Model::Buffers::fit(int tokens, int cols) {
    grow(pieces, (size_t)tokens * ((cols + kSuper - 1) / kSuper * 2));
}

Model::Model(const Shape& shape, const Tensors& tensors, const Kernels& kernels, int threads, int blocks, Kv kv)
    : shape_(shape), k_(kernels), pool_(threads), blocks_(blocks), kv_type_(kv), vocab_pad_((shape.vocab + 31) / 32 * 32),
      layers_(shape.layers), own_(pool_.size()), tile_(pool_.size()), attn_scratch_(pool_.size()),
      draw_scratch_(pool_.size()), next_(shape.layers), taken_(pool_.size()) {
    if (shape.head_dim % 16) throw std::invalid_argument("head_dim " + std::to_string(shape.head_dim) + " is not a multiple of 16");
    if (shape.heads / shape.kv_heads > kMostGroup) throw std::invalid_argument("more than " + std::to_string(kMostGroup) + " query heads share a kv head");
    if (shape.hidden % 16 || shape.ffn % 16) throw std::invalid_argument("hidden and ffn sizes must be multiples of 16");
    if (blocks < 1) throw std::invalid_argument("at least one KV block is needed");
    for (int i = 0; i < shape.rope_dim / 2; i++) {
        double f = std::pow(shape.rope_base, -2.0 * i / shape.rope_dim) / shape.rope_scale;
        if (!shape.rope_factors.empty()) f /= shape.rope_factors[i];
        inv_freq_.push_back(f);
    }
    for (auto& t : taken_) t = std::vector<std::atomic<int>>((size_t)shape.layers * kOps + 1 + 16);  // 16: a line of its own
    pack(tensors);
    kv_ = std::make_unique<Arena>(page_bytes(kv_type_, shape.head_dim) * shape.kv_heads * shape.layers * blocks);
}

uint8_t* Model::page(int layer, int block, int head) const {
    return kv_->data() + (((size_t)block * shape_.layers + layer) * shape_.kv_heads + head) * page_bytes(kv_type_, shape_.head_dim);
}

void Model::check(const Step& s) const {
    const auto fail = [](const char* what) { throw std::invalid_argument(what); };
    if (s.seq_start[0] != 0 || s.block_start[0] != 0) fail("step: offsets must start at 0");
    if (s.seq_start[s.sequences] != s.count || s.block_start[s.sequences] != s.block_count) fail("step: offsets must end at the array's length");
    for (int i = 0; i < s.sequences; i++) {
        const int n = s.seq_start[i + 1] - s.seq_start[i], blocks = s.block_start[i + 1] - s.block_start[i];
        if (n < 1) fail("step: a sequence without tokens");
        if (s.context[i] < 0 || (int64_t)s.context[i] + n > (int64_t)blocks * kPage) fail("step: block table too short for its context");
    }
    for (int i = 0; i < s.count; i++)
        if (s.tokens[i] < 0 || s.tokens[i] >= shape_.vocab) fail("step: token id outside the vocabulary");
    for (int i = 0; i < s.block_count; i++)
        if (s.blocks[i] < 0 || s.blocks[i] >= blocks_) fail("step: block id outside the arena");
    for (int i = 0; i < s.outputs; i++)
        if (s.out[i] < 0 || s.out[i] >= s.count || (i && s.out[i] <= s.out[i - 1])) fail("step: output rows must ascend within the step");
    for (int i = 0; i < s.state_count; i++)
        if (s.states[i] < 0 || s.states[i] >= s.count || (i && s.states[i] <= s.states[i - 1])) fail("step: state rows must ascend within the step");
    if (s.adapter_count > s.sequences) fail("step: more adapters than sequences");
    for (int i = 0; i < s.adapter_count; i++)
        if (s.adapters[i] >= 0 && (s.adapters[i] >= (int)adapters_.size() || !adapters_[s.adapters[i]])) fail("step: an adapter's slot is empty");
}

void Model::step(const Step& s) {
    outputs_ = state_count_ = 0;
    if (s.count == 0) return;
    check(s);
    const Shape& m = shape_;
    // Rows that go on past the last attention: a token may be wanted as logits and as a state, and is then there twice.
    const size_t T = s.count, R = (size_t)s.outputs + s.state_count, most = std::max(T, R);
    grow(x_, T * m.hidden), grow(qkv_, T * (m.q_rows() + 2 * m.kv_rows())), grow(att_, T * m.q_rows()), grow(h_, most * m.ffn);
    grow(xo_, R * m.hidden), grow(atto_, R * m.q_rows()), grow(states_, (size_t)s.state_count * m.hidden);
    grow(logits_, (size_t)s.outputs * vocab_pad_);
    grow(cos_, T * m.rope_dim / 2), grow(sin_, T * m.rope_dim / 2), grow(seq_of_, T);
    const int widest = std::max({m.hidden, m.q_rows(), m.ffn});
    shared_.fit(most, widest);
    grow(shared_.x, most * m.hidden);
    for (int i = 0; i < pool_.size(); i++) {
        own_[i].fit(kRedundant, widest);
        grow(own_[i].room, narrow_ ? pair_bytes(Layout::q8m, widest) : 0);
        grow(own_[i].x, (size_t)kRedundant * m.hidden);
        grow(tile_[i], most * kPair * 2);
    }
    for (int i = 0; i < s.sequences; i++)
        for (int t = s.seq_start[i]; t < s.seq_start[i + 1]; t++) seq_of_[t] = i;
    plan_attention(s);
    runs_.clear(), last_runs_.clear();
    if (s.adapter_count) {
        const int32_t* rows[2] = {s.out, s.states};
        const int counts[2] = {s.outputs, s.state_count};
        plan_adapters(s, nullptr, nullptr, runs_);
        plan_adapters(s, rows, counts, last_runs_);
        low_ld_ = 0;
        for (const LowRankRun& run : runs_) low_ld_ = std::max<size_t>(low_ld_, run.adapter->widest);
        grow(low_, most * low_ld_);
    }
    for (auto& n : next_) n.store(0, std::memory_order_relaxed);
    for (auto& thread : taken_)
        for (auto& n : thread) n.store(0, std::memory_order_relaxed);
    pool_.run([&](int thread) { forward(s, thread); });
    outputs_ = s.outputs, state_count_ = s.state_count;
}

Acts Model::prepared(const float* x, size_t ldx, int cols, int tokens, int thread, bool quantise) {
    Buffers& b = tokens <= kRedundant ? own_[thread] : shared_;
    Acts a;
    a.tokens = tokens, a.cols = cols, a.groups = (cols + kSuper - 1) / kSuper * 2;
    a.x = x, a.ldx = ldx;
    a.pieces = b.pieces.data(), a.room = own_[thread].room.data();
    if (!quantise) return a;
    if (tokens <= kRedundant) {
        k_.quantise(a, 0, tokens);
    } else {
        const auto [t0, t1] = share(tokens, thread, pool_.size());
        k_.quantise(a, t0, t1);
        pool_.barrier();
    }
    return a;
}

Acts Model::normed(const float* x, const float* weight, int tokens, int thread, bool quantise) {
    const int n = shape_.hidden;
    if (tokens <= kRedundant) {
        float* out = own_[thread].x.data();
        for (int t = 0; t < tokens; t++) k_.rms_norm(x + (size_t)t * n, weight, shape_.rms_eps, n, out + (size_t)t * n);
        return prepared(out, n, n, tokens, thread, quantise);
    }
    float* out = shared_.x.data();
    const auto [t0, t1] = share(tokens, thread, pool_.size());
    for (int t = t0; t < t1; t++) k_.rms_norm(x + (size_t)t * n, weight, shape_.rms_eps, n, out + (size_t)t * n);
    if (!quantise) pool_.barrier();
    return prepared(out, n, n, tokens, thread, quantise);
}

// Calls f(pair, first tile, end tile) for every pair of panels and every block of tokens, spread over the threads. Each
// thread walks its own contiguous part of the weights, one sequential stream, and takes from the others' when it is done:
// a core that is slowed down for a moment does not hold up the rest.
template <class F>
void Model::spread(int work, int pairs, const Acts& a, bool quantised, int thread, F f) {
    const int threads = pool_.size();
    const Tiles tiles(a.tokens, k_.max_tile);
    const size_t token = quantised ? (size_t)a.groups * sizeof(Piece) : (size_t)a.cols * sizeof(float);
    const int step = std::max<int>(1, (int)(kBlockBytes / (token * k_.max_tile))), blocks = (tiles.count + step - 1) / step;
    for (int other = 0; other < threads; other++) {
        const int owner = (thread + other) % threads;
        const auto [p0, p1] = share(pairs, owner, threads);
        const int mine = p1 - p0;
        std::atomic<int>& next = taken_[owner][work];
        for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < mine * blocks;) {
            const int b = i / mine;
            f(p0 + i % mine, b * step, std::min(tiles.count, (b + 1) * step));
        }
    }
}

// W x for every token, to out or added to it.
void Model::multiply(const Matrix& w, const Acts& a, int work, float* out, size_t ldo, bool add, int thread) {
    spread(work, w.pairs, a, w.quantised(), thread, [&](int p, int i0, int i1) {
        const int n = w.rows - p * kPair;
        if (n >= kPair) return k_.linear(w, a, p, i0, i1, out + p * kPair, ldo, add);
        float* tile = tile_[thread].data();  // the last rows: a whole pair would not fit into the output
        k_.linear(w, a, p, i0, i1, tile, kPair, false);
        const Tiles tiles(a.tokens, k_.max_tile);
        for (int t = tiles.start(i0); t < tiles.start(i1 - 1) + tiles.size(i1 - 1); t++)
            for (int i = 0; i < n; i++) {
                float& o = out[t * ldo + p * kPair + i];
                o = add ? o + tile[(size_t)t * kPair + i] : tile[(size_t)t * kPair + i];
            }
    });
}

void Model::forward(const Step& s, int thread) {
    const Shape& m = shape_;
    const int threads = pool_.size(), H = m.hidden;
    {
        const auto [t0, t1] = share(s.count, thread, threads);
        const size_t bytes = row_bytes(embedding_.type, H);
        const int half = m.rope_dim / 2;
        for (int t = t0; t < t1; t++) {
            dequantise_row(embedding_.type, embedding_.data + (size_t)s.tokens[t] * bytes, H, x_.data() + (size_t)t * H);
            const double pos = s.context[seq_of_[t]] + t - s.seq_start[seq_of_[t]];
            for (int i = 0; i < half; i++) {
                const double angle = pos * inv_freq_[i];
                cos_[(size_t)t * half + i] = (float)std::cos(angle);
                sin_[(size_t)t * half + i] = (float)std::sin(angle);
            }
        }
        pool_.barrier();
    }
    float *x = x_.data(), *att = att_.data();
    int T = s.count;
    const std::vector<LowRankRun>* runs = &runs_;
    const bool adapted = !runs_.empty();  // the same for all threads of a step: barriers below depend on it
    using Low = LowRank::Layer;
    for (int i = 0; i < m.layers; i++) {
        const Layer& l = layers_[i];
        bool quantised = false;
        for (const Segment& g : l.qkv) quantised |= g.w.quantised();
        const Acts a = normed(x, l.attn_norm, T, thread, quantised);
        if (adapted) lower(*runs, i, &Low::qkv, a.x, a.ldx, thread);
        for (size_t g = 0; g < l.qkv.size(); g++)
            multiply(l.qkv[g].w, a, i * kOps + kQkv + (int)g, qkv_.data() + l.qkv[g].offset,
                     m.q_rows() + 2 * m.kv_rows(), false, thread);
        pool_.barrier();
        if (adapted) {
            const int wide = m.q_rows() + 2 * m.kv_rows(), rows[3] = {m.q_rows(), m.kv_rows(), m.kv_rows()};
            for (int part = 0, at = 0; part < 3; at += rows[part++])
                raise_all(*runs, i, &Low::qkv, part, rows[part], T, qkv_.data() + at, wide, thread);
            pool_.barrier();
        }
        attend(s, i, thread);
        pool_.barrier();
        if (i == m.layers - 1 && (s.outputs < T || s.state_count)) {
            // Past the last attention a token matters only if its logits or its state are wanted; first the former.
            const auto [r0, r1] = share(s.outputs + s.state_count, thread, threads);
            for (int r = r0; r < r1; r++) {
                const size_t t = r < s.outputs ? s.out[r] : s.states[r - s.outputs];
                std::memcpy(xo_.data() + (size_t)r * H, x + t * H, sizeof(float) * H);
                std::memcpy(atto_.data() + (size_t)r * m.q_rows(), att + t * m.q_rows(), sizeof(float) * m.q_rows());
            }
            x = xo_.data(), att = atto_.data(), T = s.outputs + s.state_count;
            runs = &last_runs_;
            pool_.barrier();
            if (T == 0) return;
        }
        const Acts o = prepared(att, m.q_rows(), m.q_rows(), T, thread, l.o.quantised());
        if (adapted) lower(*runs, i, &Low::out, att, m.q_rows(), thread);
        multiply(l.o, o, i * kOps + kOut, x, H, true, thread);
        pool_.barrier();
        if (adapted) {
            raise_all(*runs, i, &Low::out, 0, H, T, x, H, thread);
            pool_.barrier();
        }
        const Acts f = normed(x, l.ffn_norm, T, thread, l.gate.quantised() || l.up.quantised());
        if (adapted) {
            lower(*runs, i, &Low::ffn, f.x, f.ldx, thread);
            pool_.barrier();
        }
        {
            float *g = tile_[thread].data(), *u = g + (size_t)T * kPair;
            const Tiles tiles(T, k_.max_tile);
            spread(i * kOps + kFfn, l.gate.pairs, f, l.gate.quantised() && l.up.quantised(), thread, [&](int p, int i0, int i1) {
                k_.linear(l.gate, f, p, i0, i1, g, kPair, false);
                k_.linear(l.up, f, p, i0, i1, u, kPair, false);
                if (adapted) {
                    const int t0 = tiles.start(i0), t1 = tiles.start(i1 - 1) + tiles.size(i1 - 1);
                    raise(*runs, i, &Low::ffn, 0, p, p + 1, t0, t1, g, kPair, kPair, true, thread);
                    raise(*runs, i, &Low::ffn, 1, p, p + 1, t0, t1, u, kPair, kPair, true, thread);
                }
                const int n = std::min(kPair, m.ffn - p * kPair);
                for (int t = tiles.start(i0); t < tiles.start(i1 - 1) + tiles.size(i1 - 1); t++)
                    k_.silu_mul(g + (size_t)t * kPair, u + (size_t)t * kPair, n, h_.data() + (size_t)t * m.ffn + p * kPair);
            });
        }
        pool_.barrier();
        const Acts d = prepared(h_.data(), m.ffn, m.ffn, T, thread, l.down.quantised());
        if (adapted) lower(*runs, i, &Low::down, h_.data(), m.ffn, thread);
        multiply(l.down, d, i * kOps + kDown, x, H, true, thread);
        pool_.barrier();
        if (adapted) {
            raise_all(*runs, i, &Low::down, 0, H, T, x, H, thread);
            pool_.barrier();
        }
    }
    const auto [r0, r1] = share(s.state_count, thread, threads);
    for (int r = r0; r < r1; r++)
        k_.rms_norm(x + (size_t)(s.outputs + r) * H, out_norm_, m.rms_eps, H, states_.data() + (size_t)r * H);
    T = s.outputs;
    if (T == 0) return;
    const Acts a = normed(x, out_norm_, T, thread, head_.quantised());
    // vocab_pad_ is a whole number of pairs
    spread(m.layers * kOps, head_.pairs, a, head_.quantised(), thread,
           [&](int p, int i0, int i1) { k_.linear(head_, a, p, i0, i1, logits_.data() + p * kPair, vocab_pad_, false); });
}

}  // namespace galley
