// What is fuzzed, and how that is counted by whoever drives it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../src/engine.hpp"

namespace quantflow::fuzz {

// Bytes choose a program of the table's grammar; it is lowered and executed.
void fuzz_calls(const std::uint8_t* data, std::size_t size);
// Bytes are a program: 4 bytes (little endian) length of program.json, program.json, weights.safetensors. What the loader
// lets through is lowered and executed.
void fuzz_lower(const std::uint8_t* data, std::size_t size);
// The program that `fuzz_calls` executes for these bytes, in the form that `fuzz_lower` reads; "": it executes none.
std::string written(const std::uint8_t* data, std::size_t size);

// Twice on one thread, over memory that holds other bytes beforehand, on four, and with the batch in parts on eight: what is
// computed must be the same. Ends the process where it isn't.
void execute(std::shared_ptr<LoadedProgram>, const std::vector<InputForm>&, const std::string& text);
std::shared_ptr<Backend> backend_of(int threads);

// What a run has come to: "built", "valid", "executed", "op NAME", "kernel NAME".
void count(const std::string& what);
// What memory of a backend holds before it is written to.
extern unsigned char filling;

}  // namespace quantflow::fuzz
