#pragma once

namespace fastgen {

constexpr int kGroup = 8;  // weights that a thread reads at once

}  // namespace fastgen
