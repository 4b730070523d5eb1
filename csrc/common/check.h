// Argument checks that raise ValueError or IndexError in Python.
#pragma once

#include <cstdint>
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

// A pointer that is going to be read or written as T.
template <typename T>
void require_pointer(const T* pointer, const char* op, const char* name) {
  require(pointer != nullptr, op, ": ", name, " must not be a null pointer");
  require(reinterpret_cast<std::uintptr_t>(pointer) % alignof(T) == 0, op, ": ", name, " must be aligned to ",
          alignof(T), " bytes");
}

}  // namespace guda_fast
