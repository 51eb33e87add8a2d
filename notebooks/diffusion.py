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
# # Image diffusion: from noise to images of a class
#
# **Question.** How good are images that a U-Net draws by removing noise step by step, what does guidance towards a class buy and
# cost, and are they new, or training images remembered?
#
# An image $x$ is mixed with noise, $x_t = \sqrt{\bar\alpha_t}\, x + \sqrt{1 - \bar\alpha_t}\, \epsilon$, with $\bar\alpha_t$ a
# squared cosine of $t / T$. A U-Net is told $x_t$, $t$ and the class $y$ and learns the noise:
#
# $$L = E\, |\epsilon - \epsilon_\theta(x_t, t, y)|^2.$$
#
# In one of ten cases the class is hidden ($y = 0$), so one network holds two models. Sampling starts from noise and takes 50
# steps of DDIM with
# $\hat\epsilon = \epsilon_\theta(x, t, 0) + w\, [\epsilon_\theta(x, t, y) - \epsilon_\theta(x, t, 0)]$: $w = 1$ is the
# conditional model, $w > 1$ pushes towards the class. An exponential moving average of the weights draws.
#
# | preset | data | what it is for |
# |---|---|---|
# | `smoke` | 256 digits | seconds; checks that everything works, the result means nothing |
# | `laptop` | scikit-learn's digits, 8x8 | minutes on one CPU core |
# | `mnist` | MNIST, 28x28, downloaded or from `data_folder` | for a GPU |
# | `full` | CIFAR-10, 32x32, downloaded | hours on a GPU |

# %% tags=["bootstrap"]
import trainbook

# %% tags=["parameters"]
preset = "laptop"  # smoke, laptop, mnist or full
overrides = {}  # field name to value, for example {"guidance_scale": 3, "num_epochs": 200}
run_id = ""  # empty: continue the newest unfinished run of this very config, or start a new one
authentic = False  # True refuses synthetic data, data without a checksum and a changed kit

# %% [markdown]
# ## Where this runs
# Config says what is learned, the machine below only where. A run folder that was started here continues elsewhere.

# %%
from trainbook.workflows import diffusion

run = trainbook.start(diffusion, preset, overrides, run_id, authentic)

# %% [markdown]
# ## What will be learned
# U-Net and noise schedules are those of the library diffusers; loss, guidance and judging are ours.

# %%
run.config_table()

# %% [markdown]
# ## Data
# Real images with labels. Every class keeps its share in every split.

# %%
run.load_data()

# %% [markdown]
# ## Model and baselines
# Two networks: a small **classifier**, trained first, that only judges; and the **U-Net**. Beside the samples stand the
# **held-out** images themselves (what a perfect sampler would score), a **normal distribution per class** with full covariance,
# one **normal distribution** for all, and uniform **noise**.

# %%
run.build()

# %% [markdown]
# ## Training
# Two stages. Interrupt at any time; it goes on bit for bit. On the way the U-Net draws every class from the same noise, so that
# one sees images come into being.

# %%
run.train()

# %%
run.curves()

# %% [markdown]
# ## Held-out metrics beside the baselines
# - `frechet_distance`: between normal distributions fitted to the classifier's 32 features of samples and of training images.
#   It is **not FID**: the features are this run's own, so compare within this table only. `held_out` is the floor.
# - `conditional_accuracy`: how often the classifier sees the class that was asked for; for `held_out` it is its own accuracy.
# - `nearest_distance`: median distance to the nearest training image; `nearest_distance_share` is it over that of held-out
#   images. Far below 1 means remembered images, far above 1 means images unlike any digit.
#
# `samples` are without guidance, `guided` at `guidance_scale`. Guidance buys accuracy with variety: expect a larger distance.

# %%
run.evaluate()

# %% [markdown]
# ## The pictures
# - **Samples**: a column per class, none picked, without and with guidance, beside real images.
# - **Over training**: the same noise through the weights of several steps.
# - **From noise**: DDIM's steps. **Neighbours**: the samples that are *nearest* to a training image, each above that image.

# %%
run.draw()

# %% [markdown]
# ## Finish
# Writes the weights as safetensors, the report, and `run.json` last of all: what it says is what happened.
#
# **Limits.** The judge is small and trained on the same images: it sees what matters to classes, not all that matters to an eye.
# A Frechet distance of some hundred samples is biased upwards, the floor as well. The `full` preset was not run here.
#
# **References.** Ho et al. 2020, arXiv 2006.11239 (DDPM); Nichol and Dhariwal 2021, arXiv 2102.09672 (cosine schedule); Song
# et al. 2021, arXiv 2010.02502 (DDIM); Ho and Salimans 2022, arXiv 2207.12598 (guidance); Heusel et al. 2017, arXiv 1706.08500
# (FID).

# %%
run.finish()
