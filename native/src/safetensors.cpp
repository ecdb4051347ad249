// The file of a program's tensors: mapped, and its header read.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "json_guard.hpp"
#include "program.hpp"

namespace quantflow {

using json = nlohmann::json;

TensorTable parse_safetensors(const std::byte* data, std::size_t size) {
    const std::string where = "weights.safetensors";
    std::uint64_t header = 0;
    if (size < 8) throw Error(where + ": is " + std::to_string(size) + " bytes, too short for a header");
    std::memcpy(&header, data, 8);
    if (header > size - 8) throw Error(where + ": its header of " + std::to_string(header) + " bytes is cut off");
    const std::byte* begin = data + 8 + header;
    const std::uint64_t available = size - 8 - header;
    static const std::unordered_map<std::string, DType> kTypes = {
        {"F32", DType::f32}, {"I8", DType::s8}, {"U8", DType::u8}, {"I32", DType::s32}, {"I64", DType::s64},
        {"BOOL", DType::b8},
    };
    TensorTable table;
    try {
        const char* first = reinterpret_cast<const char*>(data + 8);
        const json root = json::parse(first, first + header, json_guard(where + ": its header", 4));
        if (!root.is_object()) throw Error(where + ": its header is not an object");
        for (const auto& [name, entry] : root.items()) {
            if (name == "__metadata__") continue;
            const std::string at = where + ": tensor '" + name + "'";
            const auto type = kTypes.find(entry.at("dtype").get<std::string>());
            Stored stored;
            if (type == kTypes.end()) {
                table.emplace(name, stored);
                continue;
            }
            stored.dtype = type->second;
            for (const auto& dim : entry.at("shape")) {
                if (!dim.is_number_integer() || dim.get<std::int64_t>() < 0 ||
                    stored.dims.size() >= kMaxRank)
                    throw Error(at + ": its shape is not made of sizes");
                stored.dims.push_back(dim.get<std::int64_t>());
            }
            std::int64_t count = 0;
            try {
                count = checked_count(stored.dims);
            } catch (const Error& error) {
                throw Error(at + ": is " + error.what());
            }
            const auto& offsets = entry.at("data_offsets");
            if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
                !offsets[1].is_number_unsigned())
                throw Error(at + ": data_offsets are not two positions");
            const auto from = offsets[0].get<std::uint64_t>(), to = offsets[1].get<std::uint64_t>();
            if (from > to || to > available ||
                to - from != static_cast<std::uint64_t>(count) * static_cast<std::uint64_t>(size_of(stored.dtype)))
                throw Error(at + ": its bytes do not fit its shape or the file");
            if ((reinterpret_cast<std::uintptr_t>(begin + from) % static_cast<std::uintptr_t>(size_of(stored.dtype))) != 0)
                throw Error(at + ": its bytes are not aligned");
            stored.data = begin + from;
            table.emplace(name, std::move(stored));
        }
    } catch (const json::exception& error) {
        throw Error(where + ": its header is damaged: " + error.what());
    }
    return table;
}

MappedFile::MappedFile(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw Error("'" + path + "' can't be opened: " + std::strerror(errno));
    struct stat info {};
    if (::fstat(file, &info) != 0 || info.st_size <= 0) {
        ::close(file);
        throw Error("'" + path + "' is empty or can't be read");
    }
    void* memory = ::mmap(nullptr, static_cast<std::size_t>(info.st_size), PROT_READ, MAP_PRIVATE, file, 0);
    ::close(file);
    if (memory == MAP_FAILED) throw Error("'" + path + "' can't be mapped: " + std::strerror(errno));
    data_ = static_cast<const std::byte*>(memory);
    size_ = static_cast<std::size_t>(info.st_size);
}

MappedFile::~MappedFile() { ::munmap(const_cast<std::byte*>(data_), size_); }

}  // namespace quantflow
