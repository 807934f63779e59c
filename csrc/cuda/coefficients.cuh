// GENERATED from fasttrain.optim by `make rules`. Do not edit: change `coefficients` and generate again.
//
// One struct for each rule and choice of its options: the coefficients of one row, in the order of the rule, from the
// numbers that the comment names. Every operation is one IEEE operation in double precision.
#pragma once
#include "cuda/scalars.cuh"

namespace fasttrain {
inline namespace FT_ISA {

// rule AdamW: step, lr, betas_0, betas_1, eps, weight_decay
struct AdamW_7F5BE5C5 {
  static constexpr int inputs = 6, coefficients = 7;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_eps = numbers[4];
    const double h_weight_decay = numbers[5];
    const double t1 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    k[0] = static_cast<T>(h_betas_0);
    k[1] = static_cast<T>((1.0 - h_betas_0));
    k[2] = static_cast<T>(h_betas_1);
    k[3] = static_cast<T>((1.0 - h_betas_1));
    k[4] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
    k[5] = static_cast<T>(((h_lr * t1) / (1.0 - integer_power(h_betas_0, h_step))));
    k[6] = static_cast<T>((h_eps * t1));
  }
};

// rule AdamWAmsgrad: step, lr, betas_0, betas_1, eps, weight_decay
struct AdamWAmsgrad_7F5BE5C5 {
  static constexpr int inputs = 6, coefficients = 7;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_eps = numbers[4];
    const double h_weight_decay = numbers[5];
    const double t1 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    k[0] = static_cast<T>(h_betas_0);
    k[1] = static_cast<T>((1.0 - h_betas_0));
    k[2] = static_cast<T>(h_betas_1);
    k[3] = static_cast<T>((1.0 - h_betas_1));
    k[4] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
    k[5] = static_cast<T>(((h_lr * t1) / (1.0 - integer_power(h_betas_0, h_step))));
    k[6] = static_cast<T>((h_eps * t1));
  }
};

// rule AdamL2: step, lr, betas_0, betas_1, eps, weight_decay
struct AdamL2_A19734B4 {
  static constexpr int inputs = 6, coefficients = 7;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_eps = numbers[4];
    const double h_weight_decay = numbers[5];
    const double t1 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>(h_betas_0);
    k[2] = static_cast<T>((1.0 - h_betas_0));
    k[3] = static_cast<T>(h_betas_1);
    k[4] = static_cast<T>((1.0 - h_betas_1));
    k[5] = static_cast<T>(((h_lr * t1) / (1.0 - integer_power(h_betas_0, h_step))));
    k[6] = static_cast<T>((h_eps * t1));
  }
};

// rule AdamL2Amsgrad: step, lr, betas_0, betas_1, eps, weight_decay
struct AdamL2Amsgrad_A19734B4 {
  static constexpr int inputs = 6, coefficients = 7;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_eps = numbers[4];
    const double h_weight_decay = numbers[5];
    const double t1 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>(h_betas_0);
    k[2] = static_cast<T>((1.0 - h_betas_0));
    k[3] = static_cast<T>(h_betas_1);
    k[4] = static_cast<T>((1.0 - h_betas_1));
    k[5] = static_cast<T>(((h_lr * t1) / (1.0 - integer_power(h_betas_0, h_step))));
    k[6] = static_cast<T>((h_eps * t1));
  }
};

// rule SGD: step, lr, momentum, dampening, weight_decay
struct SGD_A12E7456 {
  static constexpr int inputs = 5, coefficients = 1;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    k[0] = static_cast<T>(h_lr);
  }
};

// rule SGDMomentum: step, lr, momentum, dampening, weight_decay
struct SGDMomentum_A4309770 {
  static constexpr int inputs = 5, coefficients = 3;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_momentum = numbers[2];
    const double h_dampening = numbers[3];
    const bool t1 = (h_step == 1.0);
    k[0] = static_cast<T>((t1 ? 0.0 : h_momentum));
    k[1] = static_cast<T>((t1 ? 1.0 : (1.0 - h_dampening)));
    k[2] = static_cast<T>(h_lr);
  }
};

// rule SGDNesterov: step, lr, momentum, dampening, weight_decay
struct SGDNesterov_E987DBBE {
  static constexpr int inputs = 5, coefficients = 4;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_momentum = numbers[2];
    const double h_dampening = numbers[3];
    const bool t1 = (h_step == 1.0);
    k[0] = static_cast<T>((t1 ? 0.0 : h_momentum));
    k[1] = static_cast<T>((t1 ? 1.0 : (1.0 - h_dampening)));
    k[2] = static_cast<T>(h_lr);
    k[3] = static_cast<T>(h_momentum);
  }
};

// rule SGDL2: step, lr, momentum, dampening, weight_decay
struct SGDL2_8083832D {
  static constexpr int inputs = 5, coefficients = 2;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_weight_decay = numbers[4];
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>(h_lr);
  }
};

// rule SGDL2Momentum: step, lr, momentum, dampening, weight_decay
struct SGDL2Momentum_EEA81A04 {
  static constexpr int inputs = 5, coefficients = 4;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_momentum = numbers[2];
    const double h_dampening = numbers[3];
    const double h_weight_decay = numbers[4];
    const bool t1 = (h_step == 1.0);
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>((t1 ? 0.0 : h_momentum));
    k[2] = static_cast<T>((t1 ? 1.0 : (1.0 - h_dampening)));
    k[3] = static_cast<T>(h_lr);
  }
};

// rule SGDL2Nesterov: step, lr, momentum, dampening, weight_decay
struct SGDL2Nesterov_2FC51F38 {
  static constexpr int inputs = 5, coefficients = 5;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_momentum = numbers[2];
    const double h_dampening = numbers[3];
    const double h_weight_decay = numbers[4];
    const bool t1 = (h_step == 1.0);
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>((t1 ? 0.0 : h_momentum));
    k[2] = static_cast<T>((t1 ? 1.0 : (1.0 - h_dampening)));
    k[3] = static_cast<T>(h_lr);
    k[4] = static_cast<T>(h_momentum);
  }
};

// rule Lion: step, lr, betas_0, betas_1, weight_decay
struct Lion_265C0A9F {
  static constexpr int inputs = 5, coefficients = 6;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_weight_decay = numbers[4];
    k[0] = static_cast<T>(h_betas_0);
    k[1] = static_cast<T>((1.0 - h_betas_0));
    k[2] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
    k[3] = static_cast<T>(h_lr);
    k[4] = static_cast<T>(h_betas_1);
    k[5] = static_cast<T>((1.0 - h_betas_1));
  }
};

// rule Adadelta: step, lr, rho, eps, weight_decay
struct Adadelta_0FBEA660 {
  static constexpr int inputs = 5, coefficients = 5;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_rho = numbers[2];
    const double h_eps = numbers[3];
    const double h_weight_decay = numbers[4];
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>(h_rho);
    k[2] = static_cast<T>((1.0 - h_rho));
    k[3] = static_cast<T>(h_eps);
    k[4] = static_cast<T>(h_lr);
  }
};

// rule Adagrad: step, lr, lr_decay, weight_decay, eps
struct Adagrad_E06E2019 {
  static constexpr int inputs = 5, coefficients = 3;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_lr_decay = numbers[2];
    const double h_weight_decay = numbers[3];
    const double h_eps = numbers[4];
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>((h_lr / (1.0 + ((h_step - 1.0) * h_lr_decay))));
    k[2] = static_cast<T>(h_eps);
  }
};

// rule Adamax: step, lr, betas_0, betas_1, eps, weight_decay
struct Adamax_2A4C2BA9 {
  static constexpr int inputs = 6, coefficients = 6;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_eps = numbers[4];
    const double h_weight_decay = numbers[5];
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>(h_betas_0);
    k[2] = static_cast<T>((1.0 - h_betas_0));
    k[3] = static_cast<T>(h_betas_1);
    k[4] = static_cast<T>(h_eps);
    k[5] = static_cast<T>((h_lr / (1.0 - integer_power(h_betas_0, h_step))));
  }
};

// rule Adan: step, lr, betas_0, betas_1, betas_2, eps, weight_decay; no_prox=False
struct Adan_5DB252F4 {
  static constexpr int inputs = 7, coefficients = 11;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_betas_2 = numbers[4];
    const double h_eps = numbers[5];
    const double h_weight_decay = numbers[6];
    const double t1 = square_root((1.0 - integer_power(h_betas_2, h_step)));
    const double t2 = (1.0 / (1.0 + (h_lr * h_weight_decay)));
    const double t3 = ((h_lr * t1) * t2);
    k[0] = static_cast<T>(((h_step == 1.0) ? 0.0 : 1.0));
    k[1] = static_cast<T>(h_betas_1);
    k[2] = static_cast<T>(h_betas_0);
    k[3] = static_cast<T>((1.0 - h_betas_0));
    k[4] = static_cast<T>((1.0 - h_betas_1));
    k[5] = static_cast<T>(h_betas_2);
    k[6] = static_cast<T>((1.0 - h_betas_2));
    k[7] = static_cast<T>((t3 / (1.0 - integer_power(h_betas_0, h_step))));
    k[8] = static_cast<T>(((t3 * h_betas_1) / (1.0 - integer_power(h_betas_1, h_step))));
    k[9] = static_cast<T>((h_eps * t1));
    k[10] = static_cast<T>(t2);
  }
};

// rule Adan: step, lr, betas_0, betas_1, betas_2, eps, weight_decay; no_prox=True
struct Adan_D0952FA1 {
  static constexpr int inputs = 7, coefficients = 11;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_betas_2 = numbers[4];
    const double h_eps = numbers[5];
    const double h_weight_decay = numbers[6];
    const double t1 = square_root((1.0 - integer_power(h_betas_2, h_step)));
    const double t2 = ((h_lr * t1) * 1.0);
    k[0] = static_cast<T>(((h_step == 1.0) ? 0.0 : 1.0));
    k[1] = static_cast<T>(h_betas_1);
    k[2] = static_cast<T>(h_betas_0);
    k[3] = static_cast<T>((1.0 - h_betas_0));
    k[4] = static_cast<T>((1.0 - h_betas_1));
    k[5] = static_cast<T>(h_betas_2);
    k[6] = static_cast<T>((1.0 - h_betas_2));
    k[7] = static_cast<T>((t2 / (1.0 - integer_power(h_betas_0, h_step))));
    k[8] = static_cast<T>(((t2 * h_betas_1) / (1.0 - integer_power(h_betas_1, h_step))));
    k[9] = static_cast<T>((h_eps * t1));
    k[10] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
  }
};

// rule AdEMAMix: step, lr, betas_0, betas_1, betas_2, alpha, eps, weight_decay; beta3_warmup=None; alpha_warmup=None
struct AdEMAMix_2A66BC70 {
  static constexpr int inputs = 8, coefficients = 10;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_betas_2 = numbers[4];
    const double h_alpha = numbers[5];
    const double h_eps = numbers[6];
    const double h_weight_decay = numbers[7];
    const double t1 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    const double t2 = (h_lr * t1);
    k[0] = static_cast<T>(h_betas_0);
    k[1] = static_cast<T>((1.0 - h_betas_0));
    k[2] = static_cast<T>(h_betas_2);
    k[3] = static_cast<T>((1.0 - h_betas_2));
    k[4] = static_cast<T>(h_betas_1);
    k[5] = static_cast<T>((1.0 - h_betas_1));
    k[6] = static_cast<T>((t2 / (1.0 - integer_power(h_betas_0, h_step))));
    k[7] = static_cast<T>((t2 * h_alpha));
    k[8] = static_cast<T>((h_eps * t1));
    k[9] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
  }
};

// rule AdEMAMix: step, lr, betas_0, betas_1, betas_2, alpha, alpha_warmup, eps, weight_decay; beta3_warmup=None
struct AdEMAMix_A9B4D878 {
  static constexpr int inputs = 9, coefficients = 10;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_betas_2 = numbers[4];
    const double h_alpha = numbers[5];
    const double h_alpha_warmup = numbers[6];
    const double h_eps = numbers[7];
    const double h_weight_decay = numbers[8];
    const double t1 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    const double t2 = (h_lr * t1);
    k[0] = static_cast<T>(h_betas_0);
    k[1] = static_cast<T>((1.0 - h_betas_0));
    k[2] = static_cast<T>(h_betas_2);
    k[3] = static_cast<T>((1.0 - h_betas_2));
    k[4] = static_cast<T>(h_betas_1);
    k[5] = static_cast<T>((1.0 - h_betas_1));
    k[6] = static_cast<T>((t2 / (1.0 - integer_power(h_betas_0, h_step))));
    k[7] = static_cast<T>(((h_step < h_alpha_warmup) ? (t2 * ((h_alpha * h_step) / h_alpha_warmup)) : (t2 * h_alpha)));
    k[8] = static_cast<T>((h_eps * t1));
    k[9] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
  }
};

// rule AdEMAMix: step, lr, betas_0, betas_1, betas_2, alpha, beta3_warmup, eps, weight_decay; alpha_warmup=None
struct AdEMAMix_093E1CB1 {
  static constexpr int inputs = 9, coefficients = 10;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_betas_2 = numbers[4];
    const double h_alpha = numbers[5];
    const double h_beta3_warmup = numbers[6];
    const double h_eps = numbers[7];
    const double h_weight_decay = numbers[8];
    const bool t1 = (h_step < h_beta3_warmup);
    const bool t2 = (h_betas_2 > 0.0);
    const double t3 = (h_step / h_beta3_warmup);
    const double t4 = (1.0 - t3);
    const bool t5 = (h_betas_0 > 0.0);
    const double t6 = (t3 * ((-0.6931471805599453) / logarithm(h_betas_2)));
    const double t7 = power(0.5, (1.0 / ((t4 * ((-0.6931471805599453) / logarithm(h_betas_0))) + t6)));
    const double t8 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    const double t9 = (h_lr * t8);
    const double t10 = power(0.5, (1.0 / ((t4 * 0.0) + t6)));
    const double t11 = (1.0 - h_betas_2);
    k[0] = static_cast<T>(h_betas_0);
    k[1] = static_cast<T>((1.0 - h_betas_0));
    k[2] = static_cast<T>((t1 ? (t2 ? (t5 ? t7 : t10) : h_betas_2) : h_betas_2));
    k[3] = static_cast<T>((t1 ? (t2 ? (t5 ? (1.0 - t7) : (1.0 - t10)) : t11) : t11));
    k[4] = static_cast<T>(h_betas_1);
    k[5] = static_cast<T>((1.0 - h_betas_1));
    k[6] = static_cast<T>((t9 / (1.0 - integer_power(h_betas_0, h_step))));
    k[7] = static_cast<T>((t9 * h_alpha));
    k[8] = static_cast<T>((h_eps * t8));
    k[9] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
  }
};

// rule AdEMAMix: step, lr, betas_0, betas_1, betas_2, alpha, beta3_warmup, alpha_warmup, eps, weight_decay
struct AdEMAMix_755E8AD5 {
  static constexpr int inputs = 10, coefficients = 10;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_betas_2 = numbers[4];
    const double h_alpha = numbers[5];
    const double h_beta3_warmup = numbers[6];
    const double h_alpha_warmup = numbers[7];
    const double h_eps = numbers[8];
    const double h_weight_decay = numbers[9];
    const bool t1 = (h_step < h_beta3_warmup);
    const bool t2 = (h_betas_2 > 0.0);
    const double t3 = (h_step / h_beta3_warmup);
    const double t4 = (1.0 - t3);
    const bool t5 = (h_betas_0 > 0.0);
    const double t6 = (t3 * ((-0.6931471805599453) / logarithm(h_betas_2)));
    const double t7 = power(0.5, (1.0 / ((t4 * ((-0.6931471805599453) / logarithm(h_betas_0))) + t6)));
    const double t8 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    const double t9 = (h_lr * t8);
    const double t10 = power(0.5, (1.0 / ((t4 * 0.0) + t6)));
    const double t11 = (1.0 - h_betas_2);
    k[0] = static_cast<T>(h_betas_0);
    k[1] = static_cast<T>((1.0 - h_betas_0));
    k[2] = static_cast<T>((t1 ? (t2 ? (t5 ? t7 : t10) : h_betas_2) : h_betas_2));
    k[3] = static_cast<T>((t1 ? (t2 ? (t5 ? (1.0 - t7) : (1.0 - t10)) : t11) : t11));
    k[4] = static_cast<T>(h_betas_1);
    k[5] = static_cast<T>((1.0 - h_betas_1));
    k[6] = static_cast<T>((t9 / (1.0 - integer_power(h_betas_0, h_step))));
    k[7] = static_cast<T>(((h_step < h_alpha_warmup) ? (t9 * ((h_alpha * h_step) / h_alpha_warmup)) : (t9 * h_alpha)));
    k[8] = static_cast<T>((h_eps * t8));
    k[9] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
  }
};

// rule AdEMAMixWithoutFast: step, lr, betas_0, betas_1, betas_2, alpha, eps, weight_decay; beta3_warmup=None; alpha_warmup=None
struct AdEMAMixWithoutFast_67CF3EED {
  static constexpr int inputs = 8, coefficients = 8;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_betas_2 = numbers[4];
    const double h_alpha = numbers[5];
    const double h_eps = numbers[6];
    const double h_weight_decay = numbers[7];
    const double t1 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    const double t2 = (h_lr * t1);
    k[0] = static_cast<T>(h_betas_2);
    k[1] = static_cast<T>((1.0 - h_betas_2));
    k[2] = static_cast<T>(h_betas_1);
    k[3] = static_cast<T>((1.0 - h_betas_1));
    k[4] = static_cast<T>((t2 / (1.0 - integer_power(h_betas_0, h_step))));
    k[5] = static_cast<T>((t2 * h_alpha));
    k[6] = static_cast<T>((h_eps * t1));
    k[7] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
  }
};

// rule AdEMAMixWithoutFast: step, lr, betas_0, betas_1, betas_2, alpha, alpha_warmup, eps, weight_decay; beta3_warmup=None
struct AdEMAMixWithoutFast_4BD74A17 {
  static constexpr int inputs = 9, coefficients = 8;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_betas_2 = numbers[4];
    const double h_alpha = numbers[5];
    const double h_alpha_warmup = numbers[6];
    const double h_eps = numbers[7];
    const double h_weight_decay = numbers[8];
    const double t1 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    const double t2 = (h_lr * t1);
    k[0] = static_cast<T>(h_betas_2);
    k[1] = static_cast<T>((1.0 - h_betas_2));
    k[2] = static_cast<T>(h_betas_1);
    k[3] = static_cast<T>((1.0 - h_betas_1));
    k[4] = static_cast<T>((t2 / (1.0 - integer_power(h_betas_0, h_step))));
    k[5] = static_cast<T>(((h_step < h_alpha_warmup) ? (t2 * ((h_alpha * h_step) / h_alpha_warmup)) : (t2 * h_alpha)));
    k[6] = static_cast<T>((h_eps * t1));
    k[7] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
  }
};

// rule AdEMAMixWithoutFast: step, lr, betas_0, betas_1, betas_2, alpha, beta3_warmup, eps, weight_decay; alpha_warmup=None
struct AdEMAMixWithoutFast_7DC122E5 {
  static constexpr int inputs = 9, coefficients = 8;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_betas_2 = numbers[4];
    const double h_alpha = numbers[5];
    const double h_beta3_warmup = numbers[6];
    const double h_eps = numbers[7];
    const double h_weight_decay = numbers[8];
    const bool t1 = (h_step < h_beta3_warmup);
    const bool t2 = (h_betas_2 > 0.0);
    const double t3 = (h_step / h_beta3_warmup);
    const double t4 = (1.0 - t3);
    const bool t5 = (h_betas_0 > 0.0);
    const double t6 = (t3 * ((-0.6931471805599453) / logarithm(h_betas_2)));
    const double t7 = power(0.5, (1.0 / ((t4 * ((-0.6931471805599453) / logarithm(h_betas_0))) + t6)));
    const double t8 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    const double t9 = (h_lr * t8);
    const double t10 = power(0.5, (1.0 / ((t4 * 0.0) + t6)));
    const double t11 = (1.0 - h_betas_2);
    k[0] = static_cast<T>((t1 ? (t2 ? (t5 ? t7 : t10) : h_betas_2) : h_betas_2));
    k[1] = static_cast<T>((t1 ? (t2 ? (t5 ? (1.0 - t7) : (1.0 - t10)) : t11) : t11));
    k[2] = static_cast<T>(h_betas_1);
    k[3] = static_cast<T>((1.0 - h_betas_1));
    k[4] = static_cast<T>((t9 / (1.0 - integer_power(h_betas_0, h_step))));
    k[5] = static_cast<T>((t9 * h_alpha));
    k[6] = static_cast<T>((h_eps * t8));
    k[7] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
  }
};

// rule AdEMAMixWithoutFast: step, lr, betas_0, betas_1, betas_2, alpha, beta3_warmup, alpha_warmup, eps, weight_decay
struct AdEMAMixWithoutFast_6B425E7C {
  static constexpr int inputs = 10, coefficients = 8;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_betas_2 = numbers[4];
    const double h_alpha = numbers[5];
    const double h_beta3_warmup = numbers[6];
    const double h_alpha_warmup = numbers[7];
    const double h_eps = numbers[8];
    const double h_weight_decay = numbers[9];
    const bool t1 = (h_step < h_beta3_warmup);
    const bool t2 = (h_betas_2 > 0.0);
    const double t3 = (h_step / h_beta3_warmup);
    const double t4 = (1.0 - t3);
    const bool t5 = (h_betas_0 > 0.0);
    const double t6 = (t3 * ((-0.6931471805599453) / logarithm(h_betas_2)));
    const double t7 = power(0.5, (1.0 / ((t4 * ((-0.6931471805599453) / logarithm(h_betas_0))) + t6)));
    const double t8 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    const double t9 = (h_lr * t8);
    const double t10 = power(0.5, (1.0 / ((t4 * 0.0) + t6)));
    const double t11 = (1.0 - h_betas_2);
    k[0] = static_cast<T>((t1 ? (t2 ? (t5 ? t7 : t10) : h_betas_2) : h_betas_2));
    k[1] = static_cast<T>((t1 ? (t2 ? (t5 ? (1.0 - t7) : (1.0 - t10)) : t11) : t11));
    k[2] = static_cast<T>(h_betas_1);
    k[3] = static_cast<T>((1.0 - h_betas_1));
    k[4] = static_cast<T>((t9 / (1.0 - integer_power(h_betas_0, h_step))));
    k[5] = static_cast<T>(((h_step < h_alpha_warmup) ? (t9 * ((h_alpha * h_step) / h_alpha_warmup)) : (t9 * h_alpha)));
    k[6] = static_cast<T>((h_eps * t8));
    k[7] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
  }
};

// rule ASGD: step, lambd, weight_decay, eta, mu
struct ASGD_36529D3E {
  static constexpr int inputs = 5, coefficients = 5;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lambd = numbers[1];
    const double h_weight_decay = numbers[2];
    const double h_eta = numbers[3];
    const double h_mu = numbers[4];
    k[0] = static_cast<T>((1.0 - (h_lambd * h_eta)));
    k[1] = static_cast<T>(h_eta);
    k[2] = static_cast<T>(h_weight_decay);
    k[3] = static_cast<T>((1.0 - h_mu));
    k[4] = static_cast<T>(h_mu);
  }
};

// rule NAdam: step, lr, betas_0, betas_1, eps, weight_decay, momentum_decay, mu_product; decoupled_weight_decay=False
struct NAdam_2199CBAB {
  static constexpr int inputs = 8, coefficients = 9;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_eps = numbers[4];
    const double h_weight_decay = numbers[5];
    const double h_momentum_decay = numbers[6];
    const double h_mu_product = numbers[7];
    const double t1 = (h_betas_0 * (1.0 - (0.5 * power(0.96, ((h_step + 1.0) * h_momentum_decay)))));
    const double t2 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    const double t3 = (h_lr * t2);
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>(h_betas_0);
    k[2] = static_cast<T>((1.0 - h_betas_0));
    k[3] = static_cast<T>(h_betas_1);
    k[4] = static_cast<T>((1.0 - h_betas_1));
    k[5] = static_cast<T>(((t3 * (1.0 - (h_betas_0 * (1.0 - (0.5 * power(0.96, (h_step * h_momentum_decay))))))) / (1.0 - h_mu_product)));
    k[6] = static_cast<T>(((t3 * t1) / (1.0 - (h_mu_product * t1))));
    k[7] = static_cast<T>((h_eps * t2));
    k[8] = static_cast<T>(1.0);
  }
};

// rule NAdam: step, lr, betas_0, betas_1, eps, weight_decay, momentum_decay, mu_product; decoupled_weight_decay=True
struct NAdam_1E0ECDD1 {
  static constexpr int inputs = 8, coefficients = 9;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_eps = numbers[4];
    const double h_weight_decay = numbers[5];
    const double h_momentum_decay = numbers[6];
    const double h_mu_product = numbers[7];
    const double t1 = (h_betas_0 * (1.0 - (0.5 * power(0.96, ((h_step + 1.0) * h_momentum_decay)))));
    const double t2 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    const double t3 = (h_lr * t2);
    k[0] = static_cast<T>(0.0);
    k[1] = static_cast<T>(h_betas_0);
    k[2] = static_cast<T>((1.0 - h_betas_0));
    k[3] = static_cast<T>(h_betas_1);
    k[4] = static_cast<T>((1.0 - h_betas_1));
    k[5] = static_cast<T>(((t3 * (1.0 - (h_betas_0 * (1.0 - (0.5 * power(0.96, (h_step * h_momentum_decay))))))) / (1.0 - h_mu_product)));
    k[6] = static_cast<T>(((t3 * t1) / (1.0 - (h_mu_product * t1))));
    k[7] = static_cast<T>((h_eps * t2));
    k[8] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
  }
};

// rule RAdam: step, lr, betas_0, betas_1, eps, weight_decay; decoupled_weight_decay=False
struct RAdam_DBBB3298 {
  static constexpr int inputs = 6, coefficients = 9;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_eps = numbers[4];
    const double h_weight_decay = numbers[5];
    const double t1 = integer_power(h_betas_1, h_step);
    const double t2 = (1.0 - t1);
    const double t3 = (1.0 - h_betas_1);
    const double t4 = ((2.0 / t3) - 1.0);
    const double t5 = (t4 - (((2.0 * h_step) * t1) / t2));
    const double t6 = (h_lr / (1.0 - integer_power(h_betas_0, h_step)));
    const bool t7 = (t5 > 5.0);
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>(h_betas_0);
    k[2] = static_cast<T>((1.0 - h_betas_0));
    k[3] = static_cast<T>(h_betas_1);
    k[4] = static_cast<T>(t3);
    k[5] = static_cast<T>((t7 ? (t6 * square_root((((((t5 - 4.0) * (t5 - 2.0)) * t4) / (((t4 - 4.0) * (t4 - 2.0)) * t5)) * t2))) : 0.0));
    k[6] = static_cast<T>(h_eps);
    k[7] = static_cast<T>((t7 ? 0.0 : t6));
    k[8] = static_cast<T>(1.0);
  }
};

// rule RAdam: step, lr, betas_0, betas_1, eps, weight_decay; decoupled_weight_decay=True
struct RAdam_849FCCA4 {
  static constexpr int inputs = 6, coefficients = 9;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_eps = numbers[4];
    const double h_weight_decay = numbers[5];
    const double t1 = integer_power(h_betas_1, h_step);
    const double t2 = (1.0 - t1);
    const double t3 = (1.0 - h_betas_1);
    const double t4 = ((2.0 / t3) - 1.0);
    const double t5 = (t4 - (((2.0 * h_step) * t1) / t2));
    const double t6 = (h_lr / (1.0 - integer_power(h_betas_0, h_step)));
    const bool t7 = (t5 > 5.0);
    k[0] = static_cast<T>(0.0);
    k[1] = static_cast<T>(h_betas_0);
    k[2] = static_cast<T>((1.0 - h_betas_0));
    k[3] = static_cast<T>(h_betas_1);
    k[4] = static_cast<T>(t3);
    k[5] = static_cast<T>((t7 ? (t6 * square_root((((((t5 - 4.0) * (t5 - 2.0)) * t4) / (((t4 - 4.0) * (t4 - 2.0)) * t5)) * t2))) : 0.0));
    k[6] = static_cast<T>(h_eps);
    k[7] = static_cast<T>((t7 ? 0.0 : t6));
    k[8] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
  }
};

// rule RMSprop: step, lr, alpha, eps, weight_decay, momentum
struct RMSprop_F95ED82F {
  static constexpr int inputs = 6, coefficients = 5;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_alpha = numbers[2];
    const double h_eps = numbers[3];
    const double h_weight_decay = numbers[4];
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>(h_alpha);
    k[2] = static_cast<T>((1.0 - h_alpha));
    k[3] = static_cast<T>(h_lr);
    k[4] = static_cast<T>(h_eps);
  }
};

// rule RMSpropMomentum: step, lr, alpha, eps, weight_decay, momentum
struct RMSpropMomentum_7DB6FABA {
  static constexpr int inputs = 6, coefficients = 6;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_alpha = numbers[2];
    const double h_eps = numbers[3];
    const double h_weight_decay = numbers[4];
    const double h_momentum = numbers[5];
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>(h_alpha);
    k[2] = static_cast<T>((1.0 - h_alpha));
    k[3] = static_cast<T>(h_momentum);
    k[4] = static_cast<T>(h_eps);
    k[5] = static_cast<T>(h_lr);
  }
};

// rule RMSpropCentered: step, lr, alpha, eps, weight_decay, momentum
struct RMSpropCentered_F95ED82F {
  static constexpr int inputs = 6, coefficients = 5;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_alpha = numbers[2];
    const double h_eps = numbers[3];
    const double h_weight_decay = numbers[4];
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>(h_alpha);
    k[2] = static_cast<T>((1.0 - h_alpha));
    k[3] = static_cast<T>(h_lr);
    k[4] = static_cast<T>(h_eps);
  }
};

// rule RMSpropCenteredMomentum: step, lr, alpha, eps, weight_decay, momentum
struct RMSpropCenteredMomentum_7DB6FABA {
  static constexpr int inputs = 6, coefficients = 6;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_alpha = numbers[2];
    const double h_eps = numbers[3];
    const double h_weight_decay = numbers[4];
    const double h_momentum = numbers[5];
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>(h_alpha);
    k[2] = static_cast<T>((1.0 - h_alpha));
    k[3] = static_cast<T>(h_momentum);
    k[4] = static_cast<T>(h_eps);
    k[5] = static_cast<T>(h_lr);
  }
};

// rule Rprop: step, etas_0, etas_1, step_sizes_0, step_sizes_1
struct Rprop_EDFC4F88 {
  static constexpr int inputs = 5, coefficients = 4;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_etas_0 = numbers[1];
    const double h_etas_1 = numbers[2];
    const double h_step_sizes_0 = numbers[3];
    const double h_step_sizes_1 = numbers[4];
    k[0] = static_cast<T>(h_etas_1);
    k[1] = static_cast<T>(h_etas_0);
    k[2] = static_cast<T>(h_step_sizes_0);
    k[3] = static_cast<T>(h_step_sizes_1);
  }
};

// rule ScheduleFreeAdamW: step, k, weight_sum, lr_max, lr, warmup_steps, r, weight_lr_power, betas_0, betas_1, eps, weight_decay
struct ScheduleFreeAdamW_72691520 {
  static constexpr int inputs = 12, coefficients = 8;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_k = numbers[1];
    const double h_weight_sum = numbers[2];
    const double h_lr_max = numbers[3];
    const double h_lr = numbers[4];
    const double h_warmup_steps = numbers[5];
    const double h_r = numbers[6];
    const double h_weight_lr_power = numbers[7];
    const double h_betas_0 = numbers[8];
    const double h_betas_1 = numbers[9];
    const double h_eps = numbers[10];
    const double h_weight_decay = numbers[11];
    const double t1 = (h_k + 1.0);
    const double t2 = (h_lr * square_root((1.0 - integer_power(h_betas_1, t1))));
    const bool t3 = (h_k < h_warmup_steps);
    const double t4 = (t2 * (t1 / h_warmup_steps));
    const bool t5 = (h_lr_max > t4);
    const double t6 = power(t1, h_r);
    const double t7 = (t6 * power(h_lr_max, h_weight_lr_power));
    const double t8 = (h_weight_sum + t7);
    const bool t9 = (t8 != 0.0);
    const double t10 = (t7 / t8);
    const double t11 = (1.0 - t10);
    const double t12 = (1.0 - (h_betas_0 * t11));
    const double t13 = (1.0 - (h_betas_0 * 1.0));
    const double t14 = (t4 * t13);
    const double t15 = (t9 ? t11 : 1.0);
    const double t16 = (t9 ? t10 : 0.0);
    const double t17 = (t6 * power(t4, h_weight_lr_power));
    const double t18 = (h_weight_sum + t17);
    const bool t19 = (t18 != 0.0);
    const double t20 = (t17 / t18);
    const double t21 = (1.0 - t20);
    const double t22 = (t2 * 1.0);
    const bool t23 = (h_lr_max > t22);
    const double t24 = (t22 * t13);
    const double t25 = (t6 * power(t22, h_weight_lr_power));
    const double t26 = (h_weight_sum + t25);
    const bool t27 = (t26 != 0.0);
    const double t28 = (t25 / t26);
    const double t29 = (1.0 - t28);
    k[0] = static_cast<T>(h_betas_1);
    k[1] = static_cast<T>((1.0 - h_betas_1));
    k[2] = static_cast<T>(h_eps);
    k[3] = static_cast<T>(h_weight_decay);
    k[4] = static_cast<T>((t3 ? (t5 ? t15 : (t19 ? t21 : 1.0)) : (t23 ? t15 : (t27 ? t29 : 1.0))));
    k[5] = static_cast<T>((t3 ? (t5 ? t16 : (t19 ? t20 : 0.0)) : (t23 ? t16 : (t27 ? t28 : 0.0))));
    k[6] = static_cast<T>((t3 ? (t5 ? (t9 ? (t4 * t12) : t14) : (t19 ? (t4 * (1.0 - (h_betas_0 * t21))) : t14)) : (t23 ? (t9 ? (t22 * t12) : t24) : (t27 ? (t22 * (1.0 - (h_betas_0 * t29))) : t24))));
    k[7] = static_cast<T>((t3 ? t4 : t22));
  }
};

// rule ScheduleFreeSGD: step, k, weight_sum, lr_max, lr, warmup_steps, r, weight_lr_power, momentum, weight_decay
struct ScheduleFreeSGD_6C4C3941 {
  static constexpr int inputs = 10, coefficients = 5;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_k = numbers[1];
    const double h_weight_sum = numbers[2];
    const double h_lr_max = numbers[3];
    const double h_lr = numbers[4];
    const double h_warmup_steps = numbers[5];
    const double h_r = numbers[6];
    const double h_weight_lr_power = numbers[7];
    const double h_momentum = numbers[8];
    const double h_weight_decay = numbers[9];
    const double t1 = (h_lr * 1.0);
    const bool t2 = (h_k < h_warmup_steps);
    const double t3 = (h_k + 1.0);
    const double t4 = (t1 * (t3 / h_warmup_steps));
    const bool t5 = (h_lr_max > t4);
    const double t6 = power(t3, h_r);
    const double t7 = (t6 * power(h_lr_max, h_weight_lr_power));
    const double t8 = (h_weight_sum + t7);
    const bool t9 = (t8 != 0.0);
    const double t10 = (t7 / t8);
    const double t11 = (1.0 - t10);
    const double t12 = (1.0 - (h_momentum * t11));
    const double t13 = (1.0 - (h_momentum * 1.0));
    const double t14 = (t4 * t13);
    const double t15 = (t9 ? t11 : 1.0);
    const double t16 = (t9 ? t10 : 0.0);
    const double t17 = (t6 * power(t4, h_weight_lr_power));
    const double t18 = (h_weight_sum + t17);
    const bool t19 = (t18 != 0.0);
    const double t20 = (t17 / t18);
    const double t21 = (1.0 - t20);
    const double t22 = (t1 * 1.0);
    const bool t23 = (h_lr_max > t22);
    const double t24 = (t22 * t13);
    const double t25 = (t6 * power(t22, h_weight_lr_power));
    const double t26 = (h_weight_sum + t25);
    const bool t27 = (t26 != 0.0);
    const double t28 = (t25 / t26);
    const double t29 = (1.0 - t28);
    k[0] = static_cast<T>(h_weight_decay);
    k[1] = static_cast<T>((t2 ? (t5 ? t15 : (t19 ? t21 : 1.0)) : (t23 ? t15 : (t27 ? t29 : 1.0))));
    k[2] = static_cast<T>((t2 ? (t5 ? t16 : (t19 ? t20 : 0.0)) : (t23 ? t16 : (t27 ? t28 : 0.0))));
    k[3] = static_cast<T>((t2 ? (t5 ? (t9 ? (t4 * t12) : t14) : (t19 ? (t4 * (1.0 - (h_momentum * t21))) : t14)) : (t23 ? (t9 ? (t22 * t12) : t24) : (t27 ? (t22 * (1.0 - (h_momentum * t29))) : t24))));
    k[4] = static_cast<T>((t2 ? t4 : t22));
  }
};

// rule MuonMomentum: step, momentum
struct MuonMomentum_32E58A10 {
  static constexpr int inputs = 2, coefficients = 2;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_momentum = numbers[1];
    k[0] = static_cast<T>(h_momentum);
    k[1] = static_cast<T>((1.0 - h_momentum));
  }
};

// rule MuonNesterov: step, momentum
struct MuonNesterov_32E58A10 {
  static constexpr int inputs = 2, coefficients = 2;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_momentum = numbers[1];
    k[0] = static_cast<T>(h_momentum);
    k[1] = static_cast<T>((1.0 - h_momentum));
  }
};

// rule MuonApply: step, lr, weight_decay, ratio
struct MuonApply_64085B45 {
  static constexpr int inputs = 4, coefficients = 2;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_weight_decay = numbers[2];
    const double h_ratio = numbers[3];
    k[0] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
    k[1] = static_cast<T>((h_lr * h_ratio));
  }
};

// rule SOAPAdam: step, betas_0, betas_1, eps
struct SOAPAdam_D518E39A {
  static constexpr int inputs = 4, coefficients = 5;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_betas_0 = numbers[1];
    const double h_betas_1 = numbers[2];
    const double h_eps = numbers[3];
    k[0] = static_cast<T>(h_betas_0);
    k[1] = static_cast<T>((1.0 - h_betas_0));
    k[2] = static_cast<T>(h_betas_1);
    k[3] = static_cast<T>((1.0 - h_betas_1));
    k[4] = static_cast<T>(h_eps);
  }
};

// rule SOAPApply: step, lr, betas_0, betas_1, weight_decay; correct_bias=False
struct SOAPApply_978043E7 {
  static constexpr int inputs = 5, coefficients = 2;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_weight_decay = numbers[4];
    k[0] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
    k[1] = static_cast<T>((h_lr * 1.0));
  }
};

// rule SOAPApply: step, lr, betas_0, betas_1, weight_decay; correct_bias=True
struct SOAPApply_F8A8BD91 {
  static constexpr int inputs = 5, coefficients = 2;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_weight_decay = numbers[4];
    k[0] = static_cast<T>((1.0 - (h_lr * h_weight_decay)));
    k[1] = static_cast<T>((h_lr * (square_root((1.0 - integer_power(h_betas_1, h_step))) / (1.0 - integer_power(h_betas_0, h_step)))));
  }
};

// rule LAMBMeasure: step, betas_0, betas_1, eps, weight_decay; bias_correction=False
struct LAMBMeasure_488C397B {
  static constexpr int inputs = 5, coefficients = 7;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_betas_0 = numbers[1];
    const double h_betas_1 = numbers[2];
    const double h_eps = numbers[3];
    const double h_weight_decay = numbers[4];
    k[0] = static_cast<T>(h_betas_0);
    k[1] = static_cast<T>((1.0 - h_betas_0));
    k[2] = static_cast<T>(h_betas_1);
    k[3] = static_cast<T>((1.0 - h_betas_1));
    k[4] = static_cast<T>(1.0);
    k[5] = static_cast<T>((h_eps * 1.0));
    k[6] = static_cast<T>(h_weight_decay);
  }
};

// rule LAMBMeasure: step, betas_0, betas_1, eps, weight_decay; bias_correction=True
struct LAMBMeasure_D36231B1 {
  static constexpr int inputs = 5, coefficients = 7;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_betas_0 = numbers[1];
    const double h_betas_1 = numbers[2];
    const double h_eps = numbers[3];
    const double h_weight_decay = numbers[4];
    const double t1 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    k[0] = static_cast<T>(h_betas_0);
    k[1] = static_cast<T>((1.0 - h_betas_0));
    k[2] = static_cast<T>(h_betas_1);
    k[3] = static_cast<T>((1.0 - h_betas_1));
    k[4] = static_cast<T>((t1 / (1.0 - integer_power(h_betas_0, h_step))));
    k[5] = static_cast<T>((h_eps * t1));
    k[6] = static_cast<T>(h_weight_decay);
  }
};

// rule LAMBApply: step, lr, betas_0, betas_1, eps, weight_decay, clamp_0, clamp_1, p_sq, update_sq; bias_correction=False; always_adapt=False
struct LAMBApply_7D242913 {
  static constexpr int inputs = 10, coefficients = 4;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_eps = numbers[4];
    const double h_weight_decay = numbers[5];
    const double h_clamp_0 = numbers[6];
    const double h_clamp_1 = numbers[7];
    const double h_p_sq = numbers[8];
    const double h_update_sq = numbers[9];
    const double t1 = square_root(h_p_sq);
    const double t2 = (((t1 > h_clamp_0) | (t1 != t1)) ? t1 : h_clamp_0);
    const double t3 = (((t2 < h_clamp_1) | (t2 != t2)) ? t2 : h_clamp_1);
    const double t4 = square_root(h_update_sq);
    k[0] = static_cast<T>(((h_weight_decay != 0.0) ? (h_lr * (((t3 > 0.0) & (t4 > 0.0)) ? (t3 / t4) : 1.0)) : (h_lr * 1.0)));
    k[1] = static_cast<T>(1.0);
    k[2] = static_cast<T>((h_eps * 1.0));
    k[3] = static_cast<T>(h_weight_decay);
  }
};

// rule LAMBApply: step, lr, betas_0, betas_1, eps, weight_decay, clamp_0, clamp_1, p_sq, update_sq; bias_correction=False; always_adapt=True
struct LAMBApply_10023097 {
  static constexpr int inputs = 10, coefficients = 4;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_eps = numbers[4];
    const double h_weight_decay = numbers[5];
    const double h_clamp_0 = numbers[6];
    const double h_clamp_1 = numbers[7];
    const double h_p_sq = numbers[8];
    const double h_update_sq = numbers[9];
    const double t1 = square_root(h_p_sq);
    const double t2 = (((t1 > h_clamp_0) | (t1 != t1)) ? t1 : h_clamp_0);
    const double t3 = (((t2 < h_clamp_1) | (t2 != t2)) ? t2 : h_clamp_1);
    const double t4 = square_root(h_update_sq);
    k[0] = static_cast<T>((h_lr * (((t3 > 0.0) & (t4 > 0.0)) ? (t3 / t4) : 1.0)));
    k[1] = static_cast<T>(1.0);
    k[2] = static_cast<T>((h_eps * 1.0));
    k[3] = static_cast<T>(h_weight_decay);
  }
};

// rule LAMBApply: step, lr, betas_0, betas_1, eps, weight_decay, clamp_0, clamp_1, p_sq, update_sq; bias_correction=True; always_adapt=False
struct LAMBApply_D4F87EEA {
  static constexpr int inputs = 10, coefficients = 4;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_eps = numbers[4];
    const double h_weight_decay = numbers[5];
    const double h_clamp_0 = numbers[6];
    const double h_clamp_1 = numbers[7];
    const double h_p_sq = numbers[8];
    const double h_update_sq = numbers[9];
    const double t1 = square_root(h_p_sq);
    const double t2 = (((t1 > h_clamp_0) | (t1 != t1)) ? t1 : h_clamp_0);
    const double t3 = (((t2 < h_clamp_1) | (t2 != t2)) ? t2 : h_clamp_1);
    const double t4 = square_root(h_update_sq);
    const double t5 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    k[0] = static_cast<T>(((h_weight_decay != 0.0) ? (h_lr * (((t3 > 0.0) & (t4 > 0.0)) ? (t3 / t4) : 1.0)) : (h_lr * 1.0)));
    k[1] = static_cast<T>((t5 / (1.0 - integer_power(h_betas_0, h_step))));
    k[2] = static_cast<T>((h_eps * t5));
    k[3] = static_cast<T>(h_weight_decay);
  }
};

// rule LAMBApply: step, lr, betas_0, betas_1, eps, weight_decay, clamp_0, clamp_1, p_sq, update_sq; bias_correction=True; always_adapt=True
struct LAMBApply_EE00C057 {
  static constexpr int inputs = 10, coefficients = 4;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_lr = numbers[1];
    const double h_betas_0 = numbers[2];
    const double h_betas_1 = numbers[3];
    const double h_eps = numbers[4];
    const double h_weight_decay = numbers[5];
    const double h_clamp_0 = numbers[6];
    const double h_clamp_1 = numbers[7];
    const double h_p_sq = numbers[8];
    const double h_update_sq = numbers[9];
    const double t1 = square_root(h_p_sq);
    const double t2 = (((t1 > h_clamp_0) | (t1 != t1)) ? t1 : h_clamp_0);
    const double t3 = (((t2 < h_clamp_1) | (t2 != t2)) ? t2 : h_clamp_1);
    const double t4 = square_root(h_update_sq);
    const double t5 = square_root((1.0 - integer_power(h_betas_1, h_step)));
    k[0] = static_cast<T>((h_lr * (((t3 > 0.0) & (t4 > 0.0)) ? (t3 / t4) : 1.0)));
    k[1] = static_cast<T>((t5 / (1.0 - integer_power(h_betas_0, h_step))));
    k[2] = static_cast<T>((h_eps * t5));
    k[3] = static_cast<T>(h_weight_decay);
  }
};

// rule LARSMeasurePlain: step
struct LARSMeasurePlain_A0C200C7 {
  static constexpr int inputs = 1, coefficients = 0;
  template <class T, class Numbers>
  HOST_DEVICE static void row([[maybe_unused]] const Numbers& numbers, [[maybe_unused]] T* k) {
  }
};

// rule LARSMeasure: step
struct LARSMeasure_A0C200C7 {
  static constexpr int inputs = 1, coefficients = 0;
  template <class T, class Numbers>
  HOST_DEVICE static void row([[maybe_unused]] const Numbers& numbers, [[maybe_unused]] T* k) {
  }
};

// rule LARSPlain: step, lr, momentum, weight_decay, trust_coefficient, eps, p_sq, g_sq; adapt=False
struct LARSPlain_FE066B12 {
  static constexpr int inputs = 8, coefficients = 2;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_weight_decay = numbers[3];
    k[0] = static_cast<T>((h_lr * 1.0));
    k[1] = static_cast<T>(h_weight_decay);
  }
};

// rule LARSPlain: step, lr, momentum, weight_decay, trust_coefficient, eps, p_sq, g_sq; adapt=True
struct LARSPlain_1C6F6644 {
  static constexpr int inputs = 8, coefficients = 2;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_weight_decay = numbers[3];
    const double h_trust_coefficient = numbers[4];
    const double h_eps = numbers[5];
    const double h_p_sq = numbers[6];
    const double h_g_sq = numbers[7];
    const double t1 = square_root(h_p_sq);
    const double t2 = square_root(h_g_sq);
    k[0] = static_cast<T>((h_lr * (((t1 > 0.0) & (t2 > 0.0)) ? ((h_trust_coefficient * t1) / ((t2 + (h_weight_decay * t1)) + h_eps)) : 1.0)));
    k[1] = static_cast<T>(h_weight_decay);
  }
};

// rule LARSMomentum: step, lr, momentum, weight_decay, trust_coefficient, eps, p_sq, g_sq; adapt=False
struct LARSMomentum_E6152BDA {
  static constexpr int inputs = 8, coefficients = 3;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_momentum = numbers[2];
    const double h_weight_decay = numbers[3];
    k[0] = static_cast<T>(h_momentum);
    k[1] = static_cast<T>((h_lr * 1.0));
    k[2] = static_cast<T>(h_weight_decay);
  }
};

// rule LARSMomentum: step, lr, momentum, weight_decay, trust_coefficient, eps, p_sq, g_sq; adapt=True
struct LARSMomentum_96EE5855 {
  static constexpr int inputs = 8, coefficients = 3;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_momentum = numbers[2];
    const double h_weight_decay = numbers[3];
    const double h_trust_coefficient = numbers[4];
    const double h_eps = numbers[5];
    const double h_p_sq = numbers[6];
    const double h_g_sq = numbers[7];
    const double t1 = square_root(h_p_sq);
    const double t2 = square_root(h_g_sq);
    k[0] = static_cast<T>(h_momentum);
    k[1] = static_cast<T>((h_lr * (((t1 > 0.0) & (t2 > 0.0)) ? ((h_trust_coefficient * t1) / ((t2 + (h_weight_decay * t1)) + h_eps)) : 1.0)));
    k[2] = static_cast<T>(h_weight_decay);
  }
};

// rule LARSNesterov: step, lr, momentum, weight_decay, trust_coefficient, eps, p_sq, g_sq; adapt=False
struct LARSNesterov_6C103196 {
  static constexpr int inputs = 8, coefficients = 3;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_momentum = numbers[2];
    const double h_weight_decay = numbers[3];
    k[0] = static_cast<T>((h_lr * 1.0));
    k[1] = static_cast<T>(h_weight_decay);
    k[2] = static_cast<T>(h_momentum);
  }
};

// rule LARSNesterov: step, lr, momentum, weight_decay, trust_coefficient, eps, p_sq, g_sq; adapt=True
struct LARSNesterov_145DF4CF {
  static constexpr int inputs = 8, coefficients = 3;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_momentum = numbers[2];
    const double h_weight_decay = numbers[3];
    const double h_trust_coefficient = numbers[4];
    const double h_eps = numbers[5];
    const double h_p_sq = numbers[6];
    const double h_g_sq = numbers[7];
    const double t1 = square_root(h_p_sq);
    const double t2 = square_root(h_g_sq);
    k[0] = static_cast<T>((h_lr * (((t1 > 0.0) & (t2 > 0.0)) ? ((h_trust_coefficient * t1) / ((t2 + (h_weight_decay * t1)) + h_eps)) : 1.0)));
    k[1] = static_cast<T>(h_weight_decay);
    k[2] = static_cast<T>(h_momentum);
  }
};

// rule StableAdamWMeasure: step, betas_0, betas_1, eps
struct StableAdamWMeasure_7F8B1193 {
  static constexpr int inputs = 4, coefficients = 5;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_step = numbers[0];
    const double h_betas_0 = numbers[1];
    const double h_betas_1 = numbers[2];
    const double h_eps = numbers[3];
    const double t1 = integer_power(h_betas_0, h_step);
    const double t2 = ((h_betas_0 - t1) / (1.0 - t1));
    const double t3 = integer_power(h_betas_1, h_step);
    const double t4 = ((h_betas_1 - t3) / (1.0 - t3));
    k[0] = static_cast<T>(t2);
    k[1] = static_cast<T>((1.0 - t2));
    k[2] = static_cast<T>(t4);
    k[3] = static_cast<T>((1.0 - t4));
    k[4] = static_cast<T>((h_eps * h_eps));
  }
};

// rule StableAdamWApply: step, lr, eps, weight_decay, ratio_sq, elements
struct StableAdamWApply_C51E0305 {
  static constexpr int inputs = 6, coefficients = 3;
  template <class T, class Numbers>
  HOST_DEVICE static void row(const Numbers& numbers, T* k) {
    const double h_lr = numbers[1];
    const double h_eps = numbers[2];
    const double h_weight_decay = numbers[3];
    const double h_ratio_sq = numbers[4];
    const double h_elements = numbers[5];
    const double t1 = square_root((h_ratio_sq / h_elements));
    const double t2 = (h_lr / (((t1 <= 1.0) | (t1 != t1)) ? 1.0 : t1));
    k[0] = static_cast<T>((1.0 - (t2 * h_weight_decay)));
    k[1] = static_cast<T>(t2);
    k[2] = static_cast<T>(h_eps);
  }
};

}  // namespace FT_ISA
}  // namespace fasttrain

#define FASTTRAIN_COEFFICIENTS(X) \
  X(AdamW_7F5BE5C5) \
  X(AdamWAmsgrad_7F5BE5C5) \
  X(AdamL2_A19734B4) \
  X(AdamL2Amsgrad_A19734B4) \
  X(SGD_A12E7456) \
  X(SGDMomentum_A4309770) \
  X(SGDNesterov_E987DBBE) \
  X(SGDL2_8083832D) \
  X(SGDL2Momentum_EEA81A04) \
  X(SGDL2Nesterov_2FC51F38) \
  X(Lion_265C0A9F) \
  X(Adadelta_0FBEA660) \
  X(Adagrad_E06E2019) \
  X(Adamax_2A4C2BA9) \
  X(Adan_5DB252F4) \
  X(Adan_D0952FA1) \
  X(AdEMAMix_2A66BC70) \
  X(AdEMAMix_A9B4D878) \
  X(AdEMAMix_093E1CB1) \
  X(AdEMAMix_755E8AD5) \
  X(AdEMAMixWithoutFast_67CF3EED) \
  X(AdEMAMixWithoutFast_4BD74A17) \
  X(AdEMAMixWithoutFast_7DC122E5) \
  X(AdEMAMixWithoutFast_6B425E7C) \
  X(ASGD_36529D3E) \
  X(NAdam_2199CBAB) \
  X(NAdam_1E0ECDD1) \
  X(RAdam_DBBB3298) \
  X(RAdam_849FCCA4) \
  X(RMSprop_F95ED82F) \
  X(RMSpropMomentum_7DB6FABA) \
  X(RMSpropCentered_F95ED82F) \
  X(RMSpropCenteredMomentum_7DB6FABA) \
  X(Rprop_EDFC4F88) \
  X(ScheduleFreeAdamW_72691520) \
  X(ScheduleFreeSGD_6C4C3941) \
  X(MuonMomentum_32E58A10) \
  X(MuonNesterov_32E58A10) \
  X(MuonApply_64085B45) \
  X(SOAPAdam_D518E39A) \
  X(SOAPApply_978043E7) \
  X(SOAPApply_F8A8BD91) \
  X(LAMBMeasure_488C397B) \
  X(LAMBMeasure_D36231B1) \
  X(LAMBApply_7D242913) \
  X(LAMBApply_10023097) \
  X(LAMBApply_D4F87EEA) \
  X(LAMBApply_EE00C057) \
  X(LARSMeasurePlain_A0C200C7) \
  X(LARSMeasure_A0C200C7) \
  X(LARSPlain_FE066B12) \
  X(LARSPlain_1C6F6644) \
  X(LARSMomentum_E6152BDA) \
  X(LARSMomentum_96EE5855) \
  X(LARSNesterov_6C103196) \
  X(LARSNesterov_145DF4CF) \
  X(StableAdamWMeasure_7F8B1193) \
  X(StableAdamWApply_C51E0305)
