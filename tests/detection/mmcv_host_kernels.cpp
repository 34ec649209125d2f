// mmcv's CUDA kernels that have no CPU twin, compiled for the host: every kernel is one loop over its elements, and
// without threads an atomic addition is an addition. make_mmcv_fixtures.py builds this beside mmcv's headers; the names
// and arguments are those of mmcv's own binding.
#include <torch/extension.h>

#include <algorithm>
#include <cfloat>
#include <cmath>

using std::max;
using std::min;
#define __global__
#define __device__
#define __shared__
#define __syncthreads()
#define CUDA_1D_KERNEL_LOOP(i, n) for (int i = 0; i < (n); i++)
struct Index {
  unsigned x = 0, y = 0, z = 0;
};
static Index threadIdx, blockIdx, blockDim;
template <typename T>
void atomicAdd(T* place, T value) {
  *place += value;
}

#include "bilinear.inc"
#include "ms_deform_attn_cuda_kernel.cuh"
#include "roi_pool_cuda_kernel.cuh"
#include "sigmoid_focal_loss_cuda_kernel.cuh"
#include "softmax_focal_loss_cuda_kernel.cuh"

using at::Tensor;
using namespace pybind11::literals;

#define FOR_TYPE_OF(tensor, ...)                                 \
  AT_DISPATCH_FLOATING_TYPES(tensor.scalar_type(), "host", [&] { \
    using T = scalar_t;                                          \
    __VA_ARGS__;                                                 \
  })
#define DATA(tensor) tensor.data_ptr<T>()
#define OPTIONAL(tensor) (tensor.numel() ? tensor.data_ptr<T>() : nullptr)
#define LONGS(tensor) tensor.data_ptr<int64_t>()

static void sigmoid_forward(Tensor x, Tensor target, Tensor weight, Tensor y, float gamma, float alpha) {
  FOR_TYPE_OF(x, sigmoid_focal_loss_forward_cuda_kernel<T>(y.numel(), DATA(x), LONGS(target), OPTIONAL(weight), DATA(y),
                                                           T(gamma), T(alpha), x.size(1)));
}

static void sigmoid_backward(Tensor x, Tensor target, Tensor weight, Tensor dx, float gamma, float alpha) {
  FOR_TYPE_OF(x, sigmoid_focal_loss_backward_cuda_kernel<T>(dx.numel(), DATA(x), LONGS(target), OPTIONAL(weight),
                                                            DATA(dx), T(gamma), T(alpha), x.size(1)));
}

static void softmax_forward(Tensor p, Tensor target, Tensor weight, Tensor y, float gamma, float alpha) {
  FOR_TYPE_OF(p, softmax_focal_loss_forward_cuda_kernel<T>(y.numel(), DATA(p), LONGS(target), OPTIONAL(weight), DATA(y),
                                                           T(gamma), T(alpha), p.size(1)));
}

static void softmax_backward(Tensor p, Tensor target, Tensor weight, Tensor buff, Tensor dx, float gamma, float alpha) {
  FOR_TYPE_OF(p, softmax_focal_loss_backward_cuda1_kernel<T>(buff.numel(), DATA(p), LONGS(target), OPTIONAL(weight),
                                                             DATA(buff), T(gamma), T(alpha), p.size(1)));
  FOR_TYPE_OF(p, softmax_focal_loss_backward_cuda2_kernel<T>(dx.numel(), DATA(p), LONGS(target), DATA(buff), DATA(dx),
                                                             p.size(1)));
}

static void roi_pool_forward(Tensor x, Tensor rois, Tensor y, Tensor argmax, int height, int width, float scale) {
  FOR_TYPE_OF(x, roi_pool_forward_cuda_kernel<T>(y.numel(), DATA(x), DATA(rois), DATA(y), argmax.data_ptr<int>(),
                                                 height, width, T(scale), x.size(1), x.size(2), x.size(3)));
}

static void roi_pool_backward(Tensor dy, Tensor rois, Tensor argmax, Tensor dx, int height, int width, float) {
  FOR_TYPE_OF(dx, roi_pool_backward_cuda_kernel<T>(dy.numel(), DATA(dy), DATA(rois), argmax.data_ptr<int>(), DATA(dx),
                                                   height, width, dx.size(1), dx.size(2), dx.size(3)));
}

static Tensor attention_forward(Tensor value, Tensor shapes, Tensor start, Tensor places, Tensor weights, int) {
  Tensor y = at::zeros({value.size(0), places.size(1), value.size(2) * value.size(3)}, value.options());
  FOR_TYPE_OF(value, ms_deformable_im2col_gpu_kernel<T>(
                         y.numel(), DATA(value), LONGS(shapes), LONGS(start), DATA(places), DATA(weights),
                         value.size(0), value.size(1), value.size(2), value.size(3), shapes.size(0), places.size(1),
                         places.size(4), DATA(y)));
  return y;
}

static void attention_backward(Tensor value, Tensor shapes, Tensor start, Tensor places, Tensor weights, Tensor dy,
                               Tensor dvalue, Tensor dplaces, Tensor dweights, int) {
  FOR_TYPE_OF(value, ms_deformable_col2im_gpu_kernel_gm<T>(
                         dy.numel(), DATA(dy), DATA(value), LONGS(shapes), LONGS(start), DATA(places), DATA(weights),
                         value.size(0), value.size(1), value.size(2), value.size(3), shapes.size(0), places.size(1),
                         places.size(4), DATA(dvalue), DATA(dplaces), DATA(dweights)));
}

PYBIND11_MODULE(_host, m) {
  m.def("sigmoid_focal_loss_forward", &sigmoid_forward, "input"_a, "target"_a, "weight"_a, "output"_a, "gamma"_a,
        "alpha"_a);
  m.def("sigmoid_focal_loss_backward", &sigmoid_backward, "input"_a, "target"_a, "weight"_a, "grad_input"_a, "gamma"_a,
        "alpha"_a);
  m.def("softmax_focal_loss_forward", &softmax_forward, "input"_a, "target"_a, "weight"_a, "output"_a, "gamma"_a,
        "alpha"_a);
  m.def("softmax_focal_loss_backward", &softmax_backward, "input"_a, "target"_a, "weight"_a, "buff"_a, "grad_input"_a,
        "gamma"_a, "alpha"_a);
  m.def("roi_pool_forward", &roi_pool_forward, "input"_a, "rois"_a, "output"_a, "argmax"_a, "pooled_height"_a,
        "pooled_width"_a, "spatial_scale"_a);
  m.def("roi_pool_backward", &roi_pool_backward, "grad_output"_a, "rois"_a, "argmax"_a, "grad_input"_a,
        "pooled_height"_a, "pooled_width"_a, "spatial_scale"_a);
  m.def("ms_deform_attn_forward", &attention_forward, "value"_a, "value_spatial_shapes"_a, "value_level_start_index"_a,
        "sampling_locations"_a, "attention_weights"_a, "im2col_step"_a);
  m.def("ms_deform_attn_backward", &attention_backward, "value"_a, "value_spatial_shapes"_a,
        "value_level_start_index"_a, "sampling_locations"_a, "attention_weights"_a, "grad_output"_a, "grad_value"_a,
        "grad_sampling_loc"_a, "grad_attn_weight"_a, "im2col_step"_a);
}
