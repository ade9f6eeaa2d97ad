// What csrc/hopper/launch.cuh has for a device, for the model: a launch runs the grid and returns what was wrong.
#pragma once

namespace ewa::hopper {

inline machine::Options options_of_launches;
inline int multiprocessors_of_launches = 4;  // fewer than any device has: the grid would take long

inline machine::Options dependent(machine::Options options) {
    options.dependent = true;
    return options;
}

inline std::string choose(const Where&) { return {}; }

inline TensorMap make_map(const Operand3d& tensor, int box_rows, std::string&) {
    const int itemsize = tensor.itemsize();
    return machine::make_tensor_map(const_cast<void*>(tensor.data), itemsize,
                                    {tensor.columns, tensor.rows, tensor.experts},
                                    {tensor.row_stride * itemsize, tensor.expert_stride * itemsize},
                                    {static_cast<int>(swizzle_bytes) / itemsize, box_rows, 1});
}

inline machine::Grid grid_of(int tiles, int shared_bytes) {
    return {std::min(tiles, multiprocessors_of_launches / 2), 2, num_threads, (shared_bytes + 15) / 16 * 16};
}

template <class Shape, class Epilogue>
std::string launch_product(const Task<Epilogue>& task, const Where&) {
    return machine::launch(grid_of(task.work.tiles(), Product<Shape, Epilogue>::shared_bytes),
                           dependent(options_of_launches), [&] { product_kernel<Shape, Epilogue>(task); });
}

template <class FirstShape, class FirstEpilogue, class SecondShape, class SecondEpilogue>
std::string launch_pair(const Task<FirstEpilogue>& first, const Task<SecondEpilogue>& second, const HandOver& hand_over,
                        const Where&) {
    using Both = Pair<FirstShape, FirstEpilogue, SecondShape, SecondEpilogue>;
    machine::Options options = dependent(options_of_launches);
    options.ctas_at_once = multiprocessors_of_launches;  // they wait for one another
    return machine::launch(
        grid_of(std::max(first.work.tiles(), second.work.tiles()), Both::shared_bytes), options,
        [&] { pair_kernel<FirstShape, FirstEpilogue, SecondShape, SecondEpilogue>(first, second, hand_over); });
}

template <class... Parameters, class... Arguments>
std::string launch_simple(void (*kernel)(Parameters...), int blocks, int threads, const Where&,
                          const Arguments&... arguments) {
    const machine::Grid grid{std::min(blocks, multiprocessors_of_launches), 1, threads, 16};
    return machine::launch(grid, dependent(options_of_launches), [&] { kernel(arguments...); });
}

}  // namespace ewa::hopper
