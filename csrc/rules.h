// GENERATED from fasttrain.optim by `make rules`. Do not edit: change the equation and generate again.
//
// One struct per rule. `element` is the arithmetic of one element; every operation is one IEEE operation,
// so this file must be compiled without contraction into fused multiply-adds.
#pragma once
#include "common.h"

namespace fasttrain {
inline namespace FT_ISA {

// AdamW: 14 flops an element, 28 bytes in fp32
template <class T>
struct AdamW {
  static constexpr int states = 2;
  static constexpr int coefficients = 7;
  static constexpr u32 digest = 0x539428C9;
  struct K {
    T b1, a1, b2, a2, keep, rate, eps;
    HOST_DEVICE explicit K(const T* row)
        : b1(row[0]), a1(row[1]), b2(row[2]), a2(row[3]), keep(row[4]), rate(row[5]), eps(row[6]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& exp_avg, T& exp_avg_sq, const K& k) {
    const T exp_avg1 = (k.b1 * exp_avg) + (k.a1 * g);
    const T exp_avg_sq1 = (k.b2 * exp_avg_sq) + ((k.a2 * g) * g);
    const T new_p = (k.keep * p) - (k.rate * (exp_avg1 / (square_root(exp_avg_sq1) + k.eps)));
    p = new_p;
    exp_avg = exp_avg1;
    exp_avg_sq = exp_avg_sq1;
  }
};

// AdamWAmsgrad: 14 flops an element, 36 bytes in fp32
template <class T>
struct AdamWAmsgrad {
  static constexpr int states = 3;
  static constexpr int coefficients = 7;
  static constexpr u32 digest = 0xB4627854;
  struct K {
    T b1, a1, b2, a2, keep, rate, eps;
    HOST_DEVICE explicit K(const T* row)
        : b1(row[0]), a1(row[1]), b2(row[2]), a2(row[3]), keep(row[4]), rate(row[5]), eps(row[6]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq, const K& k) {
    const T exp_avg1 = (k.b1 * exp_avg) + (k.a1 * g);
    const T exp_avg_sq1 = (k.b2 * exp_avg_sq) + ((k.a2 * g) * g);
    const T max_exp_avg_sq1 = ((max_exp_avg_sq > exp_avg_sq1) | (max_exp_avg_sq != max_exp_avg_sq)) ? max_exp_avg_sq : exp_avg_sq1;
    const T new_p = (k.keep * p) - (k.rate * (exp_avg1 / (square_root(max_exp_avg_sq1) + k.eps)));
    p = new_p;
    exp_avg = exp_avg1;
    exp_avg_sq = exp_avg_sq1;
    max_exp_avg_sq = max_exp_avg_sq1;
  }
};

// AdamL2: 15 flops an element, 28 bytes in fp32
template <class T>
struct AdamL2 {
  static constexpr int states = 2;
  static constexpr int coefficients = 7;
  static constexpr u32 digest = 0xD2380717;
  struct K {
    T decay, b1, a1, b2, a2, rate, eps;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), b1(row[1]), a1(row[2]), b2(row[3]), a2(row[4]), rate(row[5]), eps(row[6]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& exp_avg, T& exp_avg_sq, const K& k) {
    const T g1 = g + (k.decay * p);
    const T exp_avg1 = (k.b1 * exp_avg) + (k.a1 * g1);
    const T exp_avg_sq1 = (k.b2 * exp_avg_sq) + ((k.a2 * g1) * g1);
    const T new_p = p - (k.rate * (exp_avg1 / (square_root(exp_avg_sq1) + k.eps)));
    p = new_p;
    exp_avg = exp_avg1;
    exp_avg_sq = exp_avg_sq1;
  }
};

// AdamL2Amsgrad: 15 flops an element, 36 bytes in fp32
template <class T>
struct AdamL2Amsgrad {
  static constexpr int states = 3;
  static constexpr int coefficients = 7;
  static constexpr u32 digest = 0x984C3942;
  struct K {
    T decay, b1, a1, b2, a2, rate, eps;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), b1(row[1]), a1(row[2]), b2(row[3]), a2(row[4]), rate(row[5]), eps(row[6]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq, const K& k) {
    const T g1 = g + (k.decay * p);
    const T exp_avg1 = (k.b1 * exp_avg) + (k.a1 * g1);
    const T exp_avg_sq1 = (k.b2 * exp_avg_sq) + ((k.a2 * g1) * g1);
    const T max_exp_avg_sq1 = ((max_exp_avg_sq > exp_avg_sq1) | (max_exp_avg_sq != max_exp_avg_sq)) ? max_exp_avg_sq : exp_avg_sq1;
    const T new_p = p - (k.rate * (exp_avg1 / (square_root(max_exp_avg_sq1) + k.eps)));
    p = new_p;
    exp_avg = exp_avg1;
    exp_avg_sq = exp_avg_sq1;
    max_exp_avg_sq = max_exp_avg_sq1;
  }
};

// SGD: 3 flops an element, 12 bytes in fp32
template <class T>
struct SGD {
  static constexpr int states = 0;
  static constexpr int coefficients = 1;
  static constexpr u32 digest = 0xA67C6B1B;
  struct K {
    T lr;
    HOST_DEVICE explicit K(const T* row)
        : lr(row[0]) {}
  };
  HOST_DEVICE static void element(T& p, T g, const K& k) {
    const T new_p = p - (k.lr * g);
    p = new_p;
  }
};

// SGDMomentum: 6 flops an element, 20 bytes in fp32
template <class T>
struct SGDMomentum {
  static constexpr int states = 1;
  static constexpr int coefficients = 3;
  static constexpr u32 digest = 0xB2E09FAE;
  struct K {
    T keep, add, lr;
    HOST_DEVICE explicit K(const T* row)
        : keep(row[0]), add(row[1]), lr(row[2]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& momentum_buffer, const K& k) {
    const T momentum_buffer1 = (k.keep * momentum_buffer) + (k.add * g);
    const T new_p = p - (k.lr * momentum_buffer1);
    p = new_p;
    momentum_buffer = momentum_buffer1;
  }
};

// SGDNesterov: 8 flops an element, 20 bytes in fp32
template <class T>
struct SGDNesterov {
  static constexpr int states = 1;
  static constexpr int coefficients = 4;
  static constexpr u32 digest = 0xF08D38CD;
  struct K {
    T keep, add, lr, ahead;
    HOST_DEVICE explicit K(const T* row)
        : keep(row[0]), add(row[1]), lr(row[2]), ahead(row[3]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& momentum_buffer, const K& k) {
    const T momentum_buffer1 = (k.keep * momentum_buffer) + (k.add * g);
    const T new_p = p - (k.lr * (g + (k.ahead * momentum_buffer1)));
    p = new_p;
    momentum_buffer = momentum_buffer1;
  }
};

// SGDL2: 5 flops an element, 12 bytes in fp32
template <class T>
struct SGDL2 {
  static constexpr int states = 0;
  static constexpr int coefficients = 2;
  static constexpr u32 digest = 0xB17935EE;
  struct K {
    T decay, lr;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), lr(row[1]) {}
  };
  HOST_DEVICE static void element(T& p, T g, const K& k) {
    const T g1 = g + (k.decay * p);
    const T new_p = p - (k.lr * g1);
    p = new_p;
  }
};

// SGDL2Momentum: 8 flops an element, 20 bytes in fp32
template <class T>
struct SGDL2Momentum {
  static constexpr int states = 1;
  static constexpr int coefficients = 4;
  static constexpr u32 digest = 0x51216367;
  struct K {
    T decay, keep, add, lr;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), keep(row[1]), add(row[2]), lr(row[3]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& momentum_buffer, const K& k) {
    const T g1 = g + (k.decay * p);
    const T momentum_buffer1 = (k.keep * momentum_buffer) + (k.add * g1);
    const T new_p = p - (k.lr * momentum_buffer1);
    p = new_p;
    momentum_buffer = momentum_buffer1;
  }
};

// SGDL2Nesterov: 10 flops an element, 20 bytes in fp32
template <class T>
struct SGDL2Nesterov {
  static constexpr int states = 1;
  static constexpr int coefficients = 5;
  static constexpr u32 digest = 0xCC5D53B5;
  struct K {
    T decay, keep, add, lr, ahead;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), keep(row[1]), add(row[2]), lr(row[3]), ahead(row[4]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& momentum_buffer, const K& k) {
    const T g1 = g + (k.decay * p);
    const T momentum_buffer1 = (k.keep * momentum_buffer) + (k.add * g1);
    const T new_p = p - (k.lr * (g1 + (k.ahead * momentum_buffer1)));
    p = new_p;
    momentum_buffer = momentum_buffer1;
  }
};

// Lion: 10 flops an element, 20 bytes in fp32
template <class T>
struct Lion {
  static constexpr int states = 1;
  static constexpr int coefficients = 6;
  static constexpr u32 digest = 0xBCA1CFA3;
  struct K {
    T b1, a1, keep, lr, b2, a2;
    HOST_DEVICE explicit K(const T* row)
        : b1(row[0]), a1(row[1]), keep(row[2]), lr(row[3]), b2(row[4]), a2(row[5]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& exp_avg, const K& k) {
    const T t1 = (k.b1 * exp_avg) + (k.a1 * g);
    const T update = (t1 > T(0.0)) ? T(1.0) : ((t1 < T(0.0)) ? T(-1.0) : t1);
    const T new_p = (k.keep * p) - (k.lr * update);
    const T new_exp_avg = (k.b2 * exp_avg) + (k.a2 * g);
    p = new_p;
    exp_avg = new_exp_avg;
  }
};

// MuonMomentum: 4 flops an element, 20 bytes in fp32
template <class T>
struct MuonMomentum {
  static constexpr int states = 1;
  static constexpr int coefficients = 2;
  static constexpr u32 digest = 0x495997E6;
  struct K {
    T keep, add;
    HOST_DEVICE explicit K(const T* row)
        : keep(row[0]), add(row[1]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& momentum_buffer, const K& k) {
    const T momentum_buffer1 = (k.keep * momentum_buffer) + (k.add * g);
    p = momentum_buffer1;
    momentum_buffer = momentum_buffer1;
  }
};

// MuonNesterov: 6 flops an element, 20 bytes in fp32
template <class T>
struct MuonNesterov {
  static constexpr int states = 1;
  static constexpr int coefficients = 2;
  static constexpr u32 digest = 0xBDDB4C02;
  struct K {
    T keep, add;
    HOST_DEVICE explicit K(const T* row)
        : keep(row[0]), add(row[1]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& momentum_buffer, const K& k) {
    const T t1 = k.add * g;
    const T momentum_buffer1 = (k.keep * momentum_buffer) + t1;
    const T new_p = t1 + (k.keep * momentum_buffer1);
    p = new_p;
    momentum_buffer = momentum_buffer1;
  }
};

// MuonApply: 4 flops an element, 12 bytes in fp32
template <class T>
struct MuonApply {
  static constexpr int states = 0;
  static constexpr int coefficients = 2;
  static constexpr u32 digest = 0x029936D8;
  struct K {
    T keep, rate;
    HOST_DEVICE explicit K(const T* row)
        : keep(row[0]), rate(row[1]) {}
  };
  HOST_DEVICE static void element(T& p, T g, const K& k) {
    const T new_p = (k.keep * p) - (k.rate * g);
    p = new_p;
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain

// The order of this list is the number of a rule.
#define FASTTRAIN_RULES(X) X(AdamW) X(AdamWAmsgrad) X(AdamL2) X(AdamL2Amsgrad) X(SGD) X(SGDMomentum) X(SGDNesterov) X(SGDL2) X(SGDL2Momentum) X(SGDL2Nesterov) X(Lion) X(MuonMomentum) X(MuonNesterov) X(MuonApply)
