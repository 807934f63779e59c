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

// Adadelta: 18 flops an element, 28 bytes in fp32
template <class T>
struct Adadelta {
  static constexpr int states = 2;
  static constexpr int coefficients = 5;
  static constexpr u32 digest = 0x99D45F01;
  struct K {
    T decay, rho, part, eps, lr;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), rho(row[1]), part(row[2]), eps(row[3]), lr(row[4]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& square_avg, T& acc_delta, const K& k) {
    const T g1 = g + (k.decay * p);
    const T square_avg1 = (k.rho * square_avg) + ((k.part * g1) * g1);
    const T delta = square_root((acc_delta + k.eps) / (square_avg1 + k.eps)) * g1;
    const T new_p = p - (k.lr * delta);
    const T new_acc_delta = (k.rho * acc_delta) + ((k.part * delta) * delta);
    p = new_p;
    square_avg = square_avg1;
    acc_delta = new_acc_delta;
  }
};

// Adagrad: 10 flops an element, 20 bytes in fp32
template <class T>
struct Adagrad {
  static constexpr int states = 1;
  static constexpr int coefficients = 3;
  static constexpr u32 digest = 0x71286EC1;
  struct K {
    T decay, rate, eps;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), rate(row[1]), eps(row[2]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& sum, const K& k) {
    const T g1 = g + (k.decay * p);
    const T sum1 = sum + (g1 * g1);
    const T new_p = p - (k.rate * (g1 / (square_root(sum1) + k.eps)));
    p = new_p;
    sum = sum1;
  }
};

// Adamax: 11 flops an element, 28 bytes in fp32
template <class T>
struct Adamax {
  static constexpr int states = 2;
  static constexpr int coefficients = 6;
  static constexpr u32 digest = 0x49AF3200;
  struct K {
    T decay, b1, a1, b2, eps, rate;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), b1(row[1]), a1(row[2]), b2(row[3]), eps(row[4]), rate(row[5]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& exp_avg, T& exp_inf, const K& k) {
    const T g1 = g + (k.decay * p);
    const T exp_avg1 = (k.b1 * exp_avg) + (k.a1 * g1);
    const T t1 = k.b2 * exp_inf;
    const T t2 = absolute(g1) + k.eps;
    const T exp_inf1 = ((t1 > t2) | (t1 != t1)) ? t1 : t2;
    const T new_p = p - (k.rate * (exp_avg1 / exp_inf1));
    p = new_p;
    exp_avg = exp_avg1;
    exp_inf = exp_inf1;
  }
};

// Adan: 24 flops an element, 44 bytes in fp32
template <class T>
struct Adan {
  static constexpr int states = 4;
  static constexpr int coefficients = 11;
  static constexpr u32 digest = 0xEC6F969D;
  struct K {
    T later, b2, b1, a1, a2, b3, a3, rate, ahead, eps, keep;
    HOST_DEVICE explicit K(const T* row)
        : later(row[0]), b2(row[1]), b1(row[2]), a1(row[3]), a2(row[4]), b3(row[5]), a3(row[6]), rate(row[7]), ahead(row[8]), eps(row[9]), keep(row[10]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& exp_avg, T& exp_avg_diff, T& exp_avg_sq, T& neg_pre_grad, const K& k) {
    const T diff = k.later * (g + neg_pre_grad);
    const T nesterov = g + (k.b2 * diff);
    const T exp_avg1 = (k.b1 * exp_avg) + (k.a1 * g);
    const T exp_avg_diff1 = (k.b2 * exp_avg_diff) + (k.a2 * diff);
    const T exp_avg_sq1 = (k.b3 * exp_avg_sq) + ((k.a3 * nesterov) * nesterov);
    const T update = ((k.rate * exp_avg1) + (k.ahead * exp_avg_diff1)) / (square_root(exp_avg_sq1) + k.eps);
    const T new_p = (k.keep * p) - update;
    const T new_neg_pre_grad = -g;
    p = new_p;
    exp_avg = exp_avg1;
    exp_avg_diff = exp_avg_diff1;
    exp_avg_sq = exp_avg_sq1;
    neg_pre_grad = new_neg_pre_grad;
  }
};

// AdEMAMix: 19 flops an element, 36 bytes in fp32
template <class T>
struct AdEMAMix {
  static constexpr int states = 3;
  static constexpr int coefficients = 10;
  static constexpr u32 digest = 0x3A159AFD;
  struct K {
    T b1, a1, b3, a3, b2, a2, fast, slow, eps, keep;
    HOST_DEVICE explicit K(const T* row)
        : b1(row[0]), a1(row[1]), b3(row[2]), a3(row[3]), b2(row[4]), a2(row[5]), fast(row[6]), slow(row[7]), eps(row[8]), keep(row[9]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& exp_avg_fast, T& exp_avg_slow, T& exp_avg_sq, const K& k) {
    const T exp_avg_fast1 = (k.b1 * exp_avg_fast) + (k.a1 * g);
    const T exp_avg_slow1 = (k.b3 * exp_avg_slow) + (k.a3 * g);
    const T exp_avg_sq1 = (k.b2 * exp_avg_sq) + ((k.a2 * g) * g);
    const T update = ((k.fast * exp_avg_fast1) + (k.slow * exp_avg_slow1)) / (square_root(exp_avg_sq1) + k.eps);
    const T new_p = (k.keep * p) - update;
    p = new_p;
    exp_avg_fast = exp_avg_fast1;
    exp_avg_slow = exp_avg_slow1;
    exp_avg_sq = exp_avg_sq1;
  }
};

// AdEMAMixWithoutFast: 16 flops an element, 28 bytes in fp32
template <class T>
struct AdEMAMixWithoutFast {
  static constexpr int states = 2;
  static constexpr int coefficients = 8;
  static constexpr u32 digest = 0x76766EB4;
  struct K {
    T b3, a3, b2, a2, fast, slow, eps, keep;
    HOST_DEVICE explicit K(const T* row)
        : b3(row[0]), a3(row[1]), b2(row[2]), a2(row[3]), fast(row[4]), slow(row[5]), eps(row[6]), keep(row[7]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& exp_avg_slow, T& exp_avg_sq, const K& k) {
    const T exp_avg_slow1 = (k.b3 * exp_avg_slow) + (k.a3 * g);
    const T exp_avg_sq1 = (k.b2 * exp_avg_sq) + ((k.a2 * g) * g);
    const T update = ((k.fast * g) + (k.slow * exp_avg_slow1)) / (square_root(exp_avg_sq1) + k.eps);
    const T new_p = (k.keep * p) - update;
    p = new_p;
    exp_avg_slow = exp_avg_slow1;
    exp_avg_sq = exp_avg_sq1;
  }
};

// ASGD: 9 flops an element, 20 bytes in fp32
template <class T>
struct ASGD {
  static constexpr int states = 1;
  static constexpr int coefficients = 5;
  static constexpr u32 digest = 0x5A9BDEA0;
  struct K {
    T keep, eta, decay, old, mu;
    HOST_DEVICE explicit K(const T* row)
        : keep(row[0]), eta(row[1]), decay(row[2]), old(row[3]), mu(row[4]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& ax, const K& k) {
    const T p1 = (k.keep * p) - (k.eta * (g + (k.decay * p)));
    const T new_ax = (k.old > T(0.0)) ? ((k.old * ax) + (k.mu * p1)) : p1;
    p = p1;
    ax = new_ax;
  }
};

// NAdam: 18 flops an element, 28 bytes in fp32
template <class T>
struct NAdam {
  static constexpr int states = 2;
  static constexpr int coefficients = 9;
  static constexpr u32 digest = 0x7586D6B9;
  struct K {
    T decay, b1, a1, b2, a2, now, ahead, eps, keep;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), b1(row[1]), a1(row[2]), b2(row[3]), a2(row[4]), now(row[5]), ahead(row[6]), eps(row[7]), keep(row[8]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& exp_avg, T& exp_avg_sq, const K& k) {
    const T g1 = g + (k.decay * p);
    const T exp_avg1 = (k.b1 * exp_avg) + (k.a1 * g1);
    const T exp_avg_sq1 = (k.b2 * exp_avg_sq) + ((k.a2 * g1) * g1);
    const T update = ((k.now * g1) + (k.ahead * exp_avg1)) / (square_root(exp_avg_sq1) + k.eps);
    const T new_p = (k.keep * p) - update;
    p = new_p;
    exp_avg = exp_avg1;
    exp_avg_sq = exp_avg_sq1;
  }
};

// RAdam: 17 flops an element, 28 bytes in fp32
template <class T>
struct RAdam {
  static constexpr int states = 2;
  static constexpr int coefficients = 9;
  static constexpr u32 digest = 0xF6878FA6;
  struct K {
    T decay, b1, a1, b2, a2, rate, eps, plain, keep;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), b1(row[1]), a1(row[2]), b2(row[3]), a2(row[4]), rate(row[5]), eps(row[6]), plain(row[7]), keep(row[8]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& exp_avg, T& exp_avg_sq, const K& k) {
    const T g1 = g + (k.decay * p);
    const T exp_avg1 = (k.b1 * exp_avg) + (k.a1 * g1);
    const T exp_avg_sq1 = (k.b2 * exp_avg_sq) + ((k.a2 * g1) * g1);
    const T update = (k.rate > T(0.0)) ? (k.rate * (exp_avg1 / (square_root(exp_avg_sq1) + k.eps))) : (k.plain * exp_avg1);
    const T new_p = (k.keep * p) - update;
    p = new_p;
    exp_avg = exp_avg1;
    exp_avg_sq = exp_avg_sq1;
  }
};

// RMSprop: 12 flops an element, 20 bytes in fp32
template <class T>
struct RMSprop {
  static constexpr int states = 1;
  static constexpr int coefficients = 5;
  static constexpr u32 digest = 0xF0941E3F;
  struct K {
    T decay, alpha, part, lr, eps;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), alpha(row[1]), part(row[2]), lr(row[3]), eps(row[4]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& square_avg, const K& k) {
    const T g1 = g + (k.decay * p);
    const T square_avg1 = (k.alpha * square_avg) + ((k.part * g1) * g1);
    const T new_p = p - (k.lr * (g1 / (square_root(square_avg1) + k.eps)));
    p = new_p;
    square_avg = square_avg1;
  }
};

// RMSpropMomentum: 14 flops an element, 28 bytes in fp32
template <class T>
struct RMSpropMomentum {
  static constexpr int states = 2;
  static constexpr int coefficients = 6;
  static constexpr u32 digest = 0xF12A4701;
  struct K {
    T decay, alpha, part, momentum, eps, lr;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), alpha(row[1]), part(row[2]), momentum(row[3]), eps(row[4]), lr(row[5]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& square_avg, T& momentum_buffer, const K& k) {
    const T g1 = g + (k.decay * p);
    const T square_avg1 = (k.alpha * square_avg) + ((k.part * g1) * g1);
    const T momentum_buffer1 = (k.momentum * momentum_buffer) + (g1 / (square_root(square_avg1) + k.eps));
    const T new_p = p - (k.lr * momentum_buffer1);
    p = new_p;
    square_avg = square_avg1;
    momentum_buffer = momentum_buffer1;
  }
};

// RMSpropCentered: 16 flops an element, 28 bytes in fp32
template <class T>
struct RMSpropCentered {
  static constexpr int states = 2;
  static constexpr int coefficients = 5;
  static constexpr u32 digest = 0xE6075F12;
  struct K {
    T decay, alpha, part, lr, eps;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), alpha(row[1]), part(row[2]), lr(row[3]), eps(row[4]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& square_avg, T& grad_avg, const K& k) {
    const T g1 = g + (k.decay * p);
    const T t1 = k.part * g1;
    const T square_avg1 = (k.alpha * square_avg) + (t1 * g1);
    const T grad_avg1 = (k.alpha * grad_avg) + t1;
    const T new_p = p - (k.lr * (g1 / (square_root(square_avg1 - (grad_avg1 * grad_avg1)) + k.eps)));
    p = new_p;
    square_avg = square_avg1;
    grad_avg = grad_avg1;
  }
};

// RMSpropCenteredMomentum: 18 flops an element, 36 bytes in fp32
template <class T>
struct RMSpropCenteredMomentum {
  static constexpr int states = 3;
  static constexpr int coefficients = 6;
  static constexpr u32 digest = 0x64097FED;
  struct K {
    T decay, alpha, part, momentum, eps, lr;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), alpha(row[1]), part(row[2]), momentum(row[3]), eps(row[4]), lr(row[5]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& square_avg, T& momentum_buffer, T& grad_avg, const K& k) {
    const T g1 = g + (k.decay * p);
    const T t1 = k.part * g1;
    const T square_avg1 = (k.alpha * square_avg) + (t1 * g1);
    const T grad_avg1 = (k.alpha * grad_avg) + t1;
    const T momentum_buffer1 = (k.momentum * momentum_buffer) + (g1 / (square_root(square_avg1 - (grad_avg1 * grad_avg1)) + k.eps));
    const T new_p = p - (k.lr * momentum_buffer1);
    p = new_p;
    square_avg = square_avg1;
    momentum_buffer = momentum_buffer1;
    grad_avg = grad_avg1;
  }
};

// Rprop: 5 flops an element, 28 bytes in fp32
template <class T>
struct Rprop {
  static constexpr int states = 2;
  static constexpr int coefficients = 4;
  static constexpr u32 digest = 0x0C2A98FB;
  struct K {
    T more, less, least, most;
    HOST_DEVICE explicit K(const T* row)
        : more(row[0]), less(row[1]), least(row[2]), most(row[3]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& prev, T& step_size, const K& k) {
    const T turn = g * prev;
    const bool t1 = turn < T(0.0);
    const T factor = (turn > T(0.0)) ? k.more : (t1 ? k.less : ((turn == T(0.0)) ? T(1.0) : turn));
    const T t2 = step_size * factor;
    const T t3 = ((t2 > k.least) | (t2 != t2)) ? t2 : k.least;
    const T step_size1 = ((t3 < k.most) | (t3 != t3)) ? t3 : k.most;
    const T g1 = t1 ? T(0.0) : g;
    const T new_p = p - (((g1 > T(0.0)) ? T(1.0) : ((g1 < T(0.0)) ? T(-1.0) : g1)) * step_size1);
    p = new_p;
    prev = g1;
    step_size = step_size1;
  }
};

// ScheduleFreeAdamW: 17 flops an element, 28 bytes in fp32
template <class T>
struct ScheduleFreeAdamW {
  static constexpr int states = 2;
  static constexpr int coefficients = 8;
  static constexpr u32 digest = 0x723CA7A0;
  struct K {
    T b2, a2, eps, decay, stay, share, rate, lr;
    HOST_DEVICE explicit K(const T* row)
        : b2(row[0]), a2(row[1]), eps(row[2]), decay(row[3]), stay(row[4]), share(row[5]), rate(row[6]), lr(row[7]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& z, T& exp_avg_sq, const K& k) {
    const T exp_avg_sq1 = (k.b2 * exp_avg_sq) + ((k.a2 * g) * g);
    const T update = (g / (square_root(exp_avg_sq1) + k.eps)) + (k.decay * p);
    const T new_p = ((k.stay * p) + (k.share * z)) - (k.rate * update);
    const T new_z = z - (k.lr * update);
    p = new_p;
    z = new_z;
    exp_avg_sq = exp_avg_sq1;
  }
};

// ScheduleFreeSGD: 10 flops an element, 20 bytes in fp32
template <class T>
struct ScheduleFreeSGD {
  static constexpr int states = 1;
  static constexpr int coefficients = 5;
  static constexpr u32 digest = 0x74F26332;
  struct K {
    T decay, stay, share, rate, lr;
    HOST_DEVICE explicit K(const T* row)
        : decay(row[0]), stay(row[1]), share(row[2]), rate(row[3]), lr(row[4]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& z, const K& k) {
    const T update = g + (k.decay * p);
    const T new_p = ((k.stay * p) + (k.share * z)) - (k.rate * update);
    const T new_z = z - (k.lr * update);
    p = new_p;
    z = new_z;
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

// SOAPAdam: 11 flops an element, 28 bytes in fp32
template <class T>
struct SOAPAdam {
  static constexpr int states = 2;
  static constexpr int coefficients = 5;
  static constexpr u32 digest = 0xA3857BC6;
  struct K {
    T b1, a1, b2, a2, eps;
    HOST_DEVICE explicit K(const T* row)
        : b1(row[0]), a1(row[1]), b2(row[2]), a2(row[3]), eps(row[4]) {}
  };
  HOST_DEVICE static void element(T& p, T g, T& exp_avg, T& exp_avg_sq, const K& k) {
    const T exp_avg1 = (k.b1 * exp_avg) + (k.a1 * g);
    const T exp_avg_sq1 = (k.b2 * exp_avg_sq) + ((k.a2 * g) * g);
    const T new_p = exp_avg1 / (square_root(exp_avg_sq1) + k.eps);
    p = new_p;
    exp_avg = exp_avg1;
    exp_avg_sq = exp_avg_sq1;
  }
};

// SOAPApply: 4 flops an element, 12 bytes in fp32
template <class T>
struct SOAPApply {
  static constexpr int states = 0;
  static constexpr int coefficients = 2;
  static constexpr u32 digest = 0x50D8BD2B;
  struct K {
    T keep, rate;
    HOST_DEVICE explicit K(const T* row)
        : keep(row[0]), rate(row[1]) {}
  };
  HOST_DEVICE static void element(T& p, T g, const K& k) {
    const T new_p = k.keep * (p - (k.rate * g));
    p = new_p;
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain

// The order of this list is the number of a rule. For GPUs the common ones are compiled ahead of time in every usual
// combination of storages, the others in float32 and in float64, and those that are parts of an optimizer are not.
#define FASTTRAIN_RULES(X) FASTTRAIN_COMMON_RULES(X) FASTTRAIN_OTHER_RULES(X) FASTTRAIN_PART_RULES(X)
#define FASTTRAIN_COMMON_RULES(X) \
  X(AdamW) \
  X(AdamWAmsgrad) \
  X(AdamL2) \
  X(AdamL2Amsgrad) \
  X(SGD) \
  X(SGDMomentum) \
  X(SGDNesterov) \
  X(SGDL2) \
  X(SGDL2Momentum) \
  X(SGDL2Nesterov) \
  X(Lion)
#define FASTTRAIN_OTHER_RULES(X) \
  X(Adadelta) \
  X(Adagrad) \
  X(Adamax) \
  X(Adan) \
  X(AdEMAMix) \
  X(AdEMAMixWithoutFast) \
  X(ASGD) \
  X(NAdam) \
  X(RAdam) \
  X(RMSprop) \
  X(RMSpropMomentum) \
  X(RMSpropCentered) \
  X(RMSpropCenteredMomentum) \
  X(Rprop) \
  X(ScheduleFreeAdamW) \
  X(ScheduleFreeSGD)
#define FASTTRAIN_PART_RULES(X) \
  X(MuonMomentum) \
  X(MuonNesterov) \
  X(MuonApply) \
  X(SOAPAdam) \
  X(SOAPApply)
