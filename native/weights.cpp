// Where a model's matrices lie: laid out first, then packed by all threads.
#include <atomic>
#include <stdexcept>

#include "model.hpp"

namespace galley {

const Tensor& Model::need(const Tensors& t, const std::string& name, int rows, int cols) const {
    const auto it = t.find(name);
    if (it == t.end()) throw std::invalid_argument("tensor " + name + " is missing");
    if (it->second.rows != rows || it->second.cols != cols)
        throw std::invalid_argument("tensor " + name + " has shape [" + std::to_string(it->second.rows) + ", " +
                                    std::to_string(it->second.cols) + "], expected [" + std::to_string(rows) + ", " +
                                    std::to_string(cols) + "]");
    return it->second;
}

const float* Model::keep_vector(const Tensors& t, const std::string& name, int n) {
    const Tensor& v = need(t, name, 1, n);
    auto out = std::make_unique<std::vector<float>>(n + 16);
    dequantise_row(v.type, v.data, n, out->data());
    vectors_.push_back(std::move(out));
    return vectors_.back()->data();
}

void Model::pack(const Tensors& t) {
    const Shape& s = shape_;
    const int q = s.q_rows(), kv = s.kv_rows();
    // What goes into each packed matrix, and where: laid out first, filled by all threads after.
    struct Part { const Tensor* tensor; int rows; };
    struct Plan { Matrix* m; std::vector<Part> parts; size_t offset, stride; };
    std::vector<Plan> plans;
    size_t total = 0;
    const auto shape_of = [&](Matrix& m, Layout l, int rows, int cols) {
        m.layout = l, m.rows = rows, m.cols = cols;
        narrow_ |= wider(l) != l;
        m.pairs = (rows + kPair - 1) / kPair;
        m.supers = (cols + kSuper - 1) / kSuper;
        if (m.quantised() && cols % kGroup) throw std::invalid_argument("quantised matrix with columns not a multiple of 32");
    };
    const auto place = [&](Matrix& m, std::vector<Part> parts, int cols) {
        int rows = 0;
        for (const Part& p : parts) rows += p.rows;
        shape_of(m, layout_for(parts[0].tensor->type), rows, cols);
        m.pair_stride = pair_bytes(m.layout, cols);
        plans.push_back({&m, std::move(parts), total, m.pair_stride});
        total += m.pair_stride * m.pairs;
    };
    out_norm_ = keep_vector(t, "output_norm.weight", s.hidden);
    for (int i = 0; i < s.layers; i++) {
        const std::string b = "blk." + std::to_string(i) + ".";
        Layer& l = layers_[i];
        l.attn_norm = keep_vector(t, b + "attn_norm.weight", s.hidden);
        l.ffn_norm = keep_vector(t, b + "ffn_norm.weight", s.hidden);
        if (s.qk_norm) {
            l.q_norm = keep_vector(t, b + "attn_q_norm.weight", s.head_dim);
            l.k_norm = keep_vector(t, b + "attn_k_norm.weight", s.head_dim);
        }
        if (s.qkv_bias) {
            auto bias = std::make_unique<std::vector<float>>(q + 2 * kv + 32);
            const auto fill = [&](const char* name, int n, int at) {
                const Tensor& v = need(t, b + name, 1, n);
                dequantise_row(v.type, v.data, n, bias->data() + at);
            };
            fill("attn_q.bias", q, 0), fill("attn_k.bias", kv, q), fill("attn_v.bias", kv, q + kv);
            vectors_.push_back(std::move(bias));
            l.bias = vectors_.back()->data();
        }
        // q, k and v are one matrix where they share a layout; neighbours that do not become segments.
        const Part parts[3] = {{&need(t, b + "attn_q.weight", q, s.hidden), q},
                               {&need(t, b + "attn_k.weight", kv, s.hidden), kv},
                               {&need(t, b + "attn_v.weight", kv, s.hidden), kv}};
        std::vector<std::vector<Part>> runs;
        for (const Part& p : parts) {
            if (runs.empty() || layout_for(runs.back()[0].tensor->type) != layout_for(p.tensor->type)) runs.push_back({});
            runs.back().push_back(p);
        }
        l.qkv.resize(runs.size());
        int offset = 0;
        for (size_t r = 0; r < runs.size(); r++) {
            l.qkv[r].offset = offset;
            for (const Part& p : runs[r]) offset += p.rows;
            place(l.qkv[r].w, runs[r], s.hidden);
        }
        place(l.o, {{&need(t, b + "attn_output.weight", s.hidden, q), s.hidden}}, q);
        // gate and up alternate pair by pair, so that a thread that computes both reads one stream
        const Tensor &gate = need(t, b + "ffn_gate.weight", s.ffn, s.hidden), &up = need(t, b + "ffn_up.weight", s.ffn, s.hidden);
        shape_of(l.gate, layout_for(gate.type), s.ffn, s.hidden);
        shape_of(l.up, layout_for(up.type), s.ffn, s.hidden);
        const size_t gb = pair_bytes(l.gate.layout, s.hidden), ub = pair_bytes(l.up.layout, s.hidden);
        l.gate.pair_stride = l.up.pair_stride = gb + ub;
        plans.push_back({&l.gate, {{&gate, s.ffn}}, total, gb + ub});
        plans.push_back({&l.up, {{&up, s.ffn}}, total + gb, gb + ub});
        total += (gb + ub) * l.gate.pairs;
        place(l.down, {{&need(t, b + "ffn_down.weight", s.hidden, s.ffn), s.hidden}}, s.ffn);
    }
    embedding_ = need(t, "token_embd.weight", s.vocab, s.hidden);
    const Tensor& head = t.count("output.weight") ? need(t, "output.weight", s.vocab, s.hidden) : embedding_;
    place(head_, {{&head, s.vocab}}, s.hidden);

    weights_ = std::make_unique<Arena>(total + 4096);  // room for reads ahead of the last record
    weight_bytes_ = total;
    for (Plan& p : plans) p.m->data = weights_->data() + p.offset;
    std::atomic<int> next{0};
    pool_.run([&](int) {
        for (int i; (i = next.fetch_add(1)) < (int)plans.size();) {
            const Plan& p = plans[i];
            const Matrix& m = *p.m;
            for (int pair = 0; pair < m.pairs; pair++) {
                const uint8_t* rows[kPair];
                Type types[kPair];
                for (int r = 0; r < kPair; r++) {
                    int at = pair * kPair + r;
                    rows[r] = nullptr, types[r] = p.parts[0].tensor->type;
                    for (const Part& part : p.parts) {
                        if (at < part.rows) {
                            types[r] = part.tensor->type;
                            rows[r] = part.tensor->data + (size_t)at * row_bytes(types[r], m.cols);
                            break;
                        }
                        at -= part.rows;
                    }
                }
                pack_pair(m.layout, types, rows, m.cols, weights_->data() + p.offset + (size_t)pair * p.stride);
            }
        }
    });
}

}  // namespace galley
