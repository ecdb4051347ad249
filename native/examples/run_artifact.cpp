// An artifact run without Python, through the C interface alone.
//
//   run_artifact ARTIFACT INPUT_NAME DIMS OUTPUT_NAME < input.f32 > output.f32
//
// ARTIFACT is the folder that `model.save` wrote, DIMS the input's sizes as in 1x3x224x224. Names are those of
// program.json: inputs[0].name and output.value. Input and output are raw float32, row by row.
#include <quantflow/native.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

char g_error[4096];

void require(int32_t status) {
    if (status == 0) return;
    std::fprintf(stderr, "run_artifact: %s\n", g_error);
    std::exit(1);
}

size_t elements(const qf_form& form) {
    size_t count = 1;
    for (int32_t d = 0; d < form.rank; ++d) count *= static_cast<size_t>(form.dims[d]);
    return count;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 5) {
        std::fputs("usage: run_artifact ARTIFACT INPUT_NAME DIMS OUTPUT_NAME < input.f32 > output.f32\n", stderr);
        return 2;
    }
    if (qf_abi_version() != QF_ABI_VERSION) {
        std::fprintf(stderr, "run_artifact: the library's interface is version %d, this program's is %d; build it again\n",
                     qf_abi_version(), QF_ABI_VERSION);
        return 1;
    }
    const std::string folder = argv[1];
    qf_form input{};
    input.dtype = QF_F32;
    for (char* at = argv[3]; *at != '\0' && input.rank < 16; ++input.rank) {
        input.dims[input.rank] = std::strtoll(at, &at, 10);
        if (input.dims[input.rank] < 1 || (*at != 'x' && *at != '\0')) {
            std::fprintf(stderr, "run_artifact: DIMS is '%s'; write sizes of 1 or more as in 1x3x224x224\n", argv[3]);
            return 2;
        }
        if (*at == 'x') ++at;
    }

    qf_program* program = nullptr;
    qf_backend* backend = nullptr;
    qf_engine* engine = nullptr;
    qf_plan* plan = nullptr;
    require(qf_program_open((folder + "/program.json").c_str(), (folder + "/weights.safetensors").c_str(), &program,
                            g_error, sizeof g_error));
    require(qf_backend_host(1, &backend, g_error, sizeof g_error));
    // The weights are packed here, once; a plan is made once for each shape, and runs as often as wanted.
    require(qf_engine_create(program, backend, &engine, g_error, sizeof g_error));
    const char* input_name = argv[2];
    const char* output_name = argv[4];
    require(qf_plan_create(engine, 0, qf_program_nodes(program), &input_name, &input, 1, &output_name, 1, &plan, g_error,
                           sizeof g_error));
    qf_form output{};
    qf_plan_outputs(plan, &output);
    if (output.dtype != QF_F32) {
        std::fprintf(stderr, "run_artifact: '%s' is not float32\n", output_name);
        return 1;
    }

    std::vector<float> x(elements(input)), y(elements(output));
    if (std::fread(x.data(), sizeof(float), x.size(), stdin) != x.size() || std::getchar() != EOF) {
        std::fprintf(stderr, "run_artifact: the input is not %zu float32 numbers\n", x.size());
        return 1;
    }
    const void* from = x.data();
    void* to = y.data();
    require(qf_plan_run(plan, &from, &to, g_error, sizeof g_error));
    std::fwrite(y.data(), sizeof(float), y.size(), stdout);

    qf_plan_free(plan);
    qf_engine_free(engine);
    qf_backend_free(backend);
    qf_program_free(program);
    return 0;
}
