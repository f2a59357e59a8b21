// SPDX-License-Identifier: Apache-2.0
// Checks whether the levels of a pyramid cover the pixels of value, and words the errors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace vitkern {

// "[[8, 8], [4, 4]]" or, with one number each, "[0, 64]".
inline std::string in_words(const int64_t* numbers, int64_t count, int64_t of_each) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    if (of_each == 1) {
      text += std::to_string(numbers[i]);
      continue;
    }
    text += "[" + std::to_string(numbers[2 * i]) + ", " + std::to_string(numbers[2 * i + 1]) + "]";
  }
  return text + "]";
}

// Throws unless levels of (height, width) at these first pixels cover [0, pixels) without gap or overlap. Empty ones may
// begin anywhere.
inline void check_levels(const char* op, const int64_t* shapes, const int64_t* starts, int64_t levels,
                         int64_t pixels) {
  const auto fail = [&](const std::string& what) {
    throw std::invalid_argument(std::string(op) + ": " + what);
  };
  const auto all_shapes = [&] { return in_words(shapes, levels, 2); };
  std::vector<std::pair<int64_t, int64_t>> covered;  // first pixel and number of pixels, where out of order
  int64_t end = 0;
  bool in_order = true;
  for (int64_t level = 0; level < levels; ++level) {
    const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
    if (height < 0 || width < 0) fail("spatial_shapes must be of sizes of at least 0, got " + all_shapes());
    if (width > 0 && height > pixels / width)
      fail("spatial_shapes must be the sizes of levels with S=" + std::to_string(pixels) +
           " pixels in all, as value, got " + all_shapes());
    const int64_t count = height * width;
    if (count == 0) continue;
    in_order = in_order && starts[level] == end;
    end += count;
  }
  if (!in_order) {
    for (int64_t level = 0; level < levels; ++level)
      if (const int64_t count = shapes[2 * level] * shapes[2 * level + 1]; count > 0)
        covered.emplace_back(starts[level], count);
    std::sort(covered.begin(), covered.end());
    int64_t next = 0;
    for (const auto& [start, count] : covered) {
      if (start != next)
        fail("level_start_index must be the first pixel of each level of " + all_shapes() +
             ", without gap or overlap, got " + in_words(starts, levels, 1));
      next += count;
    }
  }
  if (end != pixels)
    fail("spatial_shapes must be the sizes of levels with S=" + std::to_string(pixels) +
         " pixels in all, as value, got " + all_shapes() + ": " + std::to_string(end));
}

}  // namespace vitkern
