// The shapes of AMX tiles as LDTILECFG reads them.
#pragma once
#include <cstdint>

namespace rosa {
namespace ROSA_ISA {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG's operand");

}  // namespace ROSA_ISA
}  // namespace rosa
