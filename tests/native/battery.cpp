#include "battery.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "half.hpp"
#include "model.hpp"

namespace galley {

namespace {

// A row of sixteen floats of any length may be read past its end.
constexpr int kSlack = 16;

std::vector<Piece> pieces_for(int tokens, int cols) { return std::vector<Piece>((size_t)tokens * ((cols + kSuper - 1) / kSuper * 2)); }

}  // namespace

const char* type_name(Type t) {
    switch (t) {
        case Type::q4_0: return "q4_0";
        case Type::q4_1: return "q4_1";
        case Type::q5_0: return "q5_0";
        case Type::q5_1: return "q5_1";
        case Type::q8_0: return "q8_0";
        case Type::q4_k: return "q4_k";
        case Type::q5_k: return "q5_k";
        case Type::q6_k: return "q6_k";
        case Type::f16: return "f16";
        case Type::bf16: return "bf16";
        case Type::f32: return "f32";
    }
    throw std::logic_error("unknown type");
}

std::vector<uint8_t> random_rows(Type t, int rows, int cols, Numbers& numbers) {
    const size_t row = row_bytes(t, cols);
    std::vector<uint8_t> out(row * rows);
    if (t == Type::f32 || t == Type::f16 || t == Type::bf16) {
        for (size_t i = 0; i < (size_t)rows * cols; i++) {
            const float x = numbers.uniform(-1, 1);
            const uint32_t bits = float_to_bits(x);
            const uint16_t two = t == Type::f16 ? float_to_half(x) : (uint16_t)(bits >> 16);
            if (t == Type::f32) std::memcpy(out.data() + 4 * i, &bits, 4);
            else std::memcpy(out.data() + 2 * i, &two, 2);
        }
        return out;
    }
    for (uint8_t& b : out) b = (uint8_t)numbers.word();
    const bool super = t == Type::q4_k || t == Type::q5_k || t == Type::q6_k;
    const bool two = t == Type::q4_1 || t == Type::q5_1 || t == Type::q4_k || t == Type::q5_k;
    const size_t at = t == Type::q6_k ? 208 : 0;
    for (size_t b = 0; b < out.size(); b += type_bytes(t))
        for (int i = 0; i <= two; i++) {
            const uint16_t d = float_to_half(numbers.uniform(-0.1f, 0.1f) * (super ? 0.02f : 1.0f));
            std::memcpy(out.data() + b + at + 2 * i, &d, 2);
        }
    return out;
}

void Battery::kernels() {
    vectors();
    quantise();
    for (const Type t : kTypes) {
        const bool super = t == Type::q4_k || t == Type::q5_k || t == Type::q6_k, block = (int)t >= 2 && t != Type::bf16;
        for (const int cols : super ? std::vector{256} : block ? std::vector{32, 160} : std::vector{1, 67})
            linears(t, 45, cols);
    }
    for (const Kv kv : {Kv::f16, Kv::int8})
        for (const int head_dim : {16, 64, 80, 128}) attention(kv, head_dim);
    draws();
    int32_t sum = 1;
    record_.put("dots", k_.dots(5, sum) > 0);
}

void Battery::models() {
    for (const Type t : kTypes) model(t);
}

void Battery::vectors() {
    Numbers numbers(1);
    for (const int n : {16, 48, 576, 37}) {
        const auto x = numbers.many(n + kSlack, -4, 4), w = numbers.many(n + kSlack, 0, 2);
        std::vector<float> out(n + kSlack);
        k_.rms_norm(x.data(), w.data(), 1e-5f, n, out.data());
        record_.put("rms_norm", out.data(), n);
        const auto gate = numbers.many(n + kSlack, -110, 110);
        k_.silu_mul(gate.data(), w.data(), n & ~15, out.data());
        record_.put("silu_mul", out.data(), n & ~15);
        record_.put("argmax", k_.argmax(x.data(), n));
        record_.put("log_sum_exp", k_.log_sum_exp(x.data(), n));
    }
    for (const bool interleaved : {false, true}) {
        auto head = numbers.many(64, -3, 3);
        const auto c = numbers.many(32, -1, 1), s = numbers.many(32, -1, 1);
        k_.rope(head.data(), c.data(), s.data(), 48, interleaved);
        record_.put("rope", head.data(), head.size());
    }
}

void Battery::quantise() {
    Numbers numbers(2);
    for (const int tokens : {1, 2, 3, 7, 13, 33})
        for (const int cols : {32, 96, 256, 288}) {
            auto x = numbers.many((size_t)tokens * cols, -5, 5);
            for (int i = 0; i < 20 && i < cols; i++) x[i] = i < 16 ? 0.0f : 1e-31f;  // nothing to represent
            auto pieces = pieces_for(tokens, cols);
            const Acts a{tokens, cols, (cols + kSuper - 1) / kSuper * 2, x.data(), (size_t)cols, pieces.data(), nullptr};
            k_.quantise(a, 0, tokens / 2), k_.quantise(a, tokens / 2, tokens);
            const Tiles tiles(tokens, k_.max_tile);
            for (int i = 0; i < tiles.count; i++)
                for (int t = 0; t < tiles.size(i); t++)
                    for (int g = 0; g < a.groups; g++) {
                        const Piece& p = pieces[(size_t)tiles.start(i) * a.groups + (size_t)g * tiles.size(i) + t];
                        record_.put("quantise", p.q, 32);
                        // what else a piece holds depends on how the kernels multiply
                        for (const float f : {p.low, p.high, p.sum}) record_.put("quantise", f);
                    }
        }
}

void Battery::linears(Type type, int rows, int cols) {
    Numbers numbers(100 + (int)type * 10 + cols);
    const int most = tokens_;
    Matrix w;
    w.layout = layout_for(type), w.rows = rows, w.cols = cols;
    w.pairs = (rows + kPair - 1) / kPair, w.supers = (cols + kSuper - 1) / kSuper;
    w.pair_stride = pair_bytes(w.layout, cols);
    const auto raw = random_rows(type, rows, cols, numbers);
    const Arena packed(w.pair_stride * w.pairs + 4096);
    w.data = packed.data();
    for (int p = 0; p < w.pairs; p++) {
        const uint8_t* at[kPair];
        Type types[kPair];
        for (int r = 0; r < kPair; r++) {
            const int row = p * kPair + r;
            types[r] = type, at[r] = row < rows ? raw.data() + row * row_bytes(type, cols) : nullptr;
        }
        pack_pair(w.layout, types, at, cols, packed.data() + p * w.pair_stride);
    }
    const auto x = numbers.many((size_t)most * cols, -2, 2), before = numbers.many((size_t)most * kPair * w.pairs, -2, 2);
    const size_t ldo = (size_t)kPair * w.pairs;
    std::vector<uint8_t> room(w.quantised() ? pair_bytes(wider(w.layout), cols) : 0);
    std::vector<float> alone(most * ldo);  // what each token gets by itself
    for (int tokens = 1; tokens <= most; tokens++) {
        auto pieces = pieces_for(tokens, cols);
        for (const bool add : {false, true}) {
            auto out = before;
            for (int first = tokens == 1 ? 0 : most - tokens; first <= most - tokens; first++) {
                Acts a{tokens, cols, (cols + kSuper - 1) / kSuper * 2, x.data() + (size_t)first * cols, (size_t)cols, pieces.data(),
                       room.data()};
                if (w.quantised()) k_.quantise(a, 0, tokens);
                const int tiles = Tiles(tokens, k_.max_tile).count;
                float* to = out.data() + first * ldo;
                for (int p = 0; p < w.pairs; p++) {
                    k_.linear(w, a, p, 0, tiles / 2, to + p * kPair, ldo, add);
                    k_.linear(w, a, p, tiles / 2, tiles, to + p * kPair, ldo, add);
                }
            }
            if (tokens == 1) {
                if (!add) alone = out;
                record_.put(std::string("linear ") + type_name(type) + (add ? " added" : ""), out.data(), out.size());
                continue;
            }
            for (size_t i = (most - tokens) * ldo; i < most * ldo; i++) {
                const float want = add ? before[i] + alone[i] : alone[i];
                if (std::memcmp(&out[i], &want, 4))
                    throw std::runtime_error(std::string(k_.name) + ": linear " + type_name(type) + " of " + std::to_string(tokens) +
                                             " tokens differs from that of one");
            }
        }
    }
}

void Battery::attention(Kv type, int head_dim) {
    Numbers numbers(1000 + head_dim);
    const std::string name = std::string("attention ") + (type == Kv::f16 ? "f16" : "int8");
    constexpr int pages = kSpan / kPage;
    const size_t stride = page_bytes(type, head_dim);
    const Arena arena(stride * pages + 4096);
    std::vector<int32_t> blocks(pages);
    for (int i = 0; i < pages; i++) blocks[i] = (i * 5 + 3) % pages;
    for (int b = 0; b < pages; b++)
        for (int slot = 0; slot < kPage; slot++) {
            const auto k = numbers.many(head_dim, -3, 3), v = numbers.many(head_dim, -3, 3);
            k_.write_kv(type, arena.data() + b * stride, slot, k.data(), v.data(), head_dim);
        }
    record_.put(name + " pages", arena.data(), stride * pages);
    const int ld = part_floats(head_dim);
    std::vector<float> scratch(1 << 16);
    for (const int positions : {1, 15, 16, 17, 63, 65, 200, 256})
        for (const int rows : {1, 2, 3, 5, 9, 24, 64}) {
            const auto q = numbers.many((size_t)rows * head_dim, -0.5f, 0.5f);
            std::vector<int> visible(rows);
            for (int& v : visible) v = numbers.below(positions + 40) - 8;
            std::vector<float> parts((size_t)rows * ld), out(head_dim);
            Span span{};
            span.q = q.data(), span.rows = rows, span.head_dim = head_dim, span.type = type;
            span.kv = arena.data(), span.stride = stride, span.blocks = blocks.data(), span.positions = positions;
            span.visible = visible.data(), span.parts = parts.data(), span.scratch = scratch.data();
            k_.attend(span);
            for (int r = 0; r < rows; r++) record_.put(name, parts.data() + (size_t)r * ld, head_dim + 2);
            for (int r = 1; r < rows; r++) k_.join(parts.data(), parts.data() + (size_t)r * ld, head_dim);
            record_.put("join", parts.data(), head_dim + 2);
            if (parts[head_dim + 1] > 0) {
                k_.finish(parts.data(), head_dim, out.data());
                record_.put("finish", out.data(), head_dim);
            }
        }
}

void Battery::draws() {
    Numbers numbers(3);
    constexpr int vocab = 777;
    std::vector<float> scratch(2 * vocab + 64);
    for (int trial = 0; trial < 300; trial++) {
        const auto logits = numbers.many(vocab + kSlack, -9, 9);
        std::vector<uint32_t> mask((vocab + 31) / 32);
        for (uint32_t& m : mask) m = numbers.word() | 1;
        const int32_t ids[] = {3, 9, 27}, counts[] = {2, 0, 1};
        const float bias[] = {2, -100, 0.5f};
        const Draw d{trial % 4 * 0.5f, trial % 3 ? 0.8f : 1.0f, trial % 5 ? 0.0f : 0.02f, trial % 2 ? 1.2f : 1.0f, 0.3f, 0.1f,
                     trial % 3 * 20, trial % 2, ((uint64_t)numbers.word() << 32) | numbers.word(), trial * 1000,
                     ids, bias, trial % 7 ? 0 : 3, ids, trial % 11 ? 0 : 2, ids, counts, trial % 3, trial % 2 ? mask.data() : nullptr};
        record_.put("draw", k_.draw(logits.data(), vocab, d, scratch.data()));
    }
}

// A whole decoder, on two threads: a prompt in two chunks, then a step of two sequences.
void Battery::model(Type type) {
    Numbers numbers(4);
    const Shape shape{2, 256, 256, 8, 2, 32, 300, 1e-5f, 10000.0, 1.0, 32, false, false, true, {}};
    Tensors tensors;
    std::vector<std::vector<uint8_t>> kept;
    const auto make = [&](const std::string& name, Type t, int rows, int cols) {
        kept.push_back(random_rows(t, rows, cols, numbers));
        tensors[name] = {t, rows, cols, kept.back().data()};
    };
    make("token_embd.weight", type, 300, 256), make("output_norm.weight", Type::f32, 1, 256);
    for (int i = 0; i < 2; i++) {
        const std::string b = "blk." + std::to_string(i) + ".";
        make(b + "attn_norm.weight", Type::f32, 1, 256), make(b + "ffn_norm.weight", Type::f32, 1, 256);
        make(b + "attn_q_norm.weight", Type::f32, 1, 32), make(b + "attn_k_norm.weight", Type::f32, 1, 32);
        make(b + "attn_q.weight", type, 256, 256), make(b + "attn_k.weight", type, 64, 256);
        make(b + "attn_v.weight", Type::q8_0, 64, 256), make(b + "attn_output.weight", type, 256, 256);
        make(b + "ffn_gate.weight", type, 256, 256), make(b + "ffn_up.weight", type, 256, 256);
        make(b + "ffn_down.weight", type, 256, 256);
    }
    for (const Kv kv : {Kv::f16, Kv::int8}) {
        Model m(shape, tensors, k_, 2, 8, kv);
        const auto step = [&](std::vector<int32_t> tokens, std::vector<int32_t> start, std::vector<int32_t> context,
                              std::vector<int32_t> blocks, std::vector<int32_t> block_start, std::vector<int32_t> out) {
            Step s{};
            s.tokens = tokens.data(), s.seq_start = start.data(), s.context = context.data(), s.blocks = blocks.data();
            s.block_start = block_start.data(), s.out = out.data(), s.count = (int)tokens.size(), s.sequences = (int)context.size();
            s.block_count = (int)blocks.size(), s.outputs = (int)out.size();
            m.step(s);
            for (int r = 0; r < m.outputs(); r++)
                record_.put(std::string("model ") + type_name(type), m.logits() + (size_t)r * m.logits_stride(), shape.vocab);
        };
        std::vector<int32_t> prompt(21);
        for (int32_t& t : prompt) t = numbers.below(300);
        step({prompt.begin(), prompt.begin() + 13}, {0, 13}, {0}, {5}, {0, 1}, {12});
        step({prompt.begin() + 13, prompt.end()}, {0, 8}, {13}, {5, 2}, {0, 2}, {0, 7});
        step({7, 8, 9}, {0, 1, 3}, {21, 0}, {5, 2, 4}, {0, 2, 3}, {0, 2});
    }
}

}  // namespace galley
