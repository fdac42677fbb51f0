// What wavenet_generate.cu does for wavenet_generate.cpp. Errors: of the CUDA runtime.
#pragma once

#include "wavenet_job.h"

namespace fastgen::wavenet {

int active(const Plan& plan, const Shape& shape, bool bf16);  // clusters that the current device holds at once
int launch(const Plan& plan, const Job& job, bool bf16, void* stream);  // returns an error, or 0

}  // namespace fastgen::wavenet
