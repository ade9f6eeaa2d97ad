// What csrc/hopper/launch.cuh has for a device, for the model: a launch runs the grid and returns what was wrong.
#pragma once

namespace ewa::hopper {

inline machine::Options options_of_launches;
inline int multiprocessors_of_launches = 4;  // fewer than any device has: the grid would take long

inline TensorMap make_map(const Operand3d& tensor, int box_rows, std::string&) {
    const int itemsize = tensor.itemsize();
    return machine::make_tensor_map(const_cast<void*>(tensor.data), itemsize,
                                    {tensor.columns, tensor.rows, tensor.experts},
                                    {tensor.row_stride * itemsize, tensor.expert_stride * itemsize},
                                    {static_cast<int>(swizzle_bytes) / itemsize, box_rows, 1});
}

template <class Shape, class Epilogue>
std::string launch_product(const Maps<Epilogue>& maps, const Work& work, const Gather& rows,
                           const typename Epilogue::Arguments& arguments, int, void*) {
    const int clusters = std::min(work.tiles(), multiprocessors_of_launches / 2);
    const machine::Grid grid{clusters, 2, num_threads, (Product<Shape, Epilogue>::shared_bytes + 15) / 16 * 16};
    return machine::launch(grid, options_of_launches,
                           [&] { product_kernel<Shape, Epilogue>(maps, work, rows, arguments); });
}

inline std::string launch_sum(const float* parts, int64_t experts, int splits, int64_t size, void* out, int type, int,
                              void*) {
    return machine::launch({multiprocessors_of_launches, 1, sum_threads, 16}, options_of_launches,
                           [&] { sum_parts_kernel<sum_threads>(parts, experts, splits, size, out, type); });
}

}  // namespace ewa::hopper
