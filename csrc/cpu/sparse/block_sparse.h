// y += x Sᵀ where a tile of S's rows shares its columns: blocks of 16, whole columns, and the transpose of whole rows.
//
// A tile is then a small dense matrix, and its product runs token by token, so that neither x nor y is transposed. The
// features of x that S needs are copied first, as fp32, because the rows of x may each lie in a page of their own:
// whole columns feature by feature, blocks in runs of 16 features. Rows of y are prefetched some tiles ahead: a tile
// touches so few cache lines of each row that the processor cannot foresee the next.
//
// Without this file whole columns take 1.4 to 2.6 times as long, blocks of 16 1.2 to 1.4 times, and dx of whole
// rows 1.2 to 1.5 times, at 2048 tokens of 768 x 768 and 4096 x 4096 (lower quartiles of 14 rounds).
#pragma once
#include "cpu/dense/microkernels.h"

namespace rosa {
namespace ROSA_ISA {

constexpr int64_t RUN = 16;  // the side of blocks, or a divisor of it
// Tokens copied at a time: of 4096 features they take 256 KiB, which stay in the second-level cache beside S.
constexpr int64_t RUN_TOKENS = 16;

// The tokens of a run, which has room for whole RUN_TOKENS.
inline int64_t run_tokens(int64_t tokens) { return rounded_up(tokens, RUN_TOKENS); }

// Copies the first `width` features of a row as fp32, and fills the rest of RUN with zeros.
template <class T>
inline void copy_run(const T* row, int64_t width, float* run) {
  T padded[RUN] = {};
  if (width < RUN) row = static_cast<T*>(std::memcpy(padded, row, sizeof(T) * width));
  for (int64_t n = 0; n < RUN; n += LANES) store(run + n, load(row + n));
}

// Copies the runs that begin with the features of `starts`, multiples of RUN; the run of feature f lies at runs + f ·
// run_tokens(tokens). Some runs are copied together, so that each visit to a row reads several cache lines. The next
// visit's lines are prefetched; with `more`, as many tokens follow, and their first lines are prefetched too.
template <class T>
inline void copy_runs(const T* rows, int64_t stride, int64_t tokens, int64_t features, const int32_t* starts,
                      int64_t count, bool more, float* runs) {
  constexpr int64_t TOGETHER = PANEL / RUN;
  const int64_t apart = run_tokens(tokens);
  for (int64_t i = 0; i < count; i += TOGETHER) {
    const int64_t end = smaller(i + TOGETHER, count), next = end < count ? end : 0;
    const int64_t next_end = next || more ? smaller(next + TOGETHER, count) : 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const T *row = rows + t * stride, *next_row = next ? row : row + tokens * stride;
      for (int64_t j = next; j < next_end; ++j) __builtin_prefetch(next_row + starts[j]);
      for (int64_t j = i; j < end; ++j)
        copy_run(row + starts[j], smaller(RUN, features - starts[j]), runs + starts[j] * apart + t * RUN);
    }
  }
}

// gathered[n][t] = rows[t][features[n]].
template <class T>
inline void gather_features(const T* rows, int64_t stride, int64_t tokens, const int32_t* features, int64_t count,
                            float* gathered) {
  for (int64_t t = 0; t < tokens; ++t, rows += stride)
    for (int64_t n = 0; n < count; ++n) gathered[n * BLOCK_TOKENS + t] = as_float(rows[features[n]]);
}

// Where add_tokens finds its n-th input: feature by feature, or in the run that starts with feature starts[n] for
// multiples n of RUN. Runs lie `apart` tokens from each other.
struct FeatureMajor {
  static constexpr int64_t TOKEN = 1, FEATURE = BLOCK_TOKENS;
  const float* in;
  static int64_t piece(int64_t length) { return length; }
  const float* at(int64_t) const { return in; }
};
struct Runs {
  static constexpr int64_t TOKEN = RUN, FEATURE = 1;
  const float* in;
  const int32_t* starts;
  int64_t apart;
  static int64_t piece(int64_t) { return RUN; }
  const float* at(int64_t n) const { return in + starts[n] * apart; }
};

// rows[t][f] += Σ_n inputs[n][t] · weights[n][f] for Tokens tokens from `first` on and Width vectors of features,
// rounded once. Fresh rows are written instead of added to.
template <int Tokens, int Width, class In, class T>
inline void add_tokens(const In& inputs, int64_t first, int64_t length, const float* weights, int64_t weights_stride,
                       T* rows, int64_t stride, bool fresh) {
  RegisterTile<Tokens, Width> tile;
  tile.clear();
  const int64_t piece = In::piece(length);
  for (int64_t n = 0; n < length; n += piece) {
    const float* in = inputs.at(n) + first * In::TOKEN;
    for (int64_t left = smaller(piece, length - n); left; --left, in += In::FEATURE, weights += weights_stride)
      tile.add_outer([&](int t) { return in[t * In::TOKEN]; }, [&](int v) { return load(weights + v * LANES); });
  }
  if (!fresh)
    tile.for_each([&](int t, int v) { tile.sums[t][v] = add(load(rows + t * stride + v * LANES), tile.sums[t][v]); });
  tile.for_each([&](int t, int v) { store(rows + t * stride + v * LANES, tile.sums[t][v]); });
}

// The same for all tokens of a block. Where `ahead` is not 0, prefetches the rows of the tile so many elements further
// on.
template <int Tokens, int Width, class In, class T>
inline void add_block(const In& in, int64_t length, const float* weights, int64_t weights_stride, T* rows,
                      int64_t stride, int64_t tokens, int64_t ahead, bool fresh) {
  constexpr int64_t LINE = 64 / sizeof(T);
  int64_t t = 0;
  for (; t + Tokens <= tokens; t += Tokens) {
    for (int64_t i = t; ahead && i < t + Tokens; ++i)
      for (int64_t f = 0; f < Width * LANES; f += LINE) __builtin_prefetch(rows + i * stride + ahead + f, 1);
    add_tokens<Tokens, Width>(in, t, length, weights, weights_stride, rows + t * stride, stride, fresh);
  }
  for (; t + GROUP <= tokens; t += GROUP)
    add_tokens<GROUP, Width>(in, t, length, weights, weights_stride, rows + t * stride, stride, fresh);
  for (; t < tokens; ++t)
    add_tokens<1, Width>(in, t, length, weights, weights_stride, rows + t * stride, stride, fresh);
}

// The first rows of the tiles of `step` rows that have entries, or the first columns of the runs that S, made of blocks
// of 16, has entries in. They ascend.
class Starts {
 public:
  int64_t count = 0;

  static Starts of_rows(const Csr& s, int64_t rows, int64_t step) {
    Starts r(rows, step);
    for (int64_t i = 0; i < rows; i += step)
      if (s.crow[i] != s.crow[i + 1]) r.starts_[r.count++] = (int32_t)i;
    return r;
  }
  static Starts of_columns(const Csr& s, int64_t rows, int64_t columns) {
    Starts r(columns, RUN);
    Buffer<bool> touched(columns);
    std::memset(touched, 0, columns);
    for (int64_t i = 0; i < rows; i += RUN)
      for (int64_t e = s.crow[i]; e < s.crow[i + 1]; e += RUN) touched[s.col[e]] = true;
    for (int64_t f = 0; f < columns; f += RUN)
      if (touched[f]) r.starts_[r.count++] = (int32_t)f;
    return r;
  }
  const int32_t* data() const { return starts_; }
  int64_t operator[](int64_t n) const { return starts_[n]; }

 private:
  Starts(int64_t features, int64_t step) : starts_(features / step + 1) {}
  Buffer<int32_t> starts_;
};

class BlockSparse {
 public:
  static bool serves(const Csr& s) {
    return s.values && (s.structure == Structure::column || s.structure == Structure::block16);
  }

  // S (out_features, in_features) is served or empty. With a permutation, S is the transpose of the pattern whose
  // values it holds, in that pattern's order.
  BlockSparse(const Csr& s, const int32_t* permutation, int64_t out_features, int64_t in_features)
      : s_(s),
        whole_columns_(s.structure == Structure::column),
        step_(whole_columns_ ? PANEL : RUN),
        out_features_(out_features),
        in_features_(in_features),
        tiles_(Starts::of_rows(s, s.values ? out_features : 0, step_)),
        inputs_(Starts::of_columns(s, s.values && !whole_columns_ ? out_features : 0, in_features)) {
    if (!s.values) return;
    for (int64_t n = 0; n < tiles_.count; ++n) longest_ = larger(longest_, length(tiles_[n]));
    weights_ = Buffer<float>(s.nnz + step_ * longest_);
    for_slots(slots_for(tiles_.count, s.nnz), tiles_.count, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) pack_tile(permutation, tiles_[n]);
    });
  }

  int64_t tile_count() const { return tiles_.count; }

  // Whether the tiles are all of the output features.
  bool covers() const { return whole_columns_; }

  // Tokens that gather and add_tiles take at a time, a divisor of BLOCK_TOKENS.
  int64_t tokens_at_a_time() const { return whole_columns_ ? BLOCK_TOKENS : RUN_TOKENS; }

  // Floats that the copied features take.
  int64_t scratch_size() const {
    return s_.values ? whole_columns_ ? longest_ * BLOCK_TOKENS : rounded_up(in_features_, RUN) * RUN_TOKENS : 0;
  }

  // Copies what S needs of rows (tokens, in_features); `more` like them follow.
  template <class T>
  void gather(const T* rows, int64_t stride, int64_t tokens, bool more, float* scratch) const {
    if (whole_columns_)
      gather_features(rows, stride, tokens, s_.col, longest_, scratch);
    else
      copy_runs(rows, stride, tokens, in_features_, inputs_.data(), inputs_.count, more, scratch);
  }

  // rows (tokens, out_features) += gathered · Sᵀ for tiles [begin, end) of the output features that S has entries for.
  // Runs lie further apart where they were copied for more tokens.
  template <class T>
  void add_tiles(const float* gathered, T* rows, int64_t stride, int64_t tokens, bool more, int64_t begin, int64_t end,
                 bool fresh = false, int64_t apart = RUN_TOKENS) const {
    const int64_t sooner = smaller(end - begin, whole_columns_ ? 1 : 4);  // tiles: of fp32 256 and 64 cache lines
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = tiles_[n], next = n + sooner;
      const int64_t ahead = next < end ? tiles_[next] - i : more ? tokens * stride + tiles_[next - end + begin] - i : 0;
      if (whole_columns_)
        add_tile(FeatureMajor{gathered}, i, rows + i, stride, tokens, ahead, fresh);
      else
        add_tile(Runs{gathered, s_.col + s_.crow[i], apart}, i, rows + i, stride, tokens, ahead, fresh);
    }
  }

 private:
  int64_t length(int64_t i) const { return s_.crow[i + 1] - s_.crow[i]; }

  // Fills the tile's weights_, which are [column][row] and zero past the last row.
  void pack_tile(const int32_t* permutation, int64_t i) {
    float* packed = weights_ + s_.crow[i];
    const int64_t rows = smaller(step_, out_features_ - i);
    if (rows < step_) std::memset(packed, 0, sizeof(float) * step_ * length(i));
    for (int64_t n = 0; permutation && n < length(i); ++n)
      std::memcpy(packed + n * step_, s_.values + permutation[s_.crow[i] + n], sizeof(float) * rows);
    for (int64_t j = 0; !permutation && j < rows; ++j)
      for (int64_t n = 0; n < length(i); ++n) packed[n * step_ + j] = s_.values[s_.crow[i + j] + n];
  }

  template <class In, class T>
  void add_tile(const In& in, int64_t i, T* rows, int64_t stride, int64_t tokens, int64_t ahead, bool fresh) const {
    const float* weights = weights_ + s_.crow[i];
    const int64_t count = smaller(step_, out_features_ - i), n = length(i);
    int64_t f = 0;
    for (; f + STRIP * LANES <= count; f += STRIP * LANES)
      add_block<GROUP, STRIP>(in, n, weights + f, step_, rows + f, stride, tokens, ahead, fresh);
    for (; f + LANES <= count; f += LANES)
      add_block<STRIP * GROUP, 1>(in, n, weights + f, step_, rows + f, stride, tokens, ahead, fresh);
    for (int64_t t = 0; f < count && t < tokens; ++t) {
      T padded[LANES] = {};
      std::memcpy(padded, rows + t * stride + f, sizeof(T) * (count - f));
      add_tokens<1, 1>(in, t, n, weights + f, step_, padded, LANES, fresh);
      std::memcpy(rows + t * stride + f, padded, sizeof(T) * (count - f));
    }
  }

  const Csr s_;
  const bool whole_columns_;
  const int64_t step_, out_features_, in_features_;  // rows of a tile, and of all
  const Starts tiles_, inputs_;
  int64_t longest_ = 0;  // columns of a row
  Buffer<float> weights_;
};

}  // namespace ROSA_ISA
}  // namespace rosa
