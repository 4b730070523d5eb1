// Argument checks that raise ValueError or IndexError in Python.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace guda_fast {

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// pybind11 turns std::invalid_argument into ValueError and std::out_of_range into IndexError.
template <typename... Parts>
void require(bool holds, const Parts&... message) {
  if (!holds) throw std::invalid_argument(join(message...));
}

template <typename... Parts>
void require_index(bool holds, const Parts&... message) {
  if (!holds) throw std::out_of_range(join(message...));
}

}  // namespace guda_fast
