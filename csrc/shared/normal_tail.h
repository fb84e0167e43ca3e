// The coefficients of the normal distribution's tail, for gelu in float: with r = 1 / (1 + TSAE_TAIL_SCALE |z|) and P the
// polynomial with these coefficients, lowest first, Phi(-|z|) = exp(-z^2/2) r P(r). Fitted to the least largest relative
// error: 3e-8 for |z| <= 14. Unlike 1 + erf this keeps its digits for negative z.
#pragma once

#define TSAE_TAIL_SCALE 0.35f
#define TSAE_TAIL                                                                                             \
  {0.139621407f, 0.139861897f, 0.119832702f, 0.105508670f, -0.0231114309f, 0.159176514f, -0.255716324f, 0.143972710f, \
   -0.0291461404f}
