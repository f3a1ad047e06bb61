"""The losses: pure functions of tensors, unreduced, a value an example or a token.

| module | loss | paper |
|---|---|---|
| `supervised` | negative log-likelihood | |
| `reward` | pairwise ranking of scores, three ways to take a score from a response | arXiv 2203.02155, eq. 1 |
| `preference` | DPO (with label smoothing), IPO, hinge | arXiv 2305.18290, eq. 7; 2310.12036, eq. 17; 2305.10425 |
| `feedback` | KTO, APO-zero and BCO on single responses | arXiv 2402.01306, eq. 8; 2408.06266, eq. 7; 2404.04656 |
| `policy_gradient` | PPO's clipped surrogate and clipped value loss | arXiv 1707.06347, eq. 7 |

A script sums what it gets and divides once, by the tokens or the examples of the whole optimiser step on all
devices: then how a step is cut into micro-batches changes nothing.
"""
