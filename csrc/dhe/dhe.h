#pragma once
namespace mprec {
struct DheKernels {};
}  // namespace mprec
