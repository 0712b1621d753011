// fp32 products with a weight that is merged while it is packed. Vectors run along the output features; x is read as it lies.
#pragma once
#include "forward.h"
#include "merge.h"

namespace rosa {
namespace ROSA_ISA {

// Sums in registers: tokens times panels of LANES output features.
constexpr int TILE_TOKENS = LANES == 16 ? 8 : 4, TILE_PANELS = LANES == 8 ? 3 : 2;

// A strip of weight + scaling · B A + S, or of its transpose, by panels of LANES output features: [panel][summed feature][output
// feature], zero past the last one.
class MergedPanels {
 public:
  const int64_t features, length, panels;  // length: of the sums

  MergedPanels(const Merge& m, bool transposed)
      : features(transposed ? m.columns : m.rows),
        length(transposed ? m.rows : m.columns),
        panels((features + LANES - 1) / LANES),
        packed_(panels * LANES * length) {
    constexpr int64_t ELEMENTS_A_SLOT = 32768;  // fewer are not worth waking a thread
    const int64_t chunks = (m.rows + MERGED_ROWS - 1) / MERGED_ROWS, stride = rounded_up(m.columns, LANES);
    const int64_t slots = larger(1, smaller(smaller(thread_count(), chunks), m.rows * m.columns / ELEMENTS_A_SLOT));
    for_slots(slots, chunks, [&](int64_t, int64_t begin, int64_t end) {
      static thread_local Arena arena;
      float* rows[1];
      arena.cut({MERGED_ROWS * stride}, rows);
      for (int64_t i = begin * MERGED_ROWS; i < smaller(end * MERGED_ROWS, m.rows); i += MERGED_ROWS) {
        Merge chunk = m;
        chunk.first_row += i;
        chunk.rows = smaller(MERGED_ROWS, m.rows - i);
        chunk.out = {rows[0], stride};
        merge_some<float, float>(chunk, 0, chunk.rows);
        transposed ? pack_lines(rows[0], stride, i, chunk.rows) : pack_columns(rows[0], stride, i, chunk.rows);
      }
    });
  }

  const float* panel(int64_t p) const { return packed_ + p * panel_size(); }
  int64_t panel_size() const { return LANES * length; }

 private:
  // Output features [first, first + count), a row each.
  void pack_columns(const float* rows, int64_t stride, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES)
      for (int64_t k = 0; k < length; k += LANES) {
        Vec tile[LANES];
        for (int64_t j = 0; j < LANES; ++j) tile[j] = i + j < count ? load(rows + (i + j) * stride + k) : zero();
        transpose(tile);
        float* to = packed_ + (first + i) * length + k * LANES;
        for (int64_t j = 0; j < smaller(LANES, length - k); ++j) store(to + j * LANES, tile[j]);
      }
  }
  // Summed features [first, first + count), a row each.
  void pack_lines(const float* rows, int64_t stride, int64_t first, int64_t count) {
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t k = 0; k < count; ++k) {
        float* to = packed_ + p * panel_size() + (first + k) * LANES;
        const float* from = rows + k * stride + p * LANES;
        const int64_t width = smaller(LANES, features - p * LANES);
        if (width == LANES) {
          store(to, load(from));
        } else {
          std::memset(to, 0, sizeof(float) * LANES);
          std::memcpy(to, from, sizeof(float) * width);
        }
      }
  }

  Buffer<float> packed_;
};

// y[t] = bias + x[t] · w for `tokens` of TILE_TOKENS rows and `Panels` panels from p on; bias padded as the panels are.
template <int Panels>
inline void multiply_tile(const float* x, int64_t x_stride, const MergedPanels& w, int64_t p, const float* bias, int64_t tokens,
                          float* y, int64_t y_stride) {
  Vec sums[TILE_TOKENS][Panels];
#pragma GCC unroll 8
  for (int t = 0; t < TILE_TOKENS; ++t)
#pragma GCC unroll 3
    for (int v = 0; v < Panels; ++v) sums[t][v] = load(bias + (p + v) * LANES);
  const float* panel = w.panel(p);
  const int64_t size = w.panel_size(), length = w.length;
  for (int64_t k = 0; k < length; ++k, panel += LANES) {
    Vec features[Panels];
#pragma GCC unroll 3
    for (int v = 0; v < Panels; ++v) features[v] = load(panel + v * size);
#pragma GCC unroll 8
    for (int t = 0; t < TILE_TOKENS; ++t) {
      const Vec c = broadcast(x[t * x_stride + k]);
#pragma GCC unroll 3
      for (int v = 0; v < Panels; ++v) sums[t][v] = fma(c, features[v], sums[t][v]);
    }
  }
  const int64_t count = smaller(Panels * LANES, w.features - p * LANES);
  float line[Panels * LANES];
#pragma GCC unroll 8
  for (int t = 0; t < TILE_TOKENS; ++t) {
    if (t >= tokens) return;
    float* to = count == Panels * LANES ? y + t * y_stride : line;
#pragma GCC unroll 3
    for (int v = 0; v < Panels; ++v) store(to + v * LANES, sums[t][v]);
    if (to == line) std::memcpy(y + t * y_stride, line, sizeof(float) * count);
  }
}

// Panels [begin, end) for one block of tokens; a panel meets all of them while it is in the cache.
inline void multiply_block(const Product& f, const MergedPanels& w, const float* bias, int64_t first, int64_t tokens,
                           int64_t begin, int64_t end, float* last_rows) {
  const float* x = (const float*)f.x.data + first * f.x.stride;
  float* y = (float*)f.y.data + first * f.y.stride;
  const int64_t whole = tokens / TILE_TOKENS * TILE_TOKENS;  // the other tokens' rows are copied: a tile reads as many as it has
  for (int64_t t = whole; t < whole + (whole < tokens ? TILE_TOKENS : 0); ++t)
    if (t < tokens)
      std::memcpy(last_rows + (t - whole) * w.length, x + t * f.x.stride, sizeof(float) * w.length);
    else
      std::memset(last_rows + (t - whole) * w.length, 0, sizeof(float) * w.length);
  for (int64_t p = begin; p < end; p += TILE_PANELS)
    for (int64_t t = 0; t < tokens; t += TILE_TOKENS) {
      const float* rows = t < whole ? x + t * f.x.stride : last_rows;
      const int64_t stride = t < whole ? f.x.stride : w.length;
      float* to = y + t * f.y.stride + p * LANES;
      if (end - p >= TILE_PANELS)
        multiply_tile<TILE_PANELS>(rows, stride, w, p, bias, tokens - t, to, f.y.stride);
      else
        for (int64_t q = p; q < end; ++q, to += LANES) multiply_tile<1>(rows, stride, w, q, bias, tokens - t, to, f.y.stride);
    }
}

inline void product(const Product& f) {
  const MergedPanels w(f.weight, f.transposed);
  Buffer<float> bias(w.panels * LANES);
  std::memset(bias, 0, sizeof(float) * w.panels * LANES);
  if (f.bias) std::memcpy(bias, f.bias, sizeof(float) * w.features);
  // Few blocks are cut into parts by panels, so that every thread has one.
  const int64_t blocks = block_count(f.tokens), groups = (w.panels + TILE_PANELS - 1) / TILE_PANELS;
  const int64_t parts = blocks == 0 || blocks >= 4 * thread_count() ? 1 : smaller(groups, thread_count());
  for_slots(smaller(thread_count(), blocks * parts), blocks * parts, [&](int64_t, int64_t begin, int64_t end) {
    static thread_local Arena arena;
    float* last_rows[1];
    arena.cut({TILE_TOKENS * w.length}, last_rows);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / parts * TOKENS, part = item % parts;
      multiply_block(f, w, bias, first, smaller(TOKENS, f.tokens - first), groups * part / parts * TILE_PANELS,
                     smaller(w.panels, groups * (part + 1) / parts * TILE_PANELS), last_rows[0]);
    }
  });
}

}  // namespace ROSA_ISA
}  // namespace rosa
