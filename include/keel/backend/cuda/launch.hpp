// SPDX-License-Identifier: MIT
//
// The functions that start kernels: what cuda.hpp (host compiler) calls and kernels.cuh (nvcc, in one .cu) defines.
// Plain structs and pointers only, in a namespace without the instruction set, so that both sides link whatever flags
// they were compiled with. All pointers are to device memory. Every function returns what the launch returned.
//
// Weights as they lie on the device: rows of equal length, each a record that starts on 16 bytes and consists of planes
// that follow each other. U = columns / 32, rounded up, is the number of units of 32 elements; missing elements of the
// last unit are zero.
//
//   f32, f16, bf16   elements
//   q8_0             codes int8 [32 U], scale f16 [U]                                        value = scale q
//   q4_k             codes nibbles [16 U], (scale, minimum) u8 [2 U], (d, dmin) f16 [2 U / 8]
//                                                           value = d scale q - dmin minimum
//   q5_k             codes nibbles [16 U], fifth bits u32 [U], then as q4_k
//   q6_k             codes nibbles [16 U], high pairs u64 [U], scale int8 [2 U] (of 16 each), d f16 [U / 8]
//                                                           value = d scale (q - 32)
//   wide             codes int8 [32 U], (scale, minimum) f32 [4 U] (of 16 each)              value = scale q - minimum
//
//   nibbles     byte i of a unit: element i low, element i + 16 high
//   fifth bits  of element 4 w + b (w < 4): bit w of byte b; of element 16 + 4 w + b: bit 4 + w
//   high pairs  byte 4 (w / 2) + b: of element 4 w + b at bit 4 (w % 2), of element 16 + 4 w + b two bits above
//
// Every type of GGUF that is not in the list becomes `wide`, exactly.
#pragma once

#include <cuda_runtime_api.h>

#include <keel/core/compiler.hpp>

namespace keel::cuda_launch {

/// An error if the program holds no kernels for the current device.
cudaError_t probe();

enum class layout : int { f32, f16, bf16, q8_0, q4_k, q5_k, q6_k, wide };

/// `count` matrices of `rows` records, y = W x.
struct matrix {
    const unsigned char* data;
    layout type;
    int count, rows, columns;
    int row_bytes;  ///< of a record
};

/// Rows [first, first + n) of file blocks of GGUF type `type` (an id of keel::dtype) to records.
struct repack_args {
    const unsigned char* from;  ///< n rows as in the file
    unsigned char* to;          ///< n records
    int type;
    layout as;
    int columns, row_bytes;
    long long rows;
};
cudaError_t repack(const repack_args&, cudaStream_t);

/// A sequence in the batch; an array of these is on the device.
struct segment {
    long long position;
    unsigned char* recurrent;
    unsigned char* const* blocks;  ///< on the device, too
    int first_row, rows;
    float* kept = nullptr;  ///< (KDA layers, kept_capacity, kept floats) for replays, or null
    int kept_capacity = 0;
};

/// keel::memory_layout, in plain numbers.
struct memory {
    int heads, head_dim, taps, mla_layers, latent_width;
    int half;  ///< 1 if the cache is f16, 0 if f32
    long long layer_floats;
};

/// What is done to the input of products before they are computed.
enum class prologue : int {
    none,
    rms_norm,   ///< x / rms(x) * weight
    head_norm,  ///< every head of `head_dim` divided by its rms, from sums of squares
    codes,      ///< the same, or nothing without `squares`, for codes of 8 bits; only with weights of at most 6 bits
};

/// out = W x or += W x, for several matrices with one input. With heads > 1, every matrix holds that many, and head h
/// takes x + h * x_head to out + h * out_head.
struct product {
    matrix weight;
    float* out;
    long long out_row, out_head;  ///< strides
    int accumulate;
};
struct matvec_args {
    static constexpr int most = 8;
    const float* x;
    long long x_row, x_head;
    int rows, columns, heads;
    prologue before;
    const float* norm;  ///< rms_norm: the weight
    const float*
        squares;  ///< head_norm, codes: (rows, columns / head_dim, slabs), sums of squares over a slab; or null
    const unsigned char* codes;
    long long codes_row;       ///< bytes
    unsigned char* put_codes;  ///< if not null, rms_norm(x) is also left there as codes, code_row_bytes() a row
    float epsilon;
    int head_dim, slabs;
    int quantise;  ///< 1: integer codes are multiplied with activations rounded to 8 bits
    int beside;    ///< 1: what the kernel before makes is not needed, and it waits before it lets the next one start
    int products;
    product list[most];
};
cudaError_t matvec(const matvec_args&, cudaStream_t);

struct embed_args {
    matrix table;
    const int* tokens;
    float* out;
    long long out_row;
    int rows;
};
cudaError_t embed(const embed_args&, cudaStream_t);

struct rms_norm_args {
    const float* x;
    const float* weight;
    float* out;
    long long x_row, out_row;
    int rows, columns;
    float epsilon;
};
cudaError_t rms_norm(const rms_norm_args&, cudaStream_t);

/// Rows of floats, `row` apart.
struct activation_rows {
    float* data;
    long long row;
};

/// Segments are convolved in place in tiles of short_conv_tile rows, all at once: where there is more than one tile,
/// the rows before each lie in `edges` meanwhile, short_conv_edges(rows of the batch) times (taps, channels).
inline constexpr int short_conv_tile = 32;
KEEL_HD constexpr int short_conv_edges(int rows) { return 2 * (rows / short_conv_tile + 1); }
struct short_conv_args {
    static constexpr int parts = 1;
    activation_rows x;  ///< (n, channels)
    const float* taps;
    const segment* segments;
    int segment_count;
    int longest;  ///< rows of the longest segment
    float* edges;
    int part, layer;
    memory layout;

    KEEL_HD activation_rows input(int) const { return x; }
    KEEL_HD float* edges_of(int) const { return edges; }
    KEEL_HD int which(int) const { return part; }
};
cudaError_t short_conv(const short_conv_args&, cudaStream_t);

/// Copies rows of several arrays, one behind the other, to segment::kept: row `position` of a segment to slot position
/// % kept_capacity of `layer`; only the last kept_capacity rows.
struct keep_args {
    static constexpr int parts = 5;
    struct part {
        const float* data;
        long long row;
        int width;
    } list[parts];
    const segment* segments;
    int segment_count;
    int most_rows;  ///< that any segment keeps
    int layer;
};
cudaError_t keep(const keep_args&, cudaStream_t);

struct l2_norm_args {
    float* x;
    long long x_row, x_head;
    int rows, heads, head_dim;
    float epsilon;
};
cudaError_t l2_norm(const l2_norm_args&, cudaStream_t);

/// Everything between the products and the recurrence of a KDA layer: short_conv of q, k and v, l2_norm of q and k,
/// kda_gates. Heads lie side by side, on 16 bytes. head_dim is 32, 64, 128 or 256; at most 4 taps.
struct kda_inputs_args {
    static constexpr int parts = 3;
    activation_rows x[parts];
    const float* taps[parts];
    activation_rows log_decay, beta;
    const float *a, *dt_bias;
    float epsilon;
    const segment* segments;
    int segment_count;
    int longest;
    float* edges;  ///< three times those of short_conv
    int rows;      ///< of the batch
    int layer;
    memory layout;

    KEEL_HD activation_rows input(int part) const { return x[part]; }
    KEEL_HD float* edges_of(int part) const {
        return edges +
               static_cast<long long>(part) * short_conv_edges(rows) * layout.taps * layout.heads * layout.head_dim;
    }
    KEEL_HD int which(int part) const { return part; }
};
cudaError_t kda_inputs(const kda_inputs_args&, cudaStream_t);

struct kda_gates_args {
    float* log_decay;
    float* beta;
    const float* a;
    const float* dt_bias;
    long long decay_row, decay_head, beta_row;
    int rows, heads, head_dim;
};
cudaError_t kda_gates(const kda_gates_args&, cudaStream_t);

/// The recurrence row by row. head_dim is 32, 64, 128 or 256.
struct kda_args {
    const float *q, *k, *v, *log_decay, *beta;
    long long q_row, q_head, k_row, k_head, v_row, v_head, decay_row, decay_head, beta_row;
    float* out;
    long long out_row, out_head;
    const segment* segments;
    int segment_count;
    int layer;
    memory layout;
};
cudaError_t kda_step(const kda_args&, cudaStream_t);

/// Bytes of a row of activations as codes of 8 bits, of `units` times 32 elements.
constexpr int code_row_bytes(int units) { return (units * 40 + 15) / 16 * 16; }

/// Everything between the products of a KDA layer, for the formulas see keel::kda_mix_args. `out` is not yet divided by
/// the rms of its head: `squares`, (rows, heads, head_dim / 32), takes the sums of squares for that.
struct kda_mix_args {
    const float *q, *k, *v, *decay_low, *gate_low, *beta;
    long long q_row, k_row, v_row, decay_row, gate_row, beta_row;
    matrix decay_up, gate_up;
    const float *taps_q, *taps_k, *taps_v, *a, *dt_bias, *norm;
    float epsilon;
    float* out;            ///< or null, and
    unsigned char* codes;  ///< the same as codes of 8 bits, code_row_bytes() a row
    long long out_row;
    float* squares;
    const segment* segments;
    int segment_count;
    int layer;
    memory layout;
};
cudaError_t kda_mix(const kda_mix_args&, cudaStream_t);

struct gated_norm_args {
    float* x;
    const float* weight;
    const float* gate;
    long long x_row, x_head, gate_row, gate_head;
    int rows, heads, head_dim;
    float epsilon;
};
cudaError_t gated_norm(const gated_norm_args&, cudaStream_t);

struct latent_append_args {
    float* rows;
    long long row_stride;
    const float* weight;
    const segment* segments;
    int segment_count;
    int row_count;  ///< of all segments together
    int rank, layer;
    float epsilon;
    memory layout;
    int splits;  ///< of the latent_attend that follows, whose first reads are asked for; or 0
};
cudaError_t latent_append(const latent_append_args&, cudaStream_t);

/// Split over the cache: `splits` blocks of a row each leave a maximum, a sum and a weighted sum in `partial`, which
/// is (rows, splits, heads, rank + 4) floats; a second kernel joins them. At most 256 splits; rank is
/// a multiple of 4, at most 512.
struct latent_attend_args {
    const float *q_latent, *q_position;
    long long latent_row, latent_head, position_row, position_head;
    float* out;
    long long out_row, out_head;
    float scale;
    int halves;  ///< 1: queries and weights may be rounded to halves
    int heads, rank, layer;
    const segment* segments;
    int segment_count;
    int first_row, row_count;
    float* partial;
    int splits;
    memory layout;
};
cudaError_t latent_attend(const latent_attend_args&, cudaStream_t);

/// Append, latent query, attention and expansion for rows that are their segments' only ones, over short caches; the
/// formula is that of keel::latent_mix_args.
struct latent_mix_args {
    const float *q, *latent, *norm;
    long long q_row, q_head, latent_row;
    matrix key_up, value_up;
    const segment* segments;
    int segment_count, layer;
    memory layout;
    float epsilon, scale;
    float* out;            ///< (rows, heads, rows of value_up), or null, and
    unsigned char* codes;  ///< the same as codes of 8 bits, code_row_bytes() a row
    long long out_row;
};
/// Whether there is a kernel for these shapes; not for few processors, whose blocks have too little shared memory.
bool serves_latent_mix(const latent_mix_args&);
cudaError_t latent_mix(const latent_mix_args&, cudaStream_t);

struct route_args {
    const float* logits;
    long long logits_row;
    const float* bias;
    int* chosen;
    float* weights;
    long long chosen_row, weights_row;
    int rows, experts, k;
    float scale;
};
cudaError_t route(const route_args&, cudaStream_t);

inline constexpr int hidden_unit_bytes = 144;

/// Gated feed-forward networks: out = or += W_down (silu(W_gate x) W_up x), or with `chosen` the sum over k of
/// gate.count such networks with their weights.
struct networks {
    const float* x = nullptr;  ///< (rows, gate.columns)
    long long x_row = 0;
    int rows = 0;
    const int* chosen = nullptr;     ///< (rows, k), or null for one network
    const float* weights = nullptr;  ///< (rows, k)
    long long chosen_row = 0, weights_row = 0;
    int k = 1;
    matrix gate{}, up{}, down{};
    float* out = nullptr;
    long long out_row = 0;
    int accumulate = 0;
};

/// Networks for few rows, with one more, `shared`, for every row if shared_gate.data is not null. `hidden` takes the
/// activations between the two kernels: rows * slots * units of the wider network * hidden_unit_bytes.
struct experts_args : networks {
    const float* norm = nullptr;  ///< null: x is the input; else rms_norm(x; norm) is
    float epsilon = 0;
    const unsigned char* codes = nullptr;  ///< if not null: the input as codes, where weights have at most 6 bits
    route_args route{};                    ///< if its logits are not null, the choice is made of them
    matrix shared_gate{}, shared_up{}, shared_down{};
    int quantise = 0;
    float* hidden = nullptr;
    unsigned long long* choice = nullptr;  ///< room for k: what the first kernel hands to the second, one row only
};
cudaError_t experts(const experts_args&, cudaStream_t);

struct add_args {
    float* x;
    const float* y;
    long long x_row, y_row;
    int rows, columns;
};
cudaError_t add(const add_args&, cudaStream_t);

struct gather_args {
    const float* x;
    long long x_row;
    const long long* which;
    float* out;
    long long out_row;
    int rows, columns;
};
cudaError_t gather(const gather_args&, cudaStream_t);

/// *to[i] = row i of x, where to[i] is not null.
struct scatter_args {
    static constexpr int most = 64;
    const float* x;
    long long x_row;
    float* to[most];
    int rows, columns;
};
cudaError_t scatter(const scatter_args&, cudaStream_t);

/// keel::shortlist of each row. `best` and `counts` hold results of parts of rows meanwhile: (rows, parts) and (rows,
/// parts, shortlist::bins).
inline constexpr int shortlist_part = 8192;
constexpr int shortlist_parts(int columns) { return (columns + shortlist_part - 1) / shortlist_part; }
struct shortlist_args {
    const float* logits;
    long long logits_row;
    int rows, columns;
    unsigned char* lists;  ///< keel::shortlist [rows]
    float* best;
    unsigned* counts;
};
cudaError_t shortlist(const shortlist_args&, cudaStream_t);

}  // namespace keel::cuda_launch
