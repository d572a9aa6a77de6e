#include "trap.hpp"

#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace galley {

namespace {

long count = 0;
unsigned high_halves = 0;  // where the upper halves of ymm0..15 are in a signal frame (standard format of XSAVE)

struct Ymm { uint8_t v[32]; };

uint8_t* frame(const ucontext_t& at) { return (uint8_t*)at.uc_mcontext.fpregs; }

Ymm read(const ucontext_t& at, int reg) {
    Ymm y;
    uint64_t present;
    std::memcpy(y.v, at.uc_mcontext.fpregs->_xmm + reg, 16);
    std::memcpy(&present, frame(at) + 512, 8);
    if (present & 4) std::memcpy(y.v + 16, frame(at) + high_halves + 16 * reg, 16);
    else std::memset(y.v + 16, 0, 16);  // all upper halves are zero and were not stored
    return y;
}

void write(ucontext_t& at, int reg, const Ymm& y) {
    uint64_t present;
    std::memcpy(&present, frame(at) + 512, 8);
    if (!(present & 4)) std::memset(frame(at) + high_halves, 0, 256);
    present |= 6;
    std::memcpy(frame(at) + 512, &present, 8);
    std::memcpy(at.uc_mcontext.fpregs->_xmm + reg, y.v, 16);
    std::memcpy(frame(at) + high_halves + 16 * reg, y.v + 16, 16);
}

int64_t general(const ucontext_t& at, int reg) {
    static const int where[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return at.uc_mcontext.gregs[where[reg]];
}

// Address of a memory operand, and where the instruction ends. `code` is at ModRM. (Intel SDM, volume 2, section 2.1.5.)
const uint8_t* address(const ucontext_t& at, const uint8_t*& code, bool b, bool x) {
    const int mod = *code >> 6, rm = *code & 7;
    code++;
    int64_t a = 0;
    bool relative = false, wide = mod == 2;
    if (rm == 4) {
        const int scale = *code >> 6, index = (*code >> 3 & 7) | x << 3, base = *code & 7;
        code++;
        if (index != 4) a += general(at, index) << scale;
        if (base == 5 && mod == 0) wide = true;
        else a += general(at, base | b << 3);
    } else if (rm == 5 && mod == 0) {
        relative = wide = true;
    } else {
        a += general(at, rm | b << 3);
    }
    int32_t offset = 0;
    if (wide) std::memcpy(&offset, code, 4), code += 4;
    else if (mod == 1) offset = (int8_t)*code++;
    a += offset;
    return (const uint8_t*)(relative ? a + (int64_t)code : a);
}

void refused(int, siginfo_t*, void* context) {
    ucontext_t& at = *(ucontext_t*)context;
    const uint8_t* code = (const uint8_t*)at.uc_mcontext.gregs[REG_RIP];
    // C4, then ~R ~X ~B and map 0F38, then W = 0, ~vvvv, L and prefix 66
    if (code[0] != 0xc4 || (code[1] & 31) != 2 || (code[2] & 0x83) != 1 || code[3] != 0x50) {
        signal(SIGILL, SIG_DFL);  // met again on return
        return;
    }
    const bool r = !(code[1] & 128), x = !(code[1] & 64), b = !(code[1] & 32), full = code[2] & 4;
    const int first = ~(code[2] >> 3) & 15, to = (code[4] >> 3 & 7) | r << 3;
    Ymm sum = read(at, to);
    const Ymm w = read(at, first);
    Ymm v{};
    if (code[4] >> 6 == 3) {
        v = read(at, (code[4] & 7) | b << 3);
        code += 5;
    } else {
        code += 4;
        const uint8_t* from = address(at, code, b, x);
        std::memcpy(v.v, from, full ? 32 : 16);
    }
    for (int lane = 0; lane < (full ? 8 : 4); lane++) {
        int32_t s;
        std::memcpy(&s, sum.v + 4 * lane, 4);
        for (int i = 4 * lane; i < 4 * lane + 4; i++) s += w.v[i] * (int8_t)v.v[i];
        std::memcpy(sum.v + 4 * lane, &s, 4);
    }
    if (!full) std::memset(sum.v + 16, 0, 16);
    write(at, to, sum);
    at.uc_mcontext.gregs[REG_RIP] = (greg_t)code;
    count++;
}

}  // namespace

void emulate_vpdpbusd() {
    __builtin_cpu_init();
    unsigned a, c, d;
    if (!__builtin_cpu_supports("avx2") || !__get_cpuid_count(13, 2, &a, &high_halves, &c, &d))
        throw std::runtime_error("this processor has no AVX2 registers to emulate with");
    struct sigaction action {};
    action.sa_sigaction = refused;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, nullptr);
}

long emulated() { return count; }

}  // namespace galley
