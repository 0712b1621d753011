// Uses the emulated tiles as the processor would not allow, or once rightly: the number of the use is the argument.
#define ROSA_ISA misuse
#define ROSA_LANES 16
#include "emulated_pairs.h"
//
#include "emulated_tiles.h"

using namespace rosa;
using namespace rosa::misuse;

int main(int, char** arguments) {
  uint32_t memory[16 * 16] = {};
  TileConfig config;
  for (int tile = 0; tile < 3; ++tile) config.rows[tile] = 16, config.row_bytes[tile] = 64;
  const int use = std::atoi(arguments[1]);
  if (use == 1) config.rows[1] = 17;
  if (use == 2) config.row_bytes[1] = 68;
  if (use == 3) config.row_bytes[1] = 0;
  if (use == 4) config.palette = 0;
  if (use == 5) config.rows[2] = 15;  // the right operand has a row for each pair of the left one's
  if (use != 6) tile_configure(config);
  if (use == 7) tile_release();
  if (use == 8) tile_zero<5>();
  tile_load<0>(memory, 64);
  tile_load<1>(memory, 64);
  tile_load<2>(memory, 64);
  tile_multiply<0, 1, 2>();
  tile_store<0>(memory, 64);
}
