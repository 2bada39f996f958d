// The instruction set levels that this build holds, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "fastnorm/kernels.hpp"

namespace fastnorm {

// Levels that are built in and that this processor can run, lowest first.
std::vector<const Level*> levels();

// The level in use: FASTNORM_ISA's, else the highest.
const Level& level();
inline const Kernels& kernels(DType dtype) { return *level().kernels[static_cast<std::size_t>(dtype)]; }

// Chooses a level by name; throws std::invalid_argument for one that is unknown or cannot run here.
void choose_level(const std::string& name);

}  // namespace fastnorm
