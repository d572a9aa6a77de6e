// From GGUF blocks to the layouts the kernels read.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace galley {

// GGUF tensor types (ids as in ggml).
enum class Type : int { f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q4_k = 12, q5_k = 13, q6_k = 14, bf16 = 30 };

bool type_known(int id);
int type_block(Type t);          // values in a block
size_t type_bytes(Type t);       // bytes of a block
size_t row_bytes(Type t, int cols);

// One row of `cols` values to float32.
void dequantise_row(Type t, const uint8_t* row, int cols, float* out);

Layout layout_for(Type t);
size_t pair_bytes(Layout l, int cols);

// Packs 32 rows: row i of the pair is rows[i] (null: zeros), of type types[i]; all types share the layout.
void pack_pair(Layout l, const Type types[32], const uint8_t* const rows[32], int cols, uint8_t* out);

}  // namespace galley
