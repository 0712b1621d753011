// Our GEMM: fp32 products by a weight that is merged while it is packed. Vectors run along the output features, and x
// is read as it lies.
#pragma once
#include "cpu/adapter/merge.h"

namespace rosa {
namespace ROSA_ISA {

// Sums in registers: tokens times panels of LANES output features. CHUNK summed features of a panel stay in
// cache while a whole block of tokens is multiplied by them.
constexpr int TILE_TOKENS = LANES == 16 ? 8 : LANES == 8 ? 6 : 4, TILE_PANELS = 2;
constexpr int64_t BLOCK_TILES = 128 / TILE_TOKENS, MOST_TOKENS = BLOCK_TILES * TILE_TOKENS, CHUNK = 1024;

// One strip of weight + scaling · B A + S, or of its transpose, cut into panels of LANES output features:
// [panel][summed feature][output feature]. The last panel is padded with zeros.
class MergedPanels {
 public:
  const int64_t features, length, panels;  // length: of the sums

  MergedPanels(const Merge& m, bool transposed)
      : features(transposed ? m.columns : m.rows),
        length(transposed ? m.rows : m.columns),
        panels((features + LANES - 1) / LANES),
        packed_(panels * LANES * length) {
    const int64_t chunks = (m.rows + MERGED_ROWS - 1) / MERGED_ROWS;
    // Whole rows are transposed, because the processor foresees them. Columns go in short pieces, because their lines
    // go to panels far apart.
    const int64_t width = transposed ? MERGED_COLUMNS : m.columns, stride = rounded_up(width, LANES);
    for_slots(slots_for(chunks, m.rows * m.columns), chunks, [&](int64_t, int64_t begin, int64_t end) {
      static thread_local Arena arena;
      float* piece[1];
      arena.cut({MERGED_ROWS * stride}, piece);
      Merge part = m;
      part.out = {piece[0], stride};
      for (int64_t i = begin * MERGED_ROWS; i < smaller(end * MERGED_ROWS, m.rows); i += MERGED_ROWS)
        for (int64_t k = 0; k < m.columns; k += width) {
          part.first_row = m.first_row + i;
          part.rows = smaller(MERGED_ROWS, m.rows - i);
          part.first_column = m.first_column + k;
          part.columns = smaller(width, m.columns - k);
          merge_some<float, float>(part, 0, part.rows);
          transposed ? pack_lines(piece[0], i, part.rows, k, part.columns)
                     : pack_columns(piece[0], stride, i, part.rows);
        }
    });
  }

  const float* panel(int64_t p) const { return packed_ + p * panel_size(); }
  int64_t panel_size() const { return LANES * length; }

 private:
  // Rows [i, i + rows), output features.
  void pack_columns(const float* piece, int64_t stride, int64_t i, int64_t rows) {
    for (int64_t j = 0; j < rows; j += LANES)
      for (int64_t k = 0; k < length; k += LANES)
        transpose_square([&](int q) { return j + q < rows ? load(piece + (j + q) * stride + k) : zero(); },
                         [&](int q, Vec column) {
                           if (k + q < length) store(packed_ + (i + j) * length + (k + q) * LANES, column);
                         });
  }
  // Rows [i, i + rows) of columns [k, k + columns), those output features.
  void pack_lines(const float* piece, int64_t i, int64_t rows, int64_t k, int64_t columns) {
    for (int64_t c = 0; c < columns; c += LANES) {
      float* to = packed_ + (k + c) * length + i * LANES;
      for (int64_t j = 0; j < rows; ++j, to += LANES) store(to, load_some(piece + j * MERGED_COLUMNS + c, columns - c));
    }
  }

  Buffer<float> packed_;
};

// What a tile of tokens computes of a product: y (tokens, features) for the summed features [k, k + length), added to
// y, or in the first chunk to the bias.
struct Tile {
  const float* x;
  int64_t x_stride;
  float* y;
  int64_t y_stride, tokens, features, k, length;
  const float* bias;   // null but in the first chunk; padded as the panels are
  const float* ahead;  // the part of the next panels that this tile prefetches to the second-level cache
};

template <int Panels>
inline void multiply_tile(const Tile& f, const float* panel, int64_t panel_size) {
  RegisterTile<TILE_TOKENS, Panels> tile;
  tile.for_each([&](int t, int v) {
    tile.sums[t][v] = f.bias         ? load(f.bias + v * LANES)
                      : t < f.tokens ? load_some(f.y + t * f.y_stride + v * LANES, f.features - v * LANES)
                                     : zero();
  });
  const int64_t x_stride = f.x_stride, length = f.length;
  const float *x = f.x + f.k, *ahead = f.ahead;
  panel += f.k * LANES;
  for (int64_t k = 0; k < length; ++k, panel += LANES) {
    if (k % BLOCK_TILES == 0)
#pragma GCC unroll 2
      for (int v = 0; v < Panels; ++v) __builtin_prefetch(ahead + k / BLOCK_TILES * LANES + v * panel_size, 0, 2);
    tile.add_outer([&](int t) { return x[t * x_stride + k]; }, [&](int v) { return load(panel + v * panel_size); });
  }
  tile.for_each([&](int t, int v) {
    if (t < f.tokens) store_some(f.y + t * f.y_stride + v * LANES, f.features - v * LANES, tile.sums[t][v]);
  });
}

// Panels [begin, end) for the tokens [first, first + tokens) of one block.
inline void multiply_block(const Gemm& f, const MergedPanels& w, const float* bias, int64_t first, int64_t tokens,
                           int64_t begin, int64_t end, float* last_rows) {
  const float* x = (const float*)f.x.data + first * f.x.stride;
  float* y = (float*)f.y.data + first * f.y.stride;
  // A tile reads as many rows as it has: those of the last tokens are copied.
  const int64_t whole = tokens / TILE_TOKENS * TILE_TOKENS;
  for (int64_t t = whole; t < tokens; ++t)
    copy_elements(last_rows + (t - whole) * w.length, x + t * f.x.stride, w.length);
  const int64_t chunks = larger(1, (w.length + CHUNK - 1) / CHUNK);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t k = w.length * c / chunks, length = w.length * (c + 1) / chunks - k;
    for (int64_t p = begin; p < end; p += TILE_PANELS)
      for (int64_t t = 0; t < tokens; t += TILE_TOKENS) {
        const Tile tile = {t < whole ? x + t * f.x.stride : last_rows,
                           t < whole ? f.x.stride : w.length,
                           y + t * f.y.stride + p * LANES,
                           f.y.stride,
                           tokens - t,
                           w.features - p * LANES,
                           k,
                           length,
                           c == 0 ? bias + p * LANES : nullptr,
                           w.panel(p + TILE_PANELS) + (k + length * (t / TILE_TOKENS) / BLOCK_TILES) * LANES};
        end - p >= TILE_PANELS ? multiply_tile<TILE_PANELS>(tile, w.panel(p), w.panel_size())
                               : multiply_tile<1>(tile, w.panel(p), w.panel_size());
      }
  }
}

inline void gemm(const Gemm& f) {
  const MergedPanels w(f.weight, f.transposed);
  Buffer<float> bias(w.panels * LANES);
  clear_elements((float*)bias, w.panels * LANES);
  if (f.bias) copy_elements((float*)bias, f.bias, w.features);
  // Few blocks are cut into parts by panels, so that every thread has one.
  const int64_t blocks = (f.tokens + MOST_TOKENS - 1) / MOST_TOKENS;
  const int64_t groups = (w.panels + TILE_PANELS - 1) / TILE_PANELS;
  const int64_t block = blocks == 0 ? 0 : rounded_up((f.tokens + blocks - 1) / blocks, TILE_TOKENS);
  const int64_t parts = blocks == 0 || blocks >= 4 * thread_count() ? 1 : smaller(groups, thread_count());
  for_slots(smaller(thread_count(), blocks * parts), blocks * parts, [&](int64_t, int64_t begin, int64_t end) {
    static thread_local Arena arena;
    float* last_rows[1];
    arena.cut({TILE_TOKENS * w.length}, last_rows);
    clear_elements(last_rows[0], TILE_TOKENS * w.length);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / parts * block, part = item % parts;
      multiply_block(f, w, bias, first, larger(0, smaller(block, f.tokens - first)),
                     groups * part / parts * TILE_PANELS, smaller(w.panels, groups * (part + 1) / parts * TILE_PANELS),
                     last_rows[0]);
    }
  });
}

}  // namespace ROSA_ISA
}  // namespace rosa
