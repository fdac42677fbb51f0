// A program's arguments: FOLDER KEY=NUMBER..., each array a file of the folder; results are written there.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator.h"

namespace {

std::string folder;
std::map<std::string, double> options;

template <class T = int64_t>
T option(const char* name) {
  if (!options.count(name)) throw std::invalid_argument(std::string("missing: ") + name);
  return static_cast<T>(options[name]);
}

template <class T>
std::vector<T> read(const std::string& name) {
  std::vector<T> values;
  FILE* file = std::fopen((folder + "/" + name).c_str(), "rb");
  if (!file) return values;
  std::fseek(file, 0, SEEK_END);
  values.resize(std::ftell(file) / sizeof(T));
  std::rewind(file);
  if (!values.empty() && std::fread(values.data(), sizeof(T), values.size(), file) != values.size())
    throw std::runtime_error(name);
  std::fclose(file);
  return values;
}

template <class T>
void write(const std::string& name, const std::vector<T>& values) {
  FILE* file = std::fopen((folder + "/" + name).c_str(), "wb");
  if (!file || (!values.empty() && std::fwrite(values.data(), sizeof(T), values.size(), file) != values.size()))
    throw std::runtime_error(name);
  std::fclose(file);
}

template <class T>
const T* data_or_null(const std::vector<T>& v) {
  return v.empty() ? nullptr : v.data();
}

inline void set_order(fastgen::emulator::Launch& how) {
  how.order = static_cast<fastgen::emulator::Order>(option<int>("order"));
  how.seed = option<uint32_t>("seed");
  how.fill = option<int>("fill");
}

// 0; or 3 and a message where the emulator finds fault.
template <class F>
int guarded(int count, char** words, F&& run) {
  try {
    folder = words[1];
    for (int i = 2; i < count; ++i) {
      const std::string word = words[i];
      options[word.substr(0, word.find('='))] = std::atof(word.c_str() + word.find('=') + 1);
    }
    run();
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 3;
  }
}

}  // namespace
