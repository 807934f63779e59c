// GENERATED from fasttrain.optim by `make rules`. Do not edit: change the equation and generate again.
//
// One struct per rule. `element` is the arithmetic of one element; every operation is one IEEE operation,
// so this file must be compiled without contraction into fused multiply-adds.
#pragma once
#include "common.h"

namespace fasttrain {
inline namespace FT_ISA {

// LAMBMeasure: 16 flops an element, 24 bytes in fp32
template <class T>
struct LAMBMeasure {
  static constexpr int states = 2;
  static constexpr int coefficients = 7;
  static constexpr int sums = 2;
  static constexpr u32 changed = 6;  // of p and the states, bit by bit
  static constexpr u32 digest = 0xCE149147;
  struct K {
    T b1, a1, b2, a2, correct, eps, decay;
    HOST_DEVICE explicit K(const T* row)
        : b1(row[0]), a1(row[1]), b2(row[2]), a2(row[3]), correct(row[4]), eps(row[5]), decay(row[6]) {}
  };
  HOST_DEVICE static void element([[maybe_unused]] T& p, [[maybe_unused]] T g, [[maybe_unused]] T& exp_avg, [[maybe_unused]] T& exp_avg_sq, [[maybe_unused]] T& p_sq, [[maybe_unused]] T& update_sq, [[maybe_unused]] const K& k) {
    const T exp_avg1 = (k.b1 * exp_avg) + (k.a1 * g);
    const T exp_avg_sq1 = (k.b2 * exp_avg_sq) + ((k.a2 * g) * g);
    const T update = (k.correct * (exp_avg1 / (square_root(exp_avg_sq1) + k.eps))) + (k.decay * p);
    const T new_p_sq = p * p;
    const T new_update_sq = update * update;
    exp_avg = exp_avg1;
    exp_avg_sq = exp_avg_sq1;
    p_sq = new_p_sq;
    update_sq = new_update_sq;
  }
};

// LAMBApply: 9 flops an element, 16 bytes in fp32
template <class T>
struct LAMBApply {
  static constexpr int states = 1;
  static constexpr int coefficients = 4;
  static constexpr int sums = 0;
  static constexpr u32 changed = 1;  // of p and the states, bit by bit
  static constexpr u32 digest = 0x888515C3;
  struct K {
    T rate, correct, eps, decay;
    HOST_DEVICE explicit K(const T* row)
        : rate(row[0]), correct(row[1]), eps(row[2]), decay(row[3]) {}
  };
  HOST_DEVICE static void element([[maybe_unused]] T& p, [[maybe_unused]] T g, [[maybe_unused]] T& exp_avg_sq, [[maybe_unused]] const K& k) {
    const T new_p = p - (k.rate * ((k.correct * (g / (square_root(exp_avg_sq) + k.eps))) + (k.decay * p)));
    p = new_p;
  }
};

// LARSMeasurePlain: 3 flops an element, 8 bytes in fp32
template <class T>
struct LARSMeasurePlain {
  static constexpr int states = 0;
  static constexpr int coefficients = 0;
  static constexpr int sums = 2;
  static constexpr u32 changed = 0;  // of p and the states, bit by bit
  static constexpr u32 digest = 0xE6D56FF4;
  struct K {
    HOST_DEVICE explicit K(const T*) {}
  };
  HOST_DEVICE static void element([[maybe_unused]] T& p, [[maybe_unused]] T g, [[maybe_unused]] T& p_sq, [[maybe_unused]] T& g_sq, [[maybe_unused]] const K& k) {
    const T new_p_sq = p * p;
    const T new_g_sq = g * g;
    p_sq = new_p_sq;
    g_sq = new_g_sq;
  }
};

// LARSMeasure: 3 flops an element, 12 bytes in fp32
template <class T>
struct LARSMeasure {
  static constexpr int states = 1;
  static constexpr int coefficients = 0;
  static constexpr int sums = 2;
  static constexpr u32 changed = 0;  // of p and the states, bit by bit
  static constexpr u32 digest = 0xBAE41C64;
  struct K {
    HOST_DEVICE explicit K(const T*) {}
  };
  HOST_DEVICE static void element([[maybe_unused]] T& p, [[maybe_unused]] T g, [[maybe_unused]] T& momentum_buffer, [[maybe_unused]] T& p_sq, [[maybe_unused]] T& g_sq, [[maybe_unused]] const K& k) {
    const T new_p_sq = p * p;
    const T new_g_sq = g * g;
    p_sq = new_p_sq;
    g_sq = new_g_sq;
  }
};

// LARSPlain: 5 flops an element, 12 bytes in fp32
template <class T>
struct LARSPlain {
  static constexpr int states = 0;
  static constexpr int coefficients = 2;
  static constexpr int sums = 0;
  static constexpr u32 changed = 1;  // of p and the states, bit by bit
  static constexpr u32 digest = 0xF76019AD;
  struct K {
    T rate, decay;
    HOST_DEVICE explicit K(const T* row)
        : rate(row[0]), decay(row[1]) {}
  };
  HOST_DEVICE static void element([[maybe_unused]] T& p, [[maybe_unused]] T g, [[maybe_unused]] const K& k) {
    const T new_p = p - (k.rate * (g + (k.decay * p)));
    p = new_p;
  }
};

// LARSMomentum: 7 flops an element, 20 bytes in fp32
template <class T>
struct LARSMomentum {
  static constexpr int states = 1;
  static constexpr int coefficients = 3;
  static constexpr int sums = 0;
  static constexpr u32 changed = 3;  // of p and the states, bit by bit
  static constexpr u32 digest = 0x08E6313D;
  struct K {
    T momentum, rate, decay;
    HOST_DEVICE explicit K(const T* row)
        : momentum(row[0]), rate(row[1]), decay(row[2]) {}
  };
  HOST_DEVICE static void element([[maybe_unused]] T& p, [[maybe_unused]] T g, [[maybe_unused]] T& momentum_buffer, [[maybe_unused]] const K& k) {
    const T momentum_buffer1 = (k.momentum * momentum_buffer) + (k.rate * (g + (k.decay * p)));
    const T new_p = p - momentum_buffer1;
    p = new_p;
    momentum_buffer = momentum_buffer1;
  }
};

// LARSNesterov: 9 flops an element, 20 bytes in fp32
template <class T>
struct LARSNesterov {
  static constexpr int states = 1;
  static constexpr int coefficients = 3;
  static constexpr int sums = 0;
  static constexpr u32 changed = 3;  // of p and the states, bit by bit
  static constexpr u32 digest = 0x2ED87998;
  struct K {
    T rate, decay, momentum;
    HOST_DEVICE explicit K(const T* row)
        : rate(row[0]), decay(row[1]), momentum(row[2]) {}
  };
  HOST_DEVICE static void element([[maybe_unused]] T& p, [[maybe_unused]] T g, [[maybe_unused]] T& momentum_buffer, [[maybe_unused]] const K& k) {
    const T move = k.rate * (g + (k.decay * p));
    const T momentum_buffer1 = (k.momentum * momentum_buffer) + move;
    const T new_p = p - (move + (k.momentum * momentum_buffer1));
    p = new_p;
    momentum_buffer = momentum_buffer1;
  }
};

// StableAdamWMeasure: 10 flops an element, 24 bytes in fp32
template <class T>
struct StableAdamWMeasure {
  static constexpr int states = 2;
  static constexpr int coefficients = 5;
  static constexpr int sums = 1;
  static constexpr u32 changed = 6;  // of p and the states, bit by bit
  static constexpr u32 digest = 0xACFA2D11;
  struct K {
    T b1, a1, b2, a2, least;
    HOST_DEVICE explicit K(const T* row)
        : b1(row[0]), a1(row[1]), b2(row[2]), a2(row[3]), least(row[4]) {}
  };
  HOST_DEVICE static void element([[maybe_unused]] T& p, [[maybe_unused]] T g, [[maybe_unused]] T& exp_avg, [[maybe_unused]] T& exp_avg_sq, [[maybe_unused]] T& ratio_sq, [[maybe_unused]] const K& k) {
    const T exp_avg1 = (k.b1 * exp_avg) + (k.a1 * g);
    const T exp_avg_sq1 = (k.b2 * exp_avg_sq) + ((k.a2 * g) * g);
    const T new_ratio_sq = (g / (((exp_avg_sq1 > k.least) | (exp_avg_sq1 != exp_avg_sq1)) ? exp_avg_sq1 : k.least)) * g;
    exp_avg = exp_avg1;
    exp_avg_sq = exp_avg_sq1;
    ratio_sq = new_ratio_sq;
  }
};

// StableAdamWApply: 7 flops an element, 16 bytes in fp32
template <class T>
struct StableAdamWApply {
  static constexpr int states = 1;
  static constexpr int coefficients = 3;
  static constexpr int sums = 0;
  static constexpr u32 changed = 1;  // of p and the states, bit by bit
  static constexpr u32 digest = 0xFACAEC52;
  struct K {
    T keep, rate, eps;
    HOST_DEVICE explicit K(const T* row)
        : keep(row[0]), rate(row[1]), eps(row[2]) {}
  };
  HOST_DEVICE static void element([[maybe_unused]] T& p, [[maybe_unused]] T g, [[maybe_unused]] T& exp_avg_sq, [[maybe_unused]] const K& k) {
    const T new_p = (k.keep * p) - (k.rate * (g / (square_root(exp_avg_sq) + k.eps)));
    p = new_p;
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain

// The order of this list is the number of a stage.
#define FASTTRAIN_STAGES(X) \
  X(LAMBMeasure) \
  X(LAMBApply) \
  X(LARSMeasurePlain) \
  X(LARSMeasure) \
  X(LARSPlain) \
  X(LARSMomentum) \
  X(LARSNesterov) \
  X(StableAdamWMeasure) \
  X(StableAdamWApply)
