// llama.cpp behind the harness's line protocol (benchmarks/protocol.py): one command a line on stdin, one line
// of JSON back on stdout. The process lives for a whole run, so that its samples can be interleaved with
// Galley's; between commands its threads sleep (the harness checks that).
//
// Timed loops do what a greedy decoder must do and no more: llama_decode, llama_synchronize, argmax.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "llama.h"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// Ties go to the lowest id. Two passes, so that the first one vectorises.
llama_token argmax(const float* logits, int n) {
    float best[16];
    for (float& b : best) b = logits[0];
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int j = 0; j < 16; j++) best[j] = logits[i + j] > best[j] ? logits[i + j] : best[j];
    }
    float top = best[0];
    for (float b : best) top = b > top ? b : top;
    for (; i < n; i++) top = logits[i] > top ? logits[i] : top;
    for (i = 0; i < n; i++) {
        if (logits[i] == top) return i;
    }
    throw std::runtime_error("logits hold no maximum (NaN)");
}

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (unsigned char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += static_cast<char>(c);
        } else if (c < 0x20) {
            out += ' ';
        } else {
            out += static_cast<char>(c);
        }
    }
    return out + "\"";
}

class Batch {
  public:
    explicit Batch(int capacity) : batch_(llama_batch_init(capacity, 0, 1)), capacity_(capacity) {}
    ~Batch() { llama_batch_free(batch_); }
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    void clear() { batch_.n_tokens = 0; }
    bool full() const { return batch_.n_tokens == capacity_; }
    int size() const { return batch_.n_tokens; }
    void add(llama_token token, int position, int sequence, bool output) {
        if (full()) throw std::runtime_error("batch is full");
        const int i = batch_.n_tokens++;
        batch_.token[i] = token;
        batch_.pos[i] = position;
        batch_.n_seq_id[i] = 1;
        batch_.seq_id[i][0] = sequence;
        batch_.logits[i] = output;
    }
    void decode(llama_context* context) {
        const int rc = llama_decode(context, batch_);
        if (rc != 0) throw std::runtime_error("llama_decode returned " + std::to_string(rc));
        llama_synchronize(context);
    }

  private:
    llama_batch batch_;
    int capacity_;
};

class Driver {
  public:
    ~Driver() {
        for (auto& [key, context] : contexts_) llama_free(context);
        if (model_) llama_model_free(model_);
    }

    std::string answer(const std::string& line) {
        std::istringstream in(line);
        std::string verb;
        in >> verb;
        if (verb == "hello") return hello();
        if (verb == "load") return load(in);
        if (verb == "context") return context(in);
        if (verb == "prefill") return prefill(in);
        if (verb == "decode") return decode(in);
        if (verb == "logits") return logits(in);
        if (verb == "tokenize") return tokenize(in);
        throw std::runtime_error("unknown command " + verb);
    }

  private:
    static constexpr int kBatch = 2048, kMicroBatch = 512;

    llama_model* model_ = nullptr;
    llama_context* context_ = nullptr;
    std::map<std::tuple<int, int, bool>, llama_context*> contexts_;
    int threads_ = 0;

    std::string hello() {
        return "{\"name\": \"llama.cpp\", \"version\": " + quoted(llama_version()) +
               ", \"isa\": " + quoted(llama_print_system_info()) + "}";
    }

    // load THREADS PATH
    std::string load(std::istringstream& in) {
        std::string path;
        in >> threads_ >> std::ws;
        std::getline(in, path);
        if (threads_ < 1 || path.empty()) throw std::runtime_error("load THREADS PATH");
        for (auto& [key, context] : contexts_) llama_free(context);
        contexts_.clear();
        context_ = nullptr;
        if (model_) llama_model_free(model_);
        const auto start = Clock::now();
        model_ = llama_model_load_from_file(path.c_str(), llama_model_default_params());
        if (!model_) throw std::runtime_error("cannot load " + path);
        std::ostringstream out;
        out << "{\"load_s\": " << seconds_since(start) << ", \"weight_bytes\": " << llama_model_size(model_)
            << ", \"vocab\": " << vocab_size() << "}";
        return out.str();
    }

    // context TOKENS SEQUENCES UNIFIED(0|1): kept, so that switching back costs nothing
    std::string context(std::istringstream& in) {
        int tokens = 0, sequences = 0, unified = 0;
        if (!(in >> tokens >> sequences >> unified)) throw std::runtime_error("context TOKENS SEQUENCES UNIFIED");
        if (!model_) throw std::runtime_error("no model loaded");
        auto& slot = contexts_[{tokens, sequences, unified != 0}];
        if (!slot) {
            llama_context_params params = llama_context_default_params();
            params.n_ctx = tokens;
            params.n_seq_max = sequences;
            params.n_batch = kBatch;
            params.n_ubatch = kMicroBatch;
            params.n_threads = threads_;
            params.n_threads_batch = threads_;
            params.kv_unified = unified != 0;
            slot = llama_init_from_model(model_, params);
            if (!slot) throw std::runtime_error("cannot make a context");
        }
        context_ = slot;
        return "{\"tokens\": " + std::to_string(llama_n_ctx(context_)) + "}";
    }

    int vocab_size() const { return llama_vocab_n_tokens(llama_model_get_vocab(model_)); }

    void fresh() {
        if (!context_) throw std::runtime_error("no context made");
        llama_memory_clear(llama_get_memory(context_), false);
    }

    static std::vector<llama_token> rest(std::istringstream& in) {
        std::vector<llama_token> ids;
        for (llama_token id; in >> id;) ids.push_back(id);
        if (!in.eof()) throw std::runtime_error("token ids must be integers");
        if (ids.empty()) throw std::runtime_error("token ids are missing");
        return ids;
    }

    // prefill ID...: time until the first token is chosen
    std::string prefill(std::istringstream& in) {
        const auto ids = rest(in);
        fresh();
        Batch batch(kBatch);
        const auto start = Clock::now();
        const llama_token next = feed(batch, ids);
        std::ostringstream out;
        out << "{\"prefill_s\": " << seconds_since(start) << ", \"ids\": [" << next << "]}";
        return out.str();
    }

    llama_token feed(Batch& batch, const std::vector<llama_token>& ids) {
        for (size_t i = 0; i < ids.size();) {
            batch.clear();
            while (i < ids.size() && !batch.full()) {
                batch.add(ids[i], static_cast<int>(i), 0, i + 1 == ids.size());
                i++;
            }
            batch.decode(context_);
        }
        return argmax(llama_get_logits_ith(context_, -1), vocab_size());
    }

    // decode STEPS SEQUENCES ID...: the ids are SEQUENCES prompts of equal length, one after another.
    // prefill_s is the time to every sequence's first token, decode_s that of STEPS further steps of all.
    std::string decode(std::istringstream& in) {
        int steps = 0, sequences = 0;
        if (!(in >> steps >> sequences)) throw std::runtime_error("decode STEPS SEQUENCES ID...");
        const auto ids = rest(in);
        if (steps < 1 || sequences < 1 || ids.size() % sequences != 0) {
            throw std::runtime_error("decode: prompts must have equal lengths");
        }
        const int length = static_cast<int>(ids.size()) / sequences, vocab = vocab_size();
        fresh();
        std::vector<std::vector<llama_token>> drawn(sequences);
        Batch batch(kBatch);
        auto start = Clock::now();
        for (int s = 0, i = 0; s < sequences;) {  // prompts side by side, as many as fit a batch
            batch.clear();
            std::vector<std::pair<int, int>> ends;
            while (s < sequences && !batch.full()) {
                const bool last = i + 1 == length;
                if (last) ends.emplace_back(s, batch.size());
                batch.add(ids[static_cast<size_t>(s) * length + i], i, s, last);
                if (++i == length) i = 0, s++;
            }
            batch.decode(context_);
            for (auto [sequence, row] : ends) {
                drawn[sequence].push_back(argmax(llama_get_logits_ith(context_, row), vocab));
            }
        }
        const double prefill_s = seconds_since(start);
        start = Clock::now();
        for (int step = 0; step < steps; step++) {
            batch.clear();
            for (int s = 0; s < sequences; s++) batch.add(drawn[s].back(), length + step, s, true);
            batch.decode(context_);
            for (int s = 0; s < sequences; s++) {
                drawn[s].push_back(argmax(llama_get_logits_ith(context_, s), vocab));
            }
        }
        const double decode_s = seconds_since(start);
        std::ostringstream out;
        out << "{\"prefill_s\": " << prefill_s << ", \"decode_s\": " << decode_s << ", \"tokens\": " << steps * sequences
            << ", \"ids\": [";
        for (size_t i = 0; i < drawn[0].size(); i++) out << (i ? ", " : "") << drawn[0][i];
        out << "]}";
        return out.str();
    }

    // logits PATH CHUNK ID...: float32 [ids, vocab] into PATH, computed CHUNK tokens at a time from a fresh
    // context (CHUNK = 1 is the decode path)
    std::string logits(std::istringstream& in) {
        std::string path;
        int chunk = 0;
        if (!(in >> path >> chunk)) throw std::runtime_error("logits PATH CHUNK ID...");
        const auto ids = rest(in);
        if (chunk < 1 || chunk > kBatch) throw std::runtime_error("logits: chunk out of range");
        fresh();
        std::ofstream file(path, std::ios::binary | std::ios::trunc);
        Batch batch(kBatch);
        const int vocab = vocab_size();
        for (size_t i = 0; i < ids.size();) {
            batch.clear();
            while (i < ids.size() && batch.size() < chunk) {
                batch.add(ids[i], static_cast<int>(i), 0, true);
                i++;
            }
            batch.decode(context_);
            for (int row = 0; row < batch.size(); row++) {
                file.write(reinterpret_cast<const char*>(llama_get_logits_ith(context_, row)),
                           static_cast<std::streamsize>(sizeof(float)) * vocab);
            }
        }
        file.close();
        if (!file) throw std::runtime_error("cannot write " + path);
        return "{\"rows\": " + std::to_string(ids.size()) + ", \"vocab\": " + std::to_string(vocab) + "}";
    }

    // tokenize OUT IN: int32 ids of the UTF-8 file IN, control tokens not parsed, no BOS added
    std::string tokenize(std::istringstream& in) {
        std::string target, source;
        if (!(in >> target >> source)) throw std::runtime_error("tokenize OUT IN");
        if (!model_) throw std::runtime_error("no model loaded");
        std::ifstream file(source, std::ios::binary);
        std::stringstream text;
        text << file.rdbuf();
        if (!file) throw std::runtime_error("cannot read " + source);
        const std::string bytes = text.str();
        const llama_vocab* vocab = llama_model_get_vocab(model_);
        const int length = static_cast<int>(bytes.size());
        std::vector<llama_token> ids(bytes.size() + 8);
        const int n = llama_tokenize(vocab, bytes.data(), length, ids.data(), static_cast<int>(ids.size()), false, false);
        if (n < 0) throw std::runtime_error("tokenizer wants more room than bytes");
        std::ofstream out(target, std::ios::binary | std::ios::trunc);
        out.write(reinterpret_cast<const char*>(ids.data()), static_cast<std::streamsize>(sizeof(llama_token)) * n);
        out.close();
        if (!out) throw std::runtime_error("cannot write " + target);
        return "{\"tokens\": " + std::to_string(n) + "}";
    }
};

}  // namespace

int main() {
    std::ios::sync_with_stdio(false);
    llama_log_set(
        [](ggml_log_level level, const char* text, void*) {
            if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
        },
        nullptr);
    llama_backend_init();
    {
        Driver driver;
        for (std::string line; std::getline(std::cin, line);) {
            if (line == "quit") break;
            std::string reply;
            try {
                reply = driver.answer(line);
            } catch (const std::exception& error) {
                reply = "{\"error\": " + quoted(error.what()) + "}";
            }
            std::cout << reply << std::endl;
        }
    }
    llama_backend_free();
    return 0;
}
