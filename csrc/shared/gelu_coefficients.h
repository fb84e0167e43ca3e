// Coefficients for gelu in float: a minimax fit of the standard normal tail. With r = 1 / (1 + TSAE_TAIL_SCALE |z|) and
// P the polynomial with the coefficients TSAE_TAIL (constant term first), Phi(-|z|) = exp(-z^2/2) r P(r). The relative
// error is at most 3e-8 for |z| <= 14; unlike 1 + erf, the fit stays accurate for negative z.
#pragma once

#define TSAE_TAIL_SCALE 0.35f
#define TSAE_TAIL                                                                                             \
  {0.139621407f, 0.139861897f, 0.119832702f, 0.105508670f, -0.0231114309f, 0.159176514f, -0.255716324f, 0.143972710f, \
   -0.0291461404f}
