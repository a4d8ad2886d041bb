// What is wrong with the compiled code ends a launch; and the names of the integers.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>

namespace emulator {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i32 = int32_t;
using i64 = int64_t;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Arguments>
[[noreturn]] void fault(const char* format, Arguments... arguments) {
  char text[256];
  std::snprintf(text, sizeof text, format, arguments...);
  throw Fault(text);
}

}  // namespace emulator
