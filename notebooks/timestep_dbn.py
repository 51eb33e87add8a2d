# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Timestep-specific DBN: one Boltzmann machine per diffusion step
#
# **Question.** Can a chain of small restricted Boltzmann machines (RBMs), each undoing one step of bit-flip noise,
# model binary image codes better than one large RBM with as many parameters, and better than reverse steps that
# treat every bit on its own?
#
# 1. A **multi-resolution binary autoencoder** turns an image into exact bits on three levels, fine to coarse.
# 2. A **Bernoulli diffusion** flips bits: $z_t = z_{t-1} \oplus n_t,\; n_t \sim \mathrm{Bern}(\beta_t)$, so that $z_t$ differs
#    from $z_0$ with probability $c_t = \tfrac12\bigl(1 - \prod_{s\le t}(1 - 2\beta_s)\bigr)$ and $z_T$ is a fair coin.
# 3. For every step and level, a **conditional RBM** learns the way back,
#    $p_t(z \mid z_t, g) \propto \exp\bigl(-F_t(z; g) + \Gamma_t\, z\cdot(2z_t - 1)\bigr)$ with
#    $F_t = -a_t\cdot z - \sum_j \mathrm{softplus}(b_t + zW_t + gU_t)_j$ and $\Gamma_t = \ln\frac{1-\beta_t}{\beta_t}$.
#    With $F_t = -\ln q(z_{t-1})$ this is Bayes' rule, exact for every $T$; $g$ carries the coarser level.
# 4. **Sampling** starts from coins and walks $t = T, \dots, 1$, coarse to fine, by Gibbs sampling.
#
# "Quantum-inspired", as the original called it, means classical Gibbs sampling of Boltzmann machines; no quantum
# device is involved. Nothing in the chain is approximated but two things: the negative phase of the gradient
# (contrastive divergence) and the number of Gibbs sweeps when sampling.
#
# | preset | data | what it is for |
# |---|---|---|
# | `smoke` | 256 of scikit-learn's digits | seconds; checks that everything works, the result means nothing |
# | `laptop` | scikit-learn's 1,797 real 8x8 digits | minutes on 2 CPU cores; a result worth looking at |
# | `full` | CIFAR-10 airplanes, T = 50, batch 32, 100 epochs per timestep | the published setting, for a GPU |
# | `v100`, `t4`, `cpu` | the same | `full` with 16-bit products in the autoencoder; on a CPU with fewer epochs |

# %% tags=["bootstrap"]
import trainbook

# %% tags=["parameters"]
preset = "laptop"  # smoke, laptop, full, v100, t4 or cpu
overrides = {}  # field name to value, for example {"timesteps": 16, "learning_rate": 1e-3}
run_id = ""  # empty: continue the newest unfinished run of this very config, or start a new one
authentic = False  # True refuses synthetic data, data without a checksum and a changed kit

# %% [markdown]
# ## Where this runs
# Config says what is learned, the machine below only where. A run folder that was started here continues elsewhere.

# %%
from trainbook.workflows import timestep_dbn

run = trainbook.start(timestep_dbn, preset, overrides, run_id, authentic)

# %% [markdown]
# ## What will be learned
# Every field, its bounds and its meaning. Change one through `overrides` above; a misspelt name or a value out of
# range is refused before anything is spent.

# %%
run.config_table()

# %% [markdown]
# ## Data
# The split belongs to the data set, not to the seed: every run sees the same held-out images.

# %%
run.load_data()

# %% [markdown]
# ## Model and baselines
# The monolithic RBM gets as many parameters as the whole chain; that is far too wide for so few images, so a small RBM of
# fitting width stands beside it as the stronger baseline. The logistic chain has the same exact coupling
# $\Gamma_t$ and sees all noisy bits, but treats the bits of $z_{t-1}$ as independent given $z_t$.

# %%
run.build()

# %% [markdown]
# ## Training
# Three stages: autoencoder, chain (block of timesteps by block), baselines. A checkpoint is written every minute and at
# every stage's end. Interrupt at any time (the stop button, Ctrl-C, a session that ends): run the cells again, or
# `trainbook resume`, and it goes on bit for bit.

# %%
run.train()

# %%
run.curves()

# %% [markdown]
# ## Held-out metrics beside the baselines
# `nats_per_bit` is the length of a held-out code, $-\ln p(z_0)$ per bit; fair coins cost 0.693. It is exact for
# independent bits and an upper bound for the two chains (one drawn transition per timestep and image). The partition
# functions are annealed in both directions, which brackets the truth: `nats_per_bit` takes the direction that does not
# flatter for our chain and the one that does for the plain RBMs; `other direction` is the other. Where the two are
# far apart, neither is to be trusted. `nats per bit above chain` is the difference image by image, with the standard
# error of that. `end_bit_error` is the share of wrong bits after undoing noise that flipped just
# under a quarter of them. `sample_covariance_error` compares samples with held-out codes; the column `training data` is
# the floor that finite sampling alone gives.

# %%
run.evaluate()

# %% [markdown]
# ## The pictures
# - **Reconstruction**: what the bits keep, and what each level carries (its bits replaced by coin flips).
# - **Samples**: one column per sample from noise to image, and 40 samples, none picked, beside held-out images.
# - **Convergence**: timestep by epoch. Reconstruction error alone is not a likelihood and can improve while the model
#   gets worse; read it beside the pseudo-likelihood.
# - **Free-energy gap**: valid minus train. A gap that keeps rising is overfitting.
# - **Bit error** and **code length**: the chain against the baselines. What it does not beat is said in the verdicts.

# %%
run.draw()

# %% [markdown]
# ## Finish
# Writes the weights as safetensors, the report, and `run.json` last of all: what it says is what happened.
#
# **Limits.** Contrastive divergence is a biased gradient; the bias shrinks with `gibbs_sweeps`, and
# `chain/negative_phase_bias` measures it. With many timesteps each
# reverse step is almost factorised and any good bit predictor suffices: RBMs earn their keep at few steps. Expect
# recognisable but blurry pictures from dense RBMs.
#
# **References.** Sohl-Dickstein et al. 2015 (diffusion on bits); Hinton 2002, Tieleman 2008 (contrastive divergence,
# persistent chains); Gao et al. 2021, arXiv 2012.08125 (recovery likelihood); Wang et al. 2023, arXiv 2304.04820 (binary
# latents); Jelincic et al. 2025, arXiv 2510.23972 (denoising Boltzmann machines); Neal 2001 (annealed importance sampling).

# %%
run.finish()
