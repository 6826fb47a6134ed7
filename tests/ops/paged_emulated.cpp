// Runs the kernel of paged attention for another processor: what its arguments point to comes from a file, region by
// region (address, size, bytes): Args, the groups, others, and last what it writes, which goes to a second file.
#include KERNEL
#include <cstdio>
#include <vector>

struct Region { int64_t address, size; char* data; };

int main(int, char** files) {
  FILE* in = std::fopen(files[1], "rb");
  std::vector<Region> regions;
  Region x;
  while (std::fread(&x.address, 8, 1, in) == 1 && std::fread(&x.size, 8, 1, in) == 1) {
    x.data = (char*)std::aligned_alloc(64, (x.size + 127) / 64 * 64);
    if (std::fread(x.data, 1, x.size, in) != size_t(x.size)) return 3;
    regions.push_back(x);
  }
  for (int i = 0; i < 2; i++)  // both structs, where an address of a region is a pointer into it
    for (int64_t at = 0; at + 8 <= regions[i].size; at += 8) {
      int64_t word;
      std::memcpy(&word, regions[i].data + at, 8);
      for (const Region& r : regions)
        if (word >= r.address && word < r.address + r.size) {
          const char* moved = r.data + (word - r.address);
          std::memcpy(regions[i].data + at, &moved, 8);
          break;
        }
    }
  const int code = headq_paged_attention((const Args*)regions[0].data);
  FILE* out = std::fopen(files[2], "wb");
  for (size_t i = regions.size() - 2; i < regions.size(); i++) std::fwrite(regions[i].data, 1, regions[i].size, out);
  std::fclose(out);
  return code;
}
