#include <algorithm>
#include <tuple>

#include "parameter_pass.h"

namespace ewa {
namespace {

template <class T>
bool put(T& held, T value) {
    const bool differs = held != value;
    held = value;
    return differs;
}

bool same(const Options& a, const Options& b) {
    const auto numbers = [](const Options& o) {
        return std::tie(o.lr, o.lr_at, o.lr_is_double, o.beta1, o.beta2, o.eps, o.weight_decay, o.maximize);
    };
    return numbers(a) == numbers(b);
}

}  // namespace

void Table::add(int64_t num_experts, const std::array<int64_t, 6>& tensors, const std::array<int64_t, 6>& strides,
                int32_t options) {
    for (int64_t e = 0; e < num_experts; ++e) {
        std::array<Place, 6> of_expert;
        for (size_t i = 0; i < of_expert.size(); ++i) of_expert[i] = {tensors[i], e * strides[i]};
        places.push_back(of_expert);
        Member member{};
        member.options = options;
        member.counts = e == 0;
        members.push_back(member);
    }
}

bool Table::set(const std::vector<uintptr_t>& addresses, std::vector<Options> given) {
    const auto at = [&](const Place& place) -> uintptr_t {
        return place.tensor < 0 ? 0 : addresses.at(place.tensor) + place.offset;
    };
    bool differs = !std::equal(options.begin(), options.end(), given.begin(), given.end(), same);
    options = std::move(given);
    for (size_t i = 0; i < members.size(); ++i) {
        Member& m = members[i];
        const auto& [param, grad, exp_avg, exp_avg_sq, step, copy] = places[i];
        differs |= put(m.param, reinterpret_cast<void*>(at(param)));
        differs |= put(m.grad, reinterpret_cast<void*>(at(grad)));
        differs |= put(m.exp_avg, reinterpret_cast<void*>(at(exp_avg)));
        differs |= put(m.exp_avg_sq, reinterpret_cast<void*>(at(exp_avg_sq)));
        differs |= put(m.step, reinterpret_cast<float*>(at(step)));
        differs |= put(m.copy, reinterpret_cast<uint16_t*>(at(copy)));
        if (m.grad != nullptr) options.at(m.options);
    }
    return differs;
}

}  // namespace ewa
