// A step that launches one of the custom kernels.
#include "steps.hpp"

namespace quantflow::xpu {
namespace {

class KernelStep final : public Step {
public:
    KernelStep(Device& device, const std::string& kernel, const sycl::nd_range<3>& range,
               std::vector<SetArgument> arguments)
        : device_(device),
          kernel_(device.kernels.get(kernel)),
          range_(range),
          arguments_(std::move(arguments)),
          name_("sycl." + kernel.substr(3)) {}

    void run() override {
        device_.begin(name_);
        try {
            // With an event, though nobody asks for it: an in-order queue keeps submissions without one in order among
            // themselves, but not on busy cores with those of oneDNN for a CPU, which are tasks of the host.
            device_.queue.submit([this](sycl::handler& handler) {
                for (std::size_t i = 0; i < arguments_.size(); ++i) arguments_[i](handler, static_cast<int>(i));
                handler.parallel_for(range_, kernel_);
            });
        } catch (const sycl::exception& e) {
            throw Error(name_ + " on " + device_.description() + ": " + e.what());
        }
    }
    std::string kernel() const override { return name_; }

private:
    Device& device_;
    sycl::kernel kernel_;
    sycl::nd_range<3> range_;
    std::vector<SetArgument> arguments_;
    std::string name_;
};

}  // namespace

StepPtr make_launch(Device& device, const std::string& kernel, const sycl::nd_range<3>& range,
                    std::vector<SetArgument> arguments) {
    return std::make_unique<KernelStep>(device, kernel, range, std::move(arguments));
}

}  // namespace quantflow::xpu
