// Which instruction set's kernels run: chosen once per process, read once per call.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace guda_fast::cpu {

// Those that this build contains, best last.
std::vector<std::string> built_instruction_sets();

// Those that this build contains and this processor runs, best last.
std::vector<std::string> instruction_sets();

// The kernels in use; the best available until set_instruction_set is called.
const Kernels& kernels();

// Throws std::invalid_argument naming the choices.
void set_instruction_set(const std::string& name);

}  // namespace guda_fast::cpu
