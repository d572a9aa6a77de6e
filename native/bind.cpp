// The Python face of the kernels: galley._native.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "dispatch.hpp"
#include "model.hpp"
#include "probe.hpp"

namespace nb = nanobind;
using namespace galley;

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The packed model and what it borrows: the embedding rows stay in the file's mapping.
class Bound {
   public:
    Bound(nb::dict shape, nb::dict tensors, const std::string& isa, int threads, int blocks, const std::string& kv) {
        Shape s;
        const auto number = [&](const char* k) { return nb::cast<int>(shape[k]); };
        s.layers = number("layers"), s.hidden = number("hidden"), s.ffn = number("ffn"), s.heads = number("heads");
        s.kv_heads = number("kv_heads"), s.head_dim = number("head_dim"), s.vocab = number("vocab");
        s.rope_dim = number("rope_dim");
        s.rms_eps = nb::cast<float>(shape["rms_eps"]);
        s.rope_base = nb::cast<double>(shape["rope_base"]), s.rope_scale = nb::cast<double>(shape["rope_scale"]);
        s.rope_interleaved = nb::cast<bool>(shape["rope_interleaved"]);
        s.qkv_bias = nb::cast<bool>(shape["qkv_bias"]), s.qk_norm = nb::cast<bool>(shape["qk_norm"]);
        s.rope_factors = nb::cast<std::vector<float>>(shape["rope_factors"]);
        if (!s.rope_factors.empty() && (int)s.rope_factors.size() != s.rope_dim / 2)
            throw std::invalid_argument("rope_factors must have rope_dim / 2 entries");
        Tensors map;
        for (auto [k, v] : tensors) {
            const nb::tuple t = nb::cast<nb::tuple>(v);
            const std::string name = nb::cast<std::string>(k);
            const int type = nb::cast<int>(t[0]), rows = nb::cast<int>(t[1]), cols = nb::cast<int>(t[2]);
            const auto raw = nb::cast<Array<uint8_t>>(t[3]);
            if (!type_known(type)) throw std::invalid_argument("tensor " + name + " has the unsupported type " + std::to_string(type));
            if (cols % type_block((Type)type)) throw std::invalid_argument("tensor " + name + ": columns are not whole blocks");
            if (raw.size() != row_bytes((Type)type, cols) * rows) throw std::invalid_argument("tensor " + name + " has the wrong size");
            map[name] = {(Type)type, rows, cols, raw.data()};
        }
        const Kernels* k = isa_find(isa);
        if (!k) throw std::invalid_argument("unknown instruction set " + isa);
        if (kv != "f16" && kv != "int8") throw std::invalid_argument("unknown KV type " + kv);
        const nb::tuple e = nb::cast<nb::tuple>(tensors["token_embd.weight"]);
        embedding_ = e[3];
        nb::gil_scoped_release release;
        model_ = std::make_unique<Model>(s, map, *k, threads, blocks, kv == "f16" ? Kv::f16 : Kv::int8);
    }

    Model& model() {
        if (!model_) throw std::runtime_error("the model is closed");
        return *model_;
    }
    void close() { model_.reset(), embedding_ = nb::none(); }

    void step(Array<int32_t> tokens, Array<int32_t> seq_start, Array<int32_t> context, Array<int32_t> blocks,
              Array<int32_t> block_start, Array<int32_t> out, Array<int32_t> states, Array<int32_t> adapters) {
        if (seq_start.size() != context.size() + 1 || block_start.size() != context.size() + 1)
            throw std::invalid_argument("step: offsets must have one entry more than there are sequences");
        const Step s{tokens.data(), seq_start.data(), context.data(), blocks.data(), block_start.data(), out.data(),
                     states.data(), adapters.data(), (int)tokens.size(), (int)context.size(), (int)blocks.size(),
                     (int)out.size(), (int)states.size(), (int)adapters.size()};
        Model& m = model();
        nb::gil_scoped_release release;
        m.step(s);
    }

    nb::tuple sample(Array<float> temperature, Array<int32_t> top_k, Array<float> top_p, Array<float> min_p,
                     Array<float> repetition, Array<float> frequency, Array<float> presence, Array<uint64_t> seed,
                     Array<int64_t> position, Array<int32_t> lane, Array<int32_t> logprobs, Array<int32_t> given, Array<int32_t> bias_start,
                     Array<int32_t> bias_ids, Array<float> bias_values, Array<int32_t> ban_start, Array<int32_t> ban_ids,
                     Array<int32_t> seen_start, Array<int32_t> seen_ids, Array<int32_t> seen_counts,
                     Array<int32_t> mask_row, Array<uint32_t> masks) {
        const size_t n = temperature.size();
        if (top_k.size() != n || top_p.size() != n || min_p.size() != n || repetition.size() != n || frequency.size() != n ||
            presence.size() != n || seed.size() != n || position.size() != n || lane.size() != n || logprobs.size() != n ||
            bias_start.size() != n + 1 || ban_start.size() != n + 1 || seen_start.size() != n + 1 ||
            bias_start.data()[n] != (int)bias_ids.size() || bias_ids.size() != bias_values.size() ||
            ban_start.data()[n] != (int)ban_ids.size() || seen_start.data()[n] != (int)seen_ids.size() ||
            seen_ids.size() != seen_counts.size() || mask_row.size() != n || given.size() != n)
            throw std::invalid_argument("sample: array lengths disagree");
        const DrawArrays d{(int)n, temperature.data(), top_p.data(), min_p.data(), repetition.data(), frequency.data(),
                           presence.data(), top_k.data(), lane.data(), logprobs.data(), given.data(), seed.data(), position.data(),
                           bias_start.data(), bias_ids.data(), ban_start.data(), ban_ids.data(), seen_start.data(),
                           seen_ids.data(), seen_counts.data(), bias_values.data(), mask_row.data(), masks.data(),
                           masks.size()};
        std::vector<DrawnRow> rows;
        {
            Model& m = model();
            nb::gil_scoped_release release;
            rows = m.sample(d);
        }
        nb::list ids, values, ranks, tops;
        for (size_t r = 0; r < n; r++) {
            const DrawnRow& o = rows[r];
            ids.append(o.id);
            const bool asked = logprobs.data()[r] >= 0;
            values.append(asked ? (double)o.logprob : std::numeric_limits<double>::quiet_NaN());
            ranks.append(asked ? o.rank : 0);
            nb::list top;
            for (const auto& [id, value] : o.top) top.append(nb::make_tuple(id, (double)value));
            tops.append(top);
        }
        return nb::make_tuple(ids, values, ranks, tops);
    }

    // Copy of the logits, float32 [outputs, vocab], into a buffer the caller made.
    void logits(nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> to) {
        Model& m = model();
        const size_t rows = m.outputs(), cols = m.shape().vocab;
        if (to.shape(0) != rows || to.shape(1) != cols) throw std::invalid_argument("logits: wrong shape");
        for (size_t r = 0; r < rows; r++) std::memcpy(to.data() + r * cols, m.logits() + r * m.logits_stride(), cols * sizeof(float));
    }

    // Copy of the hidden states, float32 [state_count, hidden], into a buffer the caller made.
    void states(nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> to) {
        Model& m = model();
        const size_t rows = m.state_count(), cols = m.shape().hidden;
        if (to.shape(0) != rows || to.shape(1) != cols) throw std::invalid_argument("states: wrong shape");
        std::memcpy(to.data(), m.states(), rows * cols * sizeof(float));
    }

    // {tensor: (A [rank, in], B [out, rank])}, float32; an empty dict empties the slot.
    void set_adapter(int slot, nb::dict tensors) {
        using Pair = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
        LowRankTensors map;
        for (auto [k, v] : tensors) {
            const nb::tuple t = nb::cast<nb::tuple>(v);
            const auto a = nb::cast<Pair>(t[0]), b = nb::cast<Pair>(t[1]);
            if (a.shape(0) != b.shape(1)) throw std::invalid_argument("adapter: A and B disagree about the rank");
            map[nb::cast<std::string>(k)] = {(int)a.shape(0), (int)a.shape(1), (int)b.shape(0), a.data(), b.data()};
        }
        Model& m = model();
        nb::gil_scoped_release release;
        m.set_adapter(slot, map);
    }

    // Raw bytes of one KV block, out of the arena and into it.
    nb::bytes read_block(int i) { return nb::bytes((const char*)model().block(i), model().block_bytes()); }
    void write_block(int i, Array<uint8_t> from) {
        if (from.size() != model().block_bytes()) throw std::invalid_argument("write_block: wrong size");
        std::memcpy(model().block(i), from.data(), from.size());
    }

   private:
    std::unique_ptr<Model> model_;
    nb::object embedding_;
};

// Rows of a quantised tensor as float32, for tests against the oracle.
void dequantise(int type, Array<uint8_t> raw, nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> out) {
    if (!type_known(type)) throw std::invalid_argument("unknown type");
    const int cols = (int)out.shape(1);
    const size_t bytes = row_bytes((Type)type, cols);
    if (cols % type_block((Type)type) || raw.size() != bytes * out.shape(0)) throw std::invalid_argument("wrong size");
    for (size_t r = 0; r < out.shape(0); r++) dequantise_row((Type)type, raw.data() + r * bytes, cols, out.data() + r * cols);
}

}  // namespace

NB_MODULE(_native, m) {
    // `close` has freed weights and KV; what a thread's frame may still hold when the interpreter ends is an empty shell,
    // and no news for who stops a server.
    nb::set_leak_warnings(false);
    m.doc() = "Galley's CPU kernels. Use galley.runtime.backend.native.";
    m.def("isa_available", &isa_available, "Kernel sets this processor can run, best first.");
    m.def("affinity_count", &affinity_count, "Processors this process may run on.");
    m.def("probe_bandwidth", &probe_bandwidth, nb::arg("threads"), nb::arg("megabytes"), nb::arg("seconds"),
          nb::call_guard<nb::gil_scoped_release>(), "GB/s that the threads read together.");
    m.def("probe_int8", &probe_int8, nb::arg("threads"), nb::arg("seconds"), nb::call_guard<nb::gil_scoped_release>(),
          "10^9 int8 multiplies and adds per second.");
    m.def("probe_roundtrip", &probe_roundtrip, nb::arg("seconds"), nb::call_guard<nb::gil_scoped_release>(),
          "Nanoseconds from one core to another and back.");
    m.def("dequantise", &dequantise, nb::arg("type"), nb::arg("raw"), nb::arg("out"));
    nb::class_<Bound>(m, "Model")
        .def(nb::init<nb::dict, nb::dict, const std::string&, int, int, const std::string&>(), nb::arg("shape"),
             nb::arg("tensors"), nb::arg("isa"), nb::arg("threads"), nb::arg("blocks"), nb::arg("kv"))
        .def("step", &Bound::step)
        .def("sample", &Bound::sample)
        .def("logits", &Bound::logits)
        .def("states", &Bound::states)
        .def("set_adapter", &Bound::set_adapter)
        .def_prop_ro("states_count", [](Bound& b) { return b.model().state_count(); })
        .def("read_block", &Bound::read_block)
        .def("write_block", &Bound::write_block)
        .def_prop_ro("block_bytes", [](Bound& b) { return b.model().block_bytes(); })
        .def("close", &Bound::close)
        .def_prop_ro("outputs", [](Bound& b) { return b.model().outputs(); })
        .def_prop_ro("threads", [](Bound& b) { return b.model().threads(); })
        .def_prop_ro("weight_bytes", [](Bound& b) { return b.model().weight_bytes(); })
        .def_prop_ro("kv_bytes_per_token", [](Bound& b) { return b.model().kv_bytes_per_token(); })
        .def_prop_ro("isa", [](Bound& b) { return std::string(b.model().isa()); });
}
