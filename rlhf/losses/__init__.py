"""The losses: pure functions of tensors, unreduced, a value an example or a token.

| module | loss | paper |
|---|---|---|
| `supervised` | negative log-likelihood | |
| `reward` | pairwise ranking of scores, three ways to take a score from a response | arXiv 2203.02155, eq. 1 |
| `preference` | DPO (with label smoothing), robust, IPO, hinge, EXO, DiscoPOP | arXiv 2305.18290, eq. 7, and others |
| `anchored` | BCO, NCA, APO and SPPO on pairs | 2404.04656, 2402.05369, 2408.06266, 2405.00675 |
| `feedback` | KTO, APO-zero and BCO on single responses | arXiv 2402.01306, eq. 8; 2408.06266, eq. 7; 2404.04656 |
| `transport` | AOT | 2406.05882 |
| `reference_free` | ORPO, CPO, SimPO | 2403.07691, 2401.08417, 2405.14734 |
| `log_ratios` | (no losses: f-divergences, LD-DPO, WPO) | 2309.16240, 2409.06411, 2406.11827 |
| `policy_gradient` | PPO's clipped surrogate and clipped value loss | arXiv 1707.06347, eq. 7 |

A script sums what it gets and divides once, by the tokens or the examples of the whole optimiser step on all
devices: then how a step is cut into micro-batches changes nothing.
"""
