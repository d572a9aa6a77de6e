// Every kernel of one instruction set on the same inputs.
#pragma once
#include "kernels.hpp"
#include "pack.hpp"
#include "record.hpp"

namespace galley {

constexpr Type kTypes[] = {Type::q4_0, Type::q4_1, Type::q5_0, Type::q5_1, Type::q8_0, Type::q4_k,
                           Type::q5_k, Type::q6_k, Type::f16,  Type::bf16, Type::f32};
const char* type_name(Type t);
// Rows of random blocks, with scales that keep the values near one.
std::vector<uint8_t> random_rows(Type t, int rows, int cols, Numbers& numbers);

// Runs the kernels of one table, linears on up to `tokens` tokens, and keeps what they return. Throws std::runtime_error where a result depends on which
// tokens share the step.
class Battery {
   public:
    Battery(const Kernels& kernels, int tokens) : k_(kernels), tokens_(tokens) {}
    void kernels();
    void models();
    const Record& record() const { return record_; }

   private:
    void vectors();
    void quantise();
    void linears(Type type, int rows, int cols);
    void attention(Kv type, int head_dim);
    void draws();
    void model(Type type);
    const Kernels& k_;
    int tokens_;
    Record record_;
};

}  // namespace galley
