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
# Every field, its bounds and its meaning; where a person is, a form: Save writes `run.toml`, which every launcher reads,
# and lets the cells below train it. Headless, change fields through `overrides` above. A misspelt name or a value out of
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
# - **Independent bits**: every bit a coin of its own.
# - **Monolithic RBM**: one RBM, no diffusion, with as many parameters as the whole chain; far too wide for so few images.
# - **Small RBM**: one of fitting width. It takes 10 updates for one of the chain's, which costs about the same time.
# - **Logistic chain**: the same exact coupling $\Gamma_t$ and all noisy bits, but the bits of $z_{t-1}$ independent given
#   $z_t$.
# - **Denoiser**: one network for all $t$ that predicts the clean bits, as discrete diffusion models do; its reverse step is
#   $\sum_{z_0} q(z_{t-1} \mid z_t, z_0)\, p(z_0 \mid z_t)$ bit by bit. As many parameters as the chain, about the same time
#   per step.
#
# Rates, decay and width of every baseline were chosen on the validation split, and each has the weights of its best epoch
# there, as every timestep of the chain has.

# %%
run.build()

# %% [markdown]
# ## Training
# Three stages: autoencoder, chain (block of timesteps by block), baselines. A checkpoint is written every minute and at
# every stage's end. Interrupt at any time (the stop button, Ctrl-C, a session that ends): run the cells again, or
# `trainbook resume`, and it goes on bit for bit. Timesteps overfit at different epochs: each keeps the weights of the epoch
# that was best on held-out transitions (`patience` also stops it), by pseudo-likelihood, never by reconstruction error.

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
# far apart, neither is to be trusted. `end_bit_error` is the share of wrong bits after undoing noise that flipped just
# under a quarter of them; a model that only ever answers with the likeliest bits does better there than one that samples.
#
# Samples are compared with held-out codes: `sample_covariance_error`; `squared_mmd`, a kernel distance that is 0 for equal
# distributions; `c2st_linear` and `c2st_kernel`, how often a classifier tells a sample from a held-out code (0.5: it cannot;
# the linear one sees means only, the kernel one how bits go together); `nearer_than_held_out`, how often a sample lies
# nearer to the training codes than a held-out code does (0.5: new and as good; towards 1: remembered). The column
# `training data` is the floor that finite sampling alone gives.
#
# **Beats or not**: for every baseline its value less the chain's, with a 95 % interval, image by image where there are
# pairs, else by resampling. Beats: all of the interval above zero. Ties: zero inside. The intervals are over held-out images
# and samples; another seed trains another chain, so run three before believing a narrow one.

# %%
run.evaluate()

# %% [markdown]
# ## The pictures
# - **Reconstruction**: what the bits keep, and what each level carries (its bits replaced by coin flips).
# - **Samples**: one row per sample from noise to image, and 40 samples, none picked, beside held-out images. **Neighbours**:
#   samples of every model above their nearest training codes; **distances**: how those are distributed.
# - **Convergence**: timestep by epoch. Reconstruction error alone is not a likelihood and can improve while the model
#   gets worse; read it beside the pseudo-likelihood. Dots: the epoch whose weights a timestep keeps.
# - **Free-energy gap**: valid minus train. A gap that keeps rising is overfitting.
# - **Hidden usage**: a unit that is always off, or always on, carries nothing.
# - **Bit error**: the chain against the baselines. **Phase times**: where the time went.

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
